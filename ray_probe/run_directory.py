"""What a run leaves on disk, and what a resumed run reads back (spec section 9).

Rounds are finished when their lines stand in rounds.jsonl: their gradient and their sums were written before. Rounds
that were committed together (`group` in their lines) are finished together.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray_probe.errors import ConfigError, OutputError, bad_value
from ray_probe.estimates import Totals
from ray_probe.files import WAIT, held, write_atomically, writing


def default_name(config_path: Path) -> str:
    """CONFIG-UTCTIME-4HEX, in the characters that run names may have."""
    stem = "".join(c if c.isascii() and c.isalnum() else "-" for c in config_path.stem.lower()).strip("-") or "run"
    return f"{stem[:40]}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def as_json(value: Mapping[str, Any]) -> str:
    """The text of a JSON file; NaN is refused."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


class RunDirectory:
    """The files of one run.

    Args:
        path: its directory.
        field: what names the directory in errors about its files.
    """

    def __init__(self, path: Path, field: str = "--resume") -> None:
        self.path = path
        self._field = field
        self._ends_whole = False

    @classmethod
    def create(cls, parent: Path, name: str, files: Mapping[str, str] | None = None) -> "RunDirectory":
        """Make a new run directory (0700) with these files in it: it is there with all of them, or not at all.

        Raises ConfigError when it exists or cannot be made.
        """
        path, part = parent / name, parent / f".{name}.{secrets.token_hex(4)}.part"  # another may be making it too
        cls.check_free(parent, name)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            part.mkdir(mode=0o700)
            part.joinpath("state").mkdir()
            for file, text in (files or {}).items():
                write_atomically(part / file, text.encode())
            part.rename(path)
            for left in parent.glob(f".{name}.*part"):  # by a crash, or by another driver that is too late now
                shutil.rmtree(left, ignore_errors=True)
        except (OSError, OutputError) as error:
            shutil.rmtree(part, ignore_errors=True)
            cls.check_free(parent, name)
            if isinstance(error, OutputError):
                raise
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

    def held(
        self, wait_s: float = 0.0, waiting: Callable[[str], None] = lambda holder: None
    ) -> contextlib.AbstractContextManager[None]:
        """Hold the directory for the block, against any other driver (see `ray_probe.files.held`).

        Args:
            wait_s: seconds to wait for a holder that is about to end, as its driver has died say.
            waiting: told the holder when it has to be waited for.

        Raises:
            ConfigError: another process holds it; says which, on which host, since when.
        """

        def refused(holder: str) -> str:
            return bad_value("--resume", str(self.path), f"{holder} is driving this run; {WAIT}")

        return held(self.path / "lock", wait_s, refused, waiting)

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
    def state(self) -> Path:
        """Directory of the committed gradient and sums."""
        return self.path / "state"

    @property
    def gradient(self) -> Path:
        """File of the mean gradient by parameter name."""
        return self.path / "gradient.safetensors"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one JSON file, atomically; NaN is refused."""
        write_atomically(self.path / name, as_json(value).encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """Read one JSON file of the run. Raises ConfigError when it is missing or damaged."""
        try:
            value: dict[str, Any] = json.loads((self.path / name).read_bytes())
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from None
        return value

    def commit(self, parts: Sequence[Totals], lines: Sequence[dict[str, Any]]) -> None:
        """Make rounds count, all or none: their sums first, then their lines in rounds.jsonl.

        The gradient through the last of them is on disk already.
        """
        group = [lines[0]["round"], lines[-1]["round"]]
        for line, totals in zip(lines, parts, strict=True):
            self.write_json(f"state/round-{line['round']:06d}.json", totals.to_json())
        data = b"".join(json.dumps(line | {"group": group}, allow_nan=False).encode() + b"\n" for line in lines)
        path = self.path / "rounds.jsonl"
        with writing(path), path.open("ab") as stream:
            if not self._ends_whole:  # a crash may have left lines that were never finished
                stream.truncate(len(self._whole_lines()[0]))
            self._ends_whole = False
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        self._ends_whole = True

    def finished_rounds(self) -> list[dict[str, Any]]:
        """The lines of rounds.jsonl. Torn last lines, or part of a group, are left out: they were never finished.

        Raises ConfigError, naming the line, for damage before the end.
        """
        return self._whole_lines()[1]

    def beta(self, version: int | None = None) -> dict[str, Any]:
        """The global fit of one version, as result.json holds the last; None: the last.

        Raises:
            ConfigError: no finished round has that version; names those that have.
        """
        fits = {line["beta_version"]: line["fit"] for line in self.finished_rounds() if "fit" in line}
        version = max(fits, default=None) if version is None else version
        if version not in fits:
            there = f"there are versions {min(fits)} to {max(fits)}" if fits else "no finished round holds one"
            raise ConfigError(bad_value("version", version, there))
        fit: dict[str, Any] = fits[version]
        return fit

    def restore(self, rounds: int) -> list[Totals]:
        """Totals of each finished round. Raises ConfigError when a file of theirs is missing or damaged."""
        return [Totals.from_json(self.read_json(f"state/round-{number:06d}.json")) for number in range(rounds)]

    def _whole_lines(self) -> tuple[bytes, list[dict[str, Any]]]:
        """What rounds.jsonl holds of finished rounds: the bytes and the objects."""
        path = self.path / "rounds.jsonl"
        whole, end, _ = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
        texts, lines = whole.splitlines(keepends=True), []
        for number, text in enumerate(texts, start=1):
            try:
                lines.append(json.loads(text))
            except ValueError as error:
                raise self._unreadable(f"{path.name} line {number}", error) from None
        finished = _finished(lines)
        return (whole + end if finished == len(lines) else b"".join(texts[:finished])), lines[:finished]

    def _unreadable(self, name: str, error: Exception) -> ConfigError:
        remedy = f"{name} cannot be read ({error}), restore it or start a new run"
        return ConfigError(bad_value(self._field, str(self.path), remedy))


def _finished(lines: Sequence[dict[str, Any]]) -> int:
    """How many of the lines are of groups that are there to the end."""
    if not lines:
        return 0
    first, last = lines[-1].get("group", [len(lines) - 1] * 2)
    return len(lines) if last == len(lines) - 1 else first
