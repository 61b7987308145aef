"""The files of a run, and what a resumed run reads back.

A round is finished when its line is in rounds.jsonl: its gradient and its sums were written before. Rounds of one
commit group are finished together.

Every file that is read back is checked: a line has a checksum and the sha256 of its round's files in `state/`, and
SHA256SUMS lists the files that are written whole (see `ray_probe.system.digests`).
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray_probe.errors import ConfigError, MissingError, OutputError, bad_value
from ray_probe.gradient.state_file import STATES, state_name
from ray_probe.run.manifest import Manifest
from ray_probe.run.result import Beta, Result
from ray_probe.run.rounds_file import FinishedRound, RoundsFile
from ray_probe.run.totals import Totals
from ray_probe.system.digests import RESTORE, SUMS, check_recorded, record
from ray_probe.system.files import WAIT, held, write_atomically

RESULT, MANIFEST = "result.json", "manifest.json"
STARTS_WITH = ("config.yaml", MANIFEST)


def default_name(config_path: Path) -> str:
    """Return CONFIG-UTCTIME-4HEX in the characters that run names may have."""
    stem = "".join(c if c.isascii() and c.isalnum() else "-" for c in config_path.stem.lower()).strip("-") or "run"
    return f"{stem[:40]}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def as_json(value: Mapping[str, Any]) -> str:
    """Return the text of a JSON file. Raises ValueError for NaN."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


