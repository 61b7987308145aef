"""Connects this process to a Ray cluster and checks its nodes."""
