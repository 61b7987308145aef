"""The command line `ray-probe`: commands, options, and the tables that only it prints."""
