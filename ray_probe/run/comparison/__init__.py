"""Comparisons of checkpoints: checkpoint A, estimates, chains, result types."""
