"""What a run leaves on disk, and how it is written so that a kill cannot spoil it."""
