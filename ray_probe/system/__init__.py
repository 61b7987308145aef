"""Files, processes, signals, clocks: the operating system, without torch or Ray."""
