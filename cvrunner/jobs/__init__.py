"""Jobs on a Ray cluster: submit, status, logs, stop."""
