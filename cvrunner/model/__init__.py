"""WavLM, Mamba and the model made of both."""
