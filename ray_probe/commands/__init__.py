"""The commands beside `run`: each imports what it needs when it is called."""
