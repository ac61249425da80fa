"""Speech encoders: from files to hidden states over packed utterances."""
