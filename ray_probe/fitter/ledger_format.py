"""What a ledger says, line by line: its entries, their text, and what holds after them. numpy only.

A line is a JSON object whose last field, `crc`, is the CRC-32 of every byte before it in this line and of all earlier
lines': a line that is changed, missing, moved or of another ledger does not fit.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ray_probe.core.arrays import Array
from ray_probe.run.messages import ShardKey
from ray_probe.system.digests import chained


def digest_of(packed: Array) -> str:
    """sha256 of a packed record's bytes, hexadecimal."""
    return hashlib.sha256(_bytes_of(packed)).hexdigest()


@dataclass(frozen=True, eq=False)
class Accepted:
    """A shard's record was accepted: its place in the plan, its packed vector, the digest of that, who made it."""

    round: int
    shard: int
    sha256: str
    made_on: str
    packed: Array


@dataclass(frozen=True)
class Closed:
    """A round was fitted on the records of these shards, ascending; the rounds before `since` were committed then."""

    round: int
    shards: tuple[int, ...]
    since: int


@dataclass(frozen=True)
class Opened:
    """The ledger was opened again: rounds from `round` on are open, and so many torn bytes were cut off."""

    round: int
    torn_bytes: int


@dataclass(frozen=True)
class Different:
    """A shard came again with other bytes, of this sha256, made on another device or the same."""

    round: int
    shard: int
    sha256: str
    made_on: str


Entry = Accepted | Closed | Opened | Different


@dataclass
class Contents:
    """What holds after the entries so far.

    Attributes:
        records: what each shard has sent, the first time.
        closed: the rounds that are closed, from round 0 on.
        different: shards that came again with other bytes, and the sha256 of those.
        torn_bytes: bytes that were cut off.
        openings: how often the ledger was opened, by the one who made it first.
        committed: rounds that were committed when the last round was closed; those after may be too.
    """

    records: dict[ShardKey, Accepted] = field(default_factory=dict)
    closed: list[Closed] = field(default_factory=list)
    different: set[Different] = field(default_factory=set)
    torn_bytes: int = 0
    openings: int = 0
    committed: int = 0

    def add(self, entry: Entry) -> None:
        """Take in the next entry. Raises ValueError for one that cannot stand here."""
        if isinstance(entry, Accepted):
            key = entry.round, entry.shard
            _require(key not in self.records and entry.round == len(self.closed))
            self.records[key] = entry
        elif isinstance(entry, Closed):
            _require(entry.round == len(self.closed) and 0 <= entry.since <= entry.round)
            _require(all((entry.round, shard) in self.records for shard in entry.shards))
            self.closed.append(entry)
            self.committed = max(self.committed, entry.since)
        elif isinstance(entry, Opened):
            _require(0 <= entry.round <= len(self.closed))
            del self.closed[entry.round :]
            self.torn_bytes += entry.torn_bytes
            self.openings += 1
        else:
            _require((entry.round, entry.shard) in self.records)
            self.different.add(entry)


def encode(kind: str, fields: Mapping[str, Any], chain: int) -> tuple[bytes, int]:
    """The line of an entry, and the CRC that the next one goes on from."""
    return chained(json.dumps({"entry": kind, **fields}, separators=(",", ":"), allow_nan=False), chain)


def line_of(entry: Entry, chain: int) -> tuple[bytes, int]:
    """The line of an entry, and the CRC that the next one goes on from."""
    if isinstance(entry, Accepted):
        packed = base64.b64encode(_bytes_of(entry.packed)).decode()
        place = {"round": entry.round, "shard": entry.shard, "sha256": entry.sha256, "made_on": entry.made_on}
        return encode("record", {**place, "packed": packed}, chain)
    return encode(type(entry).__name__.lower(), vars(entry), chain)


def entry_of(fields: Mapping[str, Any]) -> Entry:
    """The entry that a line's fields say. Raises ValueError, KeyError or TypeError when they say none."""
    rest = dict(fields)
    kind = rest.pop("entry")
    if kind == "record":
        packed = np.frombuffer(base64.b64decode(rest["packed"], validate=True), "<f8").astype(np.float64)
        _require(digest_of(packed) == rest["sha256"])
        return Accepted(**(rest | {"packed": packed}))
    if kind == "closed":
        return Closed(**(rest | {"shards": tuple(rest["shards"])}))
    _require(kind in ("opened", "different"))
    return Opened(**rest) if kind == "opened" else Different(**rest)


def _bytes_of(packed: Array) -> bytes:
    return packed.astype("<f8", copy=False).tobytes()


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError
