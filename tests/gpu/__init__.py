"""Acceptance on a real GPU: `make gpu-check`."""
