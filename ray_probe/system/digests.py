"""Digests of the files that a run or a service reads back, so that damage is refused by the file's name.

    SHA256SUMS      of the files of a directory that are written whole: `sha256sum -c SHA256SUMS` checks them too
    chained lines   JSON lines, each with a CRC-32 of itself and of all lines before it
    sealed JSON     a small file that is often replaced: its last member is the sha256 of the text before

Standard library only.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray_probe.errors import ConfigError
from ray_probe.system.files import write_atomically

SUMS = "SHA256SUMS"
RESTORE = "restore it or start a new run"
PIECE_BYTES = 2**17
_CRC = ',"crc":"%08x"}\n'
_CRC_BYTES = len(_CRC % 0)
_SEAL = ',\n "sha256": "%s"\n}\n'
_SEAL_BYTES = len(_SEAL % (64 * "0"))


def record(directory: Path, files: Mapping[str, bytes]) -> None:
    """Put the digests of these files of the directory on record, beside those that are there.

    Raises OutputError when the record cannot be written, ConfigError when it cannot be read.
    """
    sums = (recorded(directory) or {}) | {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    write_atomically(directory / SUMS, _listed(sums).encode())


def recorded(directory: Path) -> dict[str, str] | None:
    """Digests by file name; None where the directory has no record of them. Raises ConfigError when it is damaged."""
    path = directory / SUMS
    try:
        text = path.read_bytes().decode("ascii")
        sums = {name: digest for digest, name in (line.split("  ") for line in text.splitlines())}
        if text != _listed(sums):
            raise ValueError("it is not as it was written")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); {RESTORE}") from None
    return sums


def _listed(sums: Mapping[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def check_recorded(directory: Path, name: str, data: bytes, remedy: str = RESTORE) -> None:
    """Refuse a file whose bytes are not those on record; a directory without any record says nothing.

    Raises ConfigError naming the file.
    """
    sums = recorded(directory)
    if sums is None:
        return
    if name not in sums:
        raise ConfigError(f"{directory / name}: {SUMS} beside it does not list it and must be damaged; {remedy}")
    if sums[name] != hashlib.sha256(data).hexdigest():
        why = f"is damaged or was edited: it does not match {SUMS} beside it"
        raise ConfigError(f"{directory / name}: {why}; {remedy}")


def chained(text: str, chain: int) -> tuple[bytes, int]:
    """A line of a JSON object's text with its CRC, and the CRC that the next line continues from (0: the first)."""
    body = text.encode()[:-1]
    crc = zlib.crc32(body, chain)
    return body + (_CRC % crc).encode(), crc


def unchained(line: bytes, chain: int) -> tuple[dict[str, Any], int]:
    """Inverse of `chained`: the object, and the CRC that the next line continues from.

    Raises ValueError for a line that is changed, missing its end, moved, or of another file.
    """
    body, end = line[:-_CRC_BYTES], line[-_CRC_BYTES:]
    if not end.startswith(b',"crc":"'):
        raise ValueError("it has no checksum")
    crc = zlib.crc32(body, chain)
    if end != (_CRC % crc).encode():
        raise ValueError("its checksum does not fit")
    return dict(json.loads(body + b"}")), crc


def lost_its_end(tail: bytes, chain: int) -> bool:
    """Whether bytes after the last line break are a whole line whose line break was damaged.

    A write that was cut off leaves the beginning of a line, and never a byte in the place of its line break.
    """
    try:
        unchained(tail[:-1] + b"\n", chain)
    except ValueError:
        return False
    return True


def sealed(value: Mapping[str, Any]) -> bytes:
    """The text of a JSON object with one more member, the sha256 of the text before it."""
    body = json.dumps(value, indent=1, allow_nan=False).encode()[:-2]
    return body + (_SEAL % hashlib.sha256(body).hexdigest()).encode()


def unsealed(data: bytes) -> dict[str, Any]:
    """Inverse of `sealed`. Raises ValueError for text that is changed, cut short, or was never sealed."""
    body = data[:-_SEAL_BYTES]
    if data[-_SEAL_BYTES:] != (_SEAL % hashlib.sha256(body).hexdigest()).encode():
        raise ValueError("it is damaged or was edited: its sha256 does not fit")
    return dict(json.loads(body + b"\n}"))


class FileDigest:
    """The sha256 of a file that is written or read in pieces.

    A thread hashes pieces in order while the caller continues; at most two of them are held.

    Args:
        head: the first bytes of the file.
    """

    def __init__(self, head: bytes = b"") -> None:
        self._sha256 = hashlib.sha256(head)
        self._reached = len(head)
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def take(self, offset: int, piece: bytes | memoryview) -> None:
        """Hash bytes of the file; a piece that is not the next one is left to `finish`, which reads it."""
        if offset == self._reached:
            self._reached += memoryview(piece).nbytes
            self._wait()
            self._pending = self._thread.submit(self._sha256.update, piece)

    def finish(self, path: Path) -> str:
        """The digest, hexadecimal, of the whole file; what was not taken in order is read from it."""
        self._wait()
        self._thread.shutdown()
        if path.stat().st_size > self._reached:
            with path.open("rb") as stream:
                stream.seek(self._reached)
                while piece := stream.read(PIECE_BYTES):
                    self._sha256.update(piece)
        return self._sha256.hexdigest()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()


def sha256_of(path: Path) -> str:
    """Sha256 of a file, hexadecimal. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
