"""Series of checkpoints as tables, as rows of figures and as a plot."""
