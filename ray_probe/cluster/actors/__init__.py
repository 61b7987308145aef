"""The actors of a run, each with its handle, and the calls to them."""
