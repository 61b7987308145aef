"""A run: plan, messages, backend interface, run directory, result."""
