"""Adapters: their files, whether they were trained, and loading them into a model."""
