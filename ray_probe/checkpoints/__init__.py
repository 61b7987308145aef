"""Checkpoints: their files, inspection and loading, and the forecast of memory."""
