"""The controller of a service or run and the measurement of one checkpoint."""
