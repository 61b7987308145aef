"""The ledger of accepted shard records: appended and fsynced before a record is acknowledged. numpy only.

One JSON object a line: round, shard, the packed record in base64 and a CRC of all three.
"""

import base64
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ray_probe.errors import RecordError


@dataclass(frozen=True, eq=False)
class Entry:
    """One accepted record: where it belongs in the plan, and its packed float64 vector."""

    round: int
    shard: int
    packed: npt.NDArray[np.float64]


def _checksum(round_number: int, shard: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(f"{round_number}/{shard}/".encode()))


def _encode(entry: Entry) -> bytes:
    payload = base64.b64encode(entry.packed.astype("<f8").tobytes())
    crc = _checksum(entry.round, entry.shard, payload)
    line = {"round": entry.round, "shard": entry.shard, "record": payload.decode(), "crc": crc}
    return json.dumps(line).encode() + b"\n"


def _decode(line: bytes, where: str) -> Entry:
    try:
        raw = json.loads(line)
        payload = raw["record"].encode()
        if _checksum(raw["round"], raw["shard"], payload) != raw["crc"]:
            raise ValueError("checksum")
        packed = np.frombuffer(base64.b64decode(payload), "<f8").astype(np.float64)
        return Entry(raw["round"], raw["shard"], packed)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RecordError(f"{where}: the ledger is damaged here; restore the file or start a new run") from None


class Ledger:
    """Append-only file of accepted records, owned by the fitter."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)

    def append(self, entry: Entry) -> None:
        """Write one record; on return it is on disk. Raises RecordError when it is not: nothing of it stays then."""
        line = _encode(entry)
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            if written != len(line):
                raise OSError(f"{written} of {len(line)} bytes were written")
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, size)  # the next record must not go on in a torn line
            raise RecordError(f"{self._path}: cannot be written ({error}); is the disk full?") from None

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def read_ledger(path: Path) -> list[Entry]:
    """All records in the file, in order, none without a file; a torn last line was never acknowledged: left out.

    Raises RecordError, naming the line, for damage before the end.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [_decode(line, f"{path.name} line {number}") for number, line in enumerate(lines[:-1], start=1)]


def rewrite_ledger(path: Path, entries: Iterable[Entry]) -> None:
    """Replace the file, atomically, by these records."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        stream.writelines(_encode(entry) for entry in entries)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.chmod(0o600)
    temporary.replace(path)
