"""Preparations before a run: the demo corpus."""
