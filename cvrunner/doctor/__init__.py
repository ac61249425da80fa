"""Find what is wrong with a machine for a configuration, and what to type; nothing is started."""
