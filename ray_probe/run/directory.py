"""What a run leaves on disk, and what a resumed run reads back (spec section 9).

Rounds are finished when their lines stand in rounds.jsonl: their gradient and their sums were written before. Rounds
that were committed together (`group` in their lines) are finished together.

Nothing is read back unchecked: each line has a checksum and holds the sha256 of its round's files in `state/`, and
SHA256SUMS lists the files that are written whole (see `ray_probe.system.digests`).
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray_probe.errors import ConfigError, OutputError, bad_value
from ray_probe.gradient.state_file import STATES, state_name
from ray_probe.run.totals import Totals
from ray_probe.system.digests import RESTORE, SUMS, chained, check_recorded, lost_its_end, record, unchained
from ray_probe.system.files import WAIT, held, write_atomically, writing

RESULT = "result.json"
STARTS_WITH = ("config.yaml", "manifest.json")


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
        self._chain: int | None = None  # checksum that the next line continues from; None: it is read first

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
            written = {file: text.encode() for file, text in (files or {}).items()}
            for file, data in written.items():
                write_atomically(part / file, data)
            if written:
                record(part, written)
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
        """Hold the directory for the block, against any other driver (see `ray_probe.system.files.held`).

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
        """Open the directory of an earlier run. Raises ConfigError when it is none, or lacks a file of its start."""
        missing = [name for name in STARTS_WITH if not (path / name).is_file()]
        if missing == list(STARTS_WITH):
            remedy = f"need the directory of a run, with {' and '.join(STARTS_WITH)} in it"
            raise ConfigError(bad_value("--resume", str(path), remedy))
        if missing:
            raise ConfigError(bad_value("--resume", str(path), f"{missing[0]} is missing, {RESTORE}"))
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

    def write_json(self, name: str, value: Mapping[str, Any]) -> bytes:
        """Write one JSON file, atomically; NaN is refused. Returns its bytes."""
        data = as_json(value).encode()
        write_atomically(self.path / name, data)
        return data

    def read_json(self, name: str, remedy: str = RESTORE) -> dict[str, Any]:
        """Read one JSON file of the run. Raises ConfigError when it is missing or damaged."""
        try:
            data = (self.path / name).read_bytes()
            check_recorded(self.path, name, data, remedy)
            value: dict[str, Any] = json.loads(data)
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from None
        return value

    def check_start(self) -> None:
        """Refuse config.yaml or manifest.json where it is not as the run has written it.

        Raises ConfigError naming the file.
        """
        if not (self.path / SUMS).is_file():
            remedy = f"{SUMS} is missing (ray_probe 0.1.1 and before wrote none), {RESTORE}"
            raise ConfigError(bad_value(self._field, str(self.path), remedy))
        for name in STARTS_WITH:
            check_recorded(self.path, name, (self.path / name).read_bytes())

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json, and put its digest on record."""
        record(self.path, {RESULT: self.write_json(RESULT, result)})

    def result(self) -> dict[str, Any] | None:
        """The object of result.json; None where there is none. Raises ConfigError when it is damaged."""
        if not (self.path / RESULT).exists():
            return None
        return self.read_json(RESULT, "restore it, or write it again with run --resume")

    def commit(
        self, parts: Sequence[Totals], lines: Sequence[dict[str, Any]], gradient_sha256: str | None = None
    ) -> None:
        """Make rounds count, all or none: their sums first, then their lines in rounds.jsonl.

        The gradient through the last of them is on disk already; `gradient_sha256` is the digest of its file.
        """
        group, chain, text = [lines[0]["round"], lines[-1]["round"]], self._chain, b""
        whole = None
        if chain is None:
            whole, _, chain = self._whole_lines()
        for line, totals in zip(lines, parts, strict=True):
            number = line["round"]
            name = _totals_name(number)
            digests = {name: hashlib.sha256(self.write_json(f"state/{name}", totals.to_json())).hexdigest()}
            if number == group[1] and gradient_sha256 is not None:
                digests[state_name(number + 1)] = gradient_sha256
            about = json.dumps(line | {"group": group, "sha256": digests}, allow_nan=False)
            data, chain = chained(about, chain)
            text += data
        path = self.path / "rounds.jsonl"
        with writing(path), path.open("ab") as stream:
            if whole is not None:  # a crash may have left lines that were never finished
                stream.truncate(whole)
            self._chain = None
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        self._chain = chain

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

    def committed_rounds(self) -> list[dict[str, Any]]:
        """The lines of the finished rounds that a run continues from: `finished_rounds`, compared with `state/`.

        Raises ConfigError, naming the file, when rounds.jsonl is damaged, or has lost its last lines.
        """
        lines = self.finished_rounds()
        there = sorted(path.name for path in self.state.glob(STATES))
        if lines and there and state_name(len(lines)) < there[0]:
            lost = f"rounds.jsonl ends with round {len(lines) - 1}, and state/ has the gradient of a later round"
            raise ConfigError(bad_value(self._field, str(self.path), f"{lost}: {RESTORE}"))
        return lines

    def gradient_sha256(self, rounds: int) -> str | None:
        """Digest of the gradient's file after so many finished rounds, as their commit has put it on record."""
        if rounds == 0:
            return None
        digest: str | None = self.finished_rounds()[rounds - 1]["sha256"].get(state_name(rounds))
        return digest

    def restore(self, rounds: int) -> list[Totals]:
        """Totals of each finished round. Raises ConfigError when a file of theirs is missing or damaged."""
        return [self._totals(line) for line in self.finished_rounds()[:rounds]]

    def _totals(self, line: Mapping[str, Any]) -> Totals:
        name = _totals_name(line["round"])
        try:
            data = (self.state / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != line["sha256"][name]:
                raise ValueError("its sha256 is not the one in rounds.jsonl")
            return Totals.from_json(json.loads(data))
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from None

    def _whole_lines(self) -> tuple[int, list[dict[str, Any]], int]:
        """What rounds.jsonl holds of finished rounds: bytes, objects, and the checksum that the next line continues.

        Raises ConfigError, naming the line, for damage.
        """
        path = self.path / "rounds.jsonl"
        *texts, tail = path.read_bytes().split(b"\n") if path.exists() else [b""]
        lines, ends, chains = list[dict[str, Any]](), [0], [0]
        for number, text in enumerate(texts, start=1):
            try:
                fields, chain = unchained(text + b"\n", chains[-1])
            except ValueError as error:
                raise self._unreadable(f"{path.name} line {number}", error) from None
            lines.append(fields)
            chains.append(chain)
            ends.append(ends[-1] + len(text) + 1)
        if lost_its_end(tail, chains[-1]):
            raise self._unreadable(f"{path.name} line {len(ends)}", ValueError("its line break is damaged"))
        finished = _finished(lines)
        return ends[finished], lines[:finished], chains[finished]

    def _unreadable(self, name: str, error: Exception) -> ConfigError:
        remedy = f"{name} cannot be read ({error}), {RESTORE}"
        return ConfigError(bad_value(self._field, str(self.path), remedy))


def _finished(lines: Sequence[dict[str, Any]]) -> int:
    """How many of the lines are of groups that are there to the end."""
    if not lines:
        return 0
    first, last = lines[-1]["group"]
    return len(lines) if last == len(lines) - 1 else first


def _totals_name(number: int) -> str:
    """Name of the file in `state/` with the sums of a round."""
    return f"round-{number:06d}.json"
