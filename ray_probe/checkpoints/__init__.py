"""Reads checkpoints: files, weights, adapters, tokenizers, and how much memory they take."""