class RunDirectory:
    """The files of one run.

    Args:
        path: its directory.
        field: names the directory in errors about its files.
    """

    def __init__(self, path: Path, field: str = "--resume") -> None:
        self.path = path
        self._field = field
        self._rounds = RoundsFile(path / "rounds.jsonl", self._unreadable)

    @classmethod
    def create(cls, parent: Path, name: str, files: Mapping[str, str] | None = None) -> "RunDirectory":
        """Make a new run directory (0700) that holds all of these files, or nothing.

        Raises ConfigError when it exists or cannot be made.
        """
        path, part = parent / name, parent / f".{name}.{secrets.token_hex(4)}.part"  # another driver may make it too
        cls.check_free(parent, name)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            part.mkdir(mode=0o700)
            part.joinpath("state").mkdir()
            written = {file: text.encode() for file, text in (files or {}).items()}
            for file, data in written.items():
                write_atomically(part / file, data)
            if written:
                record(part, written)
            part.rename(path)
            for left in parent.glob(f".{name}.*part"):  # by a crash, or by another driver that lost the race
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
        """Raise the ConfigError of `create` before anything is started."""
        path = parent / name
        if path.exists():
            remedy = f"choose another output.name, or continue it: run --resume {path}"
            raise ConfigError(bad_value("output.name", name, f"{path} exists; {remedy}"))
        there = next(place for place in (parent, *parent.parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ConfigError(bad_value("output.dir", str(parent), f"cannot be written in {there}; choose another"))

    def held(
        self, wait_s: float = 0.0, waiting: Callable[[str], None] = lambda holder: None
    ) -> contextlib.AbstractContextManager[None]:
        """Lock the directory against other drivers for the block.

        Args:
            wait_s: seconds to wait for a holder that is about to end.
            waiting: called with the holder before the wait.

        Raises:
            ConfigError: another process holds it; names process, host and start.
        """

        def refused(holder: str) -> str:
            return bad_value("--resume", str(self.path), f"{holder} is driving this run; {WAIT}")

        return held(self.path / "lock", wait_s, refused, waiting)

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Open the directory of an earlier run.

        Raises ConfigError where a file of its start is missing.
        """
        missing = [name for name in STARTS_WITH if not (path / name).is_file()]
        if missing == list(STARTS_WITH):
            remedy = f"need the directory of a run, with {' and '.join(STARTS_WITH)} in it"
            raise ConfigError(bad_value("--resume", str(path), remedy))
        if missing:
            raise ConfigError(bad_value("--resume", str(path), f"{missing[0]} is missing, {RESTORE}"))
        return cls(path)

    @property
    def ledger(self) -> Path:
        """The ledger."""
        return self.path / "ledger.jsonl"

    @property
    def state(self) -> Path:
        """The directory of the committed gradient and sums."""
        return self.path / "state"

    @property
    def gradient(self) -> Path:
        """The mean gradient by parameter name."""
        return self.path / "gradient.safetensors"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    def write_json(self, name: str, value: Mapping[str, Any]) -> bytes:
        """Write a JSON file atomically; returns its bytes.

        Raises ValueError for NaN.
        """
        data = as_json(value).encode()
        write_atomically(self.path / name, data)
        return data

    def read_json(self, name: str, remedy: str = RESTORE) -> Any:
        """Return the content of a JSON file.

        Raises ConfigError when it is missing or damaged.
        """
        try:
            data = (self.path / name).read_bytes()
            check_recorded(self.path, name, data, remedy)
            return json.loads(data)
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from None

    def check_start(self) -> None:
        """Raise ConfigError, naming the file, for a changed config or manifest."""
        if not (self.path / SUMS).is_file():
            remedy = f"{SUMS} is missing (ray_probe 0.1.1 and before wrote none), {RESTORE}"
            raise ConfigError(bad_value(self._field, str(self.path), remedy))
        for name in STARTS_WITH:
            check_recorded(self.path, name, (self.path / name).read_bytes())

    def manifest(self) -> Manifest:
        """Return the manifest.

        Raises ConfigError when it is missing, damaged or of another version.
        """
        return Manifest.from_json(self.read_json(MANIFEST))

    def write_result(self, result: Result) -> None:
        """Write result.json, and its digest to SHA256SUMS."""
        record(self.path, {RESULT: self.write_json(RESULT, result.to_json())})

    def result(self) -> Result | None:
        """Return the result; None where there is no result.json.

        Raises ConfigError when it is damaged.
        """
        raw = self.result_json()
        try:
            return None if raw is None else Result.from_json(raw)
        except ValueError as error:
            raise self._unreadable(RESULT, error) from None

    def result_json(self) -> Any:
        """Return the content of result.json, of any version; None without the file.

        Raises ConfigError when it is damaged.
        """
        if not (self.path / RESULT).exists():
            return None
        return self.read_json(RESULT, "restore it, or write it again with run --resume")

    def commit(
        self, parts: Sequence[Totals], rounds: Sequence[FinishedRound], gradient_sha256: str | None = None
    ) -> list[FinishedRound]:
        """Make rounds count, all or none: write their sums, then their lines.

        Returns the lines as they are on disk.

        Args:
            parts: sums of each round.
            rounds: their lines, without `group` and `sha256`.
            gradient_sha256: digest of the file of the gradient through the last of them, which is on disk already.
        """
        group, lines = (rounds[0].round, rounds[-1].round), []
        for entry, totals in zip(rounds, parts, strict=True):
            name = _totals_name(entry.round)
            digests = {name: hashlib.sha256(self.write_json(f"state/{name}", totals.to_json())).hexdigest()}
            if entry.round == group[1] and gradient_sha256 is not None:
                digests[state_name(entry.round + 1)] = gradient_sha256
            lines.append(replace(entry, group=group, sha256=digests))
        self._rounds.append(lines)
        return lines

    def finished_rounds(self) -> list[FinishedRound]:
        """Return the finished rounds.

        Raises ConfigError, naming the line, where rounds.jsonl is damaged.
        """
        return self._rounds.read()

    def beta(self, version: int | None = None) -> Beta:
        """Return the global fit of a version; None: the last.

        Raises MissingError naming the versions there are.
        """
        fits = {entry.fit.version: entry.fit for entry in self.finished_rounds() if entry.fit.version}
        version = max(fits, default=None) if version is None else version
        if version is None or version not in fits:
            there = f"there are versions {min(fits)} to {max(fits)}" if fits else "no finished round holds one"
            raise MissingError(bad_value("version", version, there))
        return fits[version]

    def committed_rounds(self) -> list[FinishedRound]:
        """Return the finished rounds that a run continues from.

        Raises ConfigError, naming the file, when rounds.jsonl is damaged, or ends before the gradient in `state/`.
        """
        rounds = self.finished_rounds()
        there = sorted(path.name for path in self.state.glob(STATES))
        own = state_name(len(rounds))
        # The state at a window's start is older than that of the last round, so the oldest one says nothing.
        if rounds and there and own not in there and own < there[-1]:
            lost = f"rounds.jsonl ends with round {len(rounds) - 1}, and state/ has the gradient of a later round"
            raise ConfigError(bad_value(self._field, str(self.path), f"{lost}: {RESTORE}"))
        return rounds

    def gradient_digests(self) -> dict[int, str]:
        """Return the recorded digests of the gradient's files, by rounds summed."""
        digests = {entry.round + 1: entry.sha256.get(state_name(entry.round + 1)) for entry in self.finished_rounds()}
        return {rounds: digest for rounds, digest in digests.items() if digest is not None}

    def gradient_window(self) -> int:
        """Return the rounds before the window of the last commit."""
        return next((entry.gradient_window or 0 for entry in reversed(self.finished_rounds())), 0)

    def restore(self, rounds: int) -> list[Totals]:
        """Return the totals of each of the first `rounds` finished rounds.

        Raises ConfigError when a file of theirs is missing or damaged.
        """
        return [self._totals(entry) for entry in self.finished_rounds()[:rounds]]

    def _totals(self, entry: FinishedRound) -> Totals:
        name = _totals_name(entry.round)
        try:
            data = (self.state / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != entry.sha256.get(name):
                raise ValueError("its sha256 is not the one in rounds.jsonl")
            return Totals.from_json(json.loads(data))
        except KeyError as missing:
            remedy = f"{name} has no {missing}: another ray_probe wrote it; resume with that one, or start a new run"
            raise ConfigError(bad_value(self._field, str(self.path), remedy)) from None
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from None

    def _unreadable(self, name: str, error: Exception) -> ConfigError:
        remedy = f"{name} cannot be read ({error}), {RESTORE}"
        return ConfigError(bad_value(self._field, str(self.path), remedy))


def _totals_name(number: int) -> str:
    return f"round-{number:06d}.json"
