"""Arms failpoints: the directory that they look into, and what they shall do."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_probe.cluster.head.environment import environment
from ray_probe.system.failpoints import VARIABLE


def arm(
    directory: Path, name: str, action: str = "kill", times: int = 1, only: str | None = None, seconds: float = 0
) -> None:
    """Have a place fail so many times from now on, whatever it has done before."""
    disarm(directory, name)
    asked = {"action": action, "times": times, "only": only, "seconds": seconds}
    half = directory / f"{name}.new"
    half.write_text(json.dumps(asked))
    half.replace(directory / name)


def disarm(directory: Path, name: str) -> None:
    (directory / name).unlink(missing_ok=True)
    for mark in directory.glob(f"{name}.[0-9]*"):
        mark.unlink()


def disarm_all(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink(missing_ok=True)


def fired(directory: Path, name: str) -> int:
    """How many times the place has failed since it was armed."""
    return len(list(directory.glob(f"{name}.[0-9]*")))


@contextmanager
def failpoints_in(directory: Path) -> Iterator[Path]:
    """Processes that are started in the block, and this one, look for failpoints there."""
    with environment({VARIABLE: str(directory)}):
        yield directory
