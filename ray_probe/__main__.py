"""The command line as `python -m ray_probe`."""

from ray_probe.cli.main import main

if __name__ == "__main__":
    main()
