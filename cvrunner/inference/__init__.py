"""Use of trained models: one model, or the ensemble of a run's folds, on any audio files."""
