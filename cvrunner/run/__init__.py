"""The main job, from a configuration to its verdict, and its commands."""
