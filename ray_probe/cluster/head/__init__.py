"""The Ray head that this package starts, in a process of its own."""
