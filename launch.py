"""Runs the command line from a working copy, as `ray-probe` does once installed."""

from ray_probe.cli.main import main

if __name__ == "__main__":
    main()
