"""The configuration: YAML files merged, checked and frozen, with a digest of what decides numbers."""
