"""The command line `ray-probe`: commands, options and their tables."""
