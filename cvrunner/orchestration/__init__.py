"""Which trials run, where and when, and what happens after a failure."""
