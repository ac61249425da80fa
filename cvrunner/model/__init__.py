"""The head: Mamba, pooling, and the whole model."""
