"""What a run leaves on disk, and what a resumed run reads back (spec section 9).

A round is finished when its line stands in rounds.jsonl: its gradient and its sums were written before.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from ray_probe.errors import ConfigError, OutputError, bad_value
from ray_probe.estimates import Totals

Vector = npt.NDArray[np.float64]


def default_name(config_path: Path) -> str:
    """CONFIG-UTCTIME-4HEX, in the characters that run names may have."""
    stem = "".join(c if c.isascii() and c.isalnum() else "-" for c in config_path.stem.lower()).strip("-") or "run"
    return f"{stem[:40]}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Disk errors become one line that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); make room, then go on with run --resume"
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write, fsync, rename: a reader sees the old file or the new one. Raises OutputError when it cannot."""
    temporary = path.with_name(path.name + ".tmp")
    with _writing(path), temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
        temporary.replace(path)


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @classmethod
    def create(cls, parent: Path, name: str) -> "RunDirectory":
        """Make a new run directory (0700). Raises ConfigError when it exists or cannot be made."""
        path = parent / name
        cls.check_free(parent, name)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700)
            (path / "state").mkdir()
        except OSError as error:
            raise ConfigError(bad_value("output.dir", str(parent), f"cannot be written ({error.strerror})")) from None
        return cls(path)

    @staticmethod
    def check_free(parent: Path, name: str) -> None:
        """What `create` would refuse, known before anything is started. Raises ConfigError."""
        path = parent / name
        if path.exists():
            remedy = f"choose another output.name, or go on with it: run --resume {path}"
            raise ConfigError(bad_value("output.name", name, f"{path} exists; {remedy}"))
        there = next(place for place in (parent, *parent.parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ConfigError(bad_value("output.dir", str(parent), f"cannot be written in {there}; choose another"))

    def lock(self) -> None:
        """Hold the directory until this process ends. Raises ConfigError naming the process that holds it."""
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            remedy = f"{holder or 'another process'} is driving this run; wait for it or stop it"
            raise ConfigError(bad_value("--resume", str(self.path), remedy)) from None
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._lock = descriptor

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Open the directory of an earlier run. Raises ConfigError when it is none."""
        if not (path / "manifest.json").is_file() or not (path / "config.yaml").is_file():
            raise ConfigError(bad_value("--resume", str(path), "need the directory of a run, with config.yaml in it"))
        return cls(path)

    @property
    def ledger(self) -> Path:
        """File of accepted records."""
        return self.path / "ledger.jsonl"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one JSON file, atomically; NaN is refused."""
        write_atomically(self.path / name, json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read one JSON file of the run. Raises ConfigError when it is missing or damaged."""
        try:
            value: dict[str, Any] = json.loads((self.path / name).read_bytes())
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from None
        return value

    def commit_round(self, number: int, totals: Totals, gradient: Vector, summary: dict[str, Any]) -> None:
        """Make a round count: its cumulative gradient and its sums first, then its line in rounds.jsonl."""
        write_atomically(self._gradient(number), safetensors.numpy.save({"sum": gradient}))
        self.write_json(f"state/round-{number:06d}.json", totals.to_json())
        lines = self.path / "rounds.jsonl"
        with _writing(lines), lines.open("ab") as stream:
            stream.write(json.dumps(summary, allow_nan=False).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._gradient(number - 1).unlink(missing_ok=True)

    def finished_rounds(self) -> list[dict[str, Any]]:
        """The lines of rounds.jsonl; a torn last line is cut off the file, its round was never finished.

        Raises ConfigError, naming the line, for damage before the end.
        """
        path = self.path / "rounds.jsonl"
        if not path.exists():
            return []
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        if torn:
            write_atomically(path, whole + b"\n" if whole else b"")
        lines = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise self._unreadable(f"{path.name} line {number}", error) from None
        return lines

    def restore(self, rounds: int) -> tuple[list[Totals], Vector | None]:
        """Totals of each finished round, and the gradient summed over them (None for no round).

        Raises ConfigError when a file of theirs is missing or damaged.
        """
        parts = [Totals.from_json(self.read_json(f"state/round-{number:06d}.json")) for number in range(rounds)]
        if not parts:
            return [], None
        path = self._gradient(rounds - 1)
        try:
            return parts, safetensors.numpy.load(path.read_bytes())["sum"]
        except (OSError, KeyError, SafetensorError) as error:
            raise self._unreadable(path.name, error) from None

    def save_gradient(self, by_name: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write gradient.safetensors: the mean gradient by parameter name."""
        write_atomically(self.path / "gradient.safetensors", safetensors.numpy.save(dict(by_name)))

    def _unreadable(self, name: str, error: Exception) -> ConfigError:
        remedy = f"{name} cannot be read ({error}), restore it or start a new run"
        return ConfigError(bad_value("--resume", str(self.path), remedy))

    def _gradient(self, number: int) -> Path:
        return self.path / "state" / f"gradient-{number:06d}.safetensors"
