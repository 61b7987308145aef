"""Connecting to a Ray cluster, and what must hold on its nodes."""
