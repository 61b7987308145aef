"""The import path with which other processes on this machine find this package."""

import sys
from pathlib import Path

import ray_probe

_INSTALLED = ("site-packages", "dist-packages")


def package_path() -> tuple[str, ...]:
    """Returns directories for a child's path; () for an installed package."""
    root = Path(ray_probe.__file__).resolve().parents[1]
    return () if root.name in _INSTALLED else (str(root),)


def python_command(code: str, *arguments: str) -> list[str]:
    """Returns a command that runs code with this package on Python's path.

    The working directory is not on that path.
    """
    found = f"import sys\nsys.path[:0] = {list(package_path())!r}\n"
    return [sys.executable, "-P", "-c", found + code, *arguments]
