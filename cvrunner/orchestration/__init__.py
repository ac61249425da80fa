"""Which trials run, when and where."""
