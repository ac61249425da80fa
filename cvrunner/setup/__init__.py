"""What is made before a run: the demo corpus."""
