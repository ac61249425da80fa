"""The configuration: YAML files laid over one another, checked, frozen, with a digest."""
