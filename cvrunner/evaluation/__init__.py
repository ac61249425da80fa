"""Scores: pure functions of labels and predictions."""
