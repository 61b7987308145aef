"""Digests of the files that a run or a service reads back, to refuse damage.

    SHA256SUMS      lists the complete files of a directory; `sha256sum -c SHA256SUMS` checks them too
    chained lines   JSON lines, each with a CRC-32 of itself and all lines before it
    sealed JSON     a small file that is often replaced; its last member is the sha256 of the text before

They need the standard library alone.
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
    """Add the digests of these files to the directory's SHA256SUMS.

    Raises OutputError when it cannot be written, ConfigError when it is damaged.
    """
    sums = (recorded(directory) or {}) | {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    write_atomically(directory / SUMS, _listed(sums).encode())


def recorded(directory: Path) -> dict[str, str] | None:
    """Returns SHA256SUMS by file name; None without one. Raises ConfigError."""
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
    """Raises ConfigError for a file that does not match SHA256SUMS, if there is one."""
    sums = recorded(directory)
    if sums is None:
        return
    if name not in sums:
        raise ConfigError(f"{directory / name}: {SUMS} beside it does not list it and must be damaged; {remedy}")
    if sums[name] != hashlib.sha256(data).hexdigest():
        why = f"is damaged or was edited: it does not match {SUMS} beside it"
        raise ConfigError(f"{directory / name}: {why}; {remedy}")


def chained(text: str, chain: int) -> tuple[bytes, int]:
    """Returns the line of a JSON object's text, and the CRC of the chain so far.

    Args:
        text: the object.
        chain: CRC of the lines before; 0: none.
    """
    body = text.encode()[:-1]
    crc = zlib.crc32(body, chain)
    return body + (_CRC % crc).encode(), crc


def unchained(line: bytes, chain: int) -> tuple[dict[str, Any], int]:
    """Returns the object of a line, and the CRC of the chain so far.

    Raises ValueError for a line that is changed, cut, moved, or of another file.
    """
    body, end = line[:-_CRC_BYTES], line[-_CRC_BYTES:]
    if not end.startswith(b',"crc":"'):
        raise ValueError("it has no checksum")
    crc = zlib.crc32(body, chain)
    if end != (_CRC % crc).encode():
        raise ValueError("its checksum does not fit")
    return dict(json.loads(body + b"}")), crc


def lost_its_end(tail: bytes, chain: int) -> bool:
    """Returns whether the last bytes of a file are a line with a damaged line break.

    An interrupted write leaves the beginning of a line, and no byte in the place of the line break.
    """
    try:
        unchained(tail[:-1] + b"\n", chain)
    except ValueError:
        return False
    return True


def sealed(value: Mapping[str, Any]) -> bytes:
    """Returns JSON text whose last member is the sha256 of the text before."""
    body = json.dumps(value, indent=1, allow_nan=False).encode()[:-2]
    return body + (_SEAL % hashlib.sha256(body).hexdigest()).encode()


def unsealed(data: bytes) -> dict[str, Any]:
    """Returns the object of sealed text. Raises ValueError for any other text."""
    body = data[:-_SEAL_BYTES]
    if data[-_SEAL_BYTES:] != (_SEAL % hashlib.sha256(body).hexdigest()).encode():
        raise ValueError("it is damaged or was edited: its sha256 does not fit")
    return dict(json.loads(body + b"\n}"))


class FileDigest:
    """The sha256 of a file that is written or read in pieces.

    A thread hashes while the caller continues; at most two pieces are held.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._reached = 0
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def take(self, offset: int, piece: bytes | memoryview) -> None:
        """Hash the next piece of the file; `finish` reads pieces that come out of order."""
        if offset == self._reached:
            self._reached += memoryview(piece).nbytes
            self._wait()
            self._pending = self._thread.submit(self._sha256.update, piece)

    def finish(self, path: Path) -> str:
        """Returns the sha256 of the whole file, hexadecimal."""
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
    """Returns the sha256 of a file, hexadecimal. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
