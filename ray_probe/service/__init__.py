"""Runs, services and their clients, as a user starts and asks them."""
