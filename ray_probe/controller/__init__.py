"""The controller of a service and the measurement of one checkpoint, without Ray."""
