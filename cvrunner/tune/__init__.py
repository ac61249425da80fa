"""Search for better settings with Ray Tune."""
