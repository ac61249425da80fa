"""Trained models at work: loaded again, alone or as the ensemble of a run's folds, on any audio."""
