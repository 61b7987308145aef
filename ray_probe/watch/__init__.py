"""Checkpoints of a training run: recognised, pinned and queued as they appear."""
