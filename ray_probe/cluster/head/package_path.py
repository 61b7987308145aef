"""Where other processes on this machine import this package from: the place that this process has it from."""

import sys
from pathlib import Path

import ray_probe

_INSTALLED = ("site-packages", "dist-packages")


def package_path() -> tuple[str, ...]:
    """Directories to put before all others on a child's path; none where the package is installed for every process."""
    root = Path(ray_probe.__file__).resolve().parents[1]
    return () if root.name in _INSTALLED else (str(root),)


def python_command(code: str, *arguments: str) -> list[str]:
    """A command that runs code in another Python, with this package and without the working directory on its path."""
    found = f"import sys\nsys.path[:0] = {list(package_path())!r}\n"
    return [sys.executable, "-P", "-c", found + code, *arguments]
