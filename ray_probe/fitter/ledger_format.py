"""Entries of a ledger, and their lines. numpy only.

A line is a JSON object whose last field, `crc`, is the CRC-32 of this line and all earlier ones, checksums apart. A
line that is changed, missing, moved or of another ledger does not fit.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_probe.core.arrays import Array
from ray_probe.system.digests import chained


def digest_of(packed: Array) -> str:
    """Returns the sha256 of a packed record's bytes, hexadecimal."""
    return hashlib.sha256(_bytes_of(packed)).hexdigest()


@dataclass(frozen=True, eq=False)
class Accepted:
    """A shard's record was accepted: its bytes, their sha256, and its device."""

    round: int
    shard: int
    sha256: str
    made_on: str
    packed: Array


@dataclass(frozen=True)
class Closed:
    """A round was fitted on these shards; rounds before `since` were committed."""

    round: int
    shards: tuple[int, ...]
    since: int


@dataclass(frozen=True)
class Opened:
    """The ledger was reopened, rounds from `round` too; `torn_bytes` were cut off."""

    round: int
    torn_bytes: int


@dataclass(frozen=True)
class Different:
    """A shard was delivered with other bytes, of this sha256, from this device."""

    round: int
    shard: int
    sha256: str
    made_on: str


Entry = Accepted | Closed | Opened | Different


def encode(kind: str, fields: Mapping[str, Any], chain: int) -> tuple[bytes, int]:
    """Returns the line of an entry, and the CRC that the next line continues from."""
    return chained(json.dumps({"entry": kind, **fields}, separators=(",", ":"), allow_nan=False), chain)


def line_of(entry: Entry, chain: int) -> tuple[bytes, int]:
    """Returns the line of an entry, and the CRC that the next line continues from."""
    if isinstance(entry, Accepted):
        packed = base64.b64encode(_bytes_of(entry.packed)).decode()
        return encode("record", vars(entry) | {"packed": packed}, chain)
    return encode(type(entry).__name__.lower(), vars(entry), chain)


def entry_of(fields: Mapping[str, Any]) -> Entry:
    """Returns the entry of a line's fields.

    Raises ValueError, KeyError or TypeError when they are not one.
    """
    rest = dict(fields)
    kind = rest.pop("entry")
    if kind == "record":
        packed = np.frombuffer(base64.b64decode(rest["packed"], validate=True), "<f8").astype(np.float64)
        require(digest_of(packed) == rest["sha256"])
        return Accepted(**(rest | {"packed": packed}))
    if kind == "closed":
        return Closed(**(rest | {"shards": tuple(rest["shards"])}))
    require(kind in ("opened", "different"))
    return Opened(**rest) if kind == "opened" else Different(**rest)


def require(holds: bool) -> None:
    """Raises ValueError unless the condition of a valid ledger holds."""
    if not holds:
        raise ValueError


def _bytes_of(packed: Array) -> bytes:
    return packed.astype("<f8", copy=False).tobytes()
