"""Tests of what is made from a run's files."""
