"""What people read of a run: the closing table, the plots, the display while it works. No torch, no ray."""
