"""From files on disk to utterances, folds, cached features and batches."""
