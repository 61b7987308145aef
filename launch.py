"""The command line of a working copy: `python launch.py COMMAND`, the same as `ray-probe COMMAND` once installed."""

from ray_probe.cli.main import main

if __name__ == "__main__":
    main()
