"""What a run answers: scores, statistics, floor, ceiling, comparison and the sentence."""
