"""The verdict of a run: scores, statistics, floor, ceiling, comparison and the sentence."""
