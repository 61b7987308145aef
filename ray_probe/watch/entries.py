"""The checkpoints of a watched series, kept in a file that a restart goes on from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ray_probe.errors import ConfigError
from ray_probe.system.digests import sealed, unsealed
from ray_probe.system.files import write_atomically
from ray_probe.system.json_object import JsonObject

STATE_FILE = "watch.json"
SCHEMA_VERSION = 1
ITS_TURN = "its turn"
WatchState = Literal["queued", "measured", "waiting", "needs conversion", "skipped", "vanished"]


@dataclass(frozen=True)
class Entry(JsonObject):
    """One checkpoint of a series.

    Attributes:
        key: directory of the checkpoint, by the name that its trainer gives it at last.
        state: queued, measured, waiting, needs conversion, skipped or vanished.
        why: what it waits for, the command of a conversion, why it is skipped; else a remark or nothing.
        step: of the trainer; None where it is not known.
        layout: how its trainer writes it.
        tags: of the trainer's request.
        seen: digest of the directory when it was pinned.
        stamp: digest over names, sizes and times of the measured files; empty before they were pinned.
        fingerprint: sha256 over names and bytes of the measured files; empty before it was computed.
        pin: directory that holds the pinned files, or None.
        model: directory that is measured: the pinned model, or the base of an adapter.
        adapter: directory of the pinned adapter, or None.
        place: in the series, from 0; None: it is not in the series.
        before: number of the entry that it is compared with, or None.
        comparison: id of the comparison with the checkpoint before, or None.
        gradient: id of the measurement of the gradient, or None.
        run: run directory that keeps its responses for the next comparison, or None.
        chosen: an option of the watch leaves it out.
        code: highest exit code of its measurements.
    """

    key: str
    state: WatchState
    why: str = ""
    step: int | None = None
    layout: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    seen: str = ""
    stamp: str = ""
    fingerprint: str = ""
    pin: str | None = None
    model: str | None = None
    adapter: str | None = None
    place: int | None = None
    before: int | None = None
    comparison: str | None = None
    gradient: str | None = None
    run: str | None = None
    chosen: bool = False
    code: int = 0

    @property
    def name(self) -> str:
        """Name of its directory."""
        return Path(self.key).name

    @property
    def measurements(self) -> tuple[str, ...]:
        """Ids of its measurements, in the order of the queue."""
        return tuple(identity for identity in (self.comparison, self.gradient) if identity is not None)


@dataclass(frozen=True)
class _File(JsonObject):
    """The content of the state file."""

    schema_version: int
    series: str
    service: str
    entries: tuple[Entry, ...]
    others: tuple[Entry, ...] = ()


class Entries:
    """The entries of a series: those that were pinned or left out, and the others.

    Args:
        directory: of the watch's files.
        series: name of the series.
        service: directory of the service that measures it; ids of another service mean nothing to it.

    Raises:
        ConfigError: the file cannot be read.
    """

    def __init__(self, directory: Path, series: str, service: str) -> None:
        self.path, self.series, self.service = directory / STATE_FILE, series, service
        self.items: list[Entry] = self._restored()
        self.others: dict[str, Entry] = {}
        self._written = b""

    def add(self, entry: Entry) -> int:
        """Append an entry; returns its number."""
        self.others.pop(entry.key, None)
        self.items.append(entry)
        return len(self.items) - 1

    def change(self, number: int, **fields: Any) -> Entry:
        """Replace fields of an entry; returns the new one."""
        self.items[number] = changed = replace(self.items[number], **fields)
        return changed

    def newest(self, key: str) -> int | None:
        """Return the number of the newest entry of a directory; None without one."""
        return next((n for n in range(len(self.items) - 1, -1, -1) if self.items[n].key == key), None)

    def with_stamp(self, stamp: str) -> int | None:
        """Return the number of an entry with these files, by names, sizes and times."""
        return next((n for n, entry in enumerate(self.items) if entry.stamp == stamp), None)

    def with_bytes(self, fingerprint: str, below: int) -> int | None:
        """Return the number of an entry before another that has the same bytes."""
        return next((n for n, entry in enumerate(self.items[:below]) if entry.fingerprint == fingerprint), None)

    @property
    def last(self) -> int | None:
        """Number of the last entry in the series, with which the next one is compared."""
        placed = [number for number, entry in enumerate(self.items) if entry.place is not None]
        return max(placed, key=lambda number: self.items[number].place or 0, default=None)

    def save(self) -> None:
        """Write the file where something has changed. Raises OutputError."""
        others = tuple(sorted(self.others.values(), key=lambda entry: entry.key))
        whole = _File(SCHEMA_VERSION, self.series, self.service, tuple(self.items), others)
        data = sealed(whole.to_json())
        if data != self._written:
            write_atomically(self.path, data)
            self._written = data

    def _restored(self) -> list[Entry]:
        if not self.path.exists():
            return []
        try:
            found = _File.from_json(unsealed(self.path.read_bytes()))
            if found.schema_version != SCHEMA_VERSION:
                raise ValueError(f"schema_version {found.schema_version}, need {SCHEMA_VERSION}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            remedy = "restore it, or move it away to queue every checkpoint that is there"
            raise ConfigError(f"{self.path}: cannot be read ({error}); {remedy}") from None
        if found.service == self.service:
            return list(found.entries)
        return [_of_another_service(entry) for entry in found.entries]


def _of_another_service(entry: Entry) -> Entry:
    """Return an entry without the open measurements of another service."""
    if entry.state != "queued":
        return replace(entry, run=None)
    entry = replace(entry, comparison=None, gradient=None, run=None, place=None, before=None)
    if entry.pin is None:  # the next look finds it, if it is still there
        return replace(entry, state="skipped", why="another service had it", seen="", stamp="", fingerprint="")
    return replace(entry, state="waiting", why=ITS_TURN)
