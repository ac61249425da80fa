"""One trial, from its first batch to its test score, as plain PyTorch."""
