"""A diagnosis before a run: one line for each requirement."""
