"""The service: its queue, what it answers, where it is found, and the client that asks."""
