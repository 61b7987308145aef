"""The open file of a ledger, for the fitter that writes to it.

Entries are on disk when `append` returns; entries of one call share an fsync. What cannot be written completely is cut
off again.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ray_probe.errors import OutputError
from ray_probe.fitter.ledger import FORMAT, Contents, read_descriptor
from ray_probe.fitter.ledger_format import Accepted, Different, Entry, Opened, encode, line_of
from ray_probe.system.failpoints import fail_at
from ray_probe.system.files import locked, sync_directory, unwritable

LOCK_WAIT_S = 10.0


class LedgerFile:
    """A ledger that is open; call `read`, then `begin`, then `append`.

    The last fitter that opened the ledger writes to it. An earlier one notices by the file's size, and refuses.

    Args:
        path: the file; created (0600) when missing.
        origin: what records must belong to, by name; plain JSON types.

    Raises:
        OutputError: it cannot be opened.
    """

    def __init__(self, path: Path, origin: Mapping[str, Any]) -> None:
        self._path = path
        self._origin = dict(origin)
        self._refuses: str | None = None
        self._closed = False
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise OutputError(f"{path}: cannot be opened ({error.strerror}); it must be a plain file") from None

    def read(self) -> Contents:
        """Returns the contents, torn bytes at the end counted. Changes nothing.

        Raises:
            LedgerError: it is damaged, or belongs to another run.
        """
        with self._alone():
            contents, self._chain, self._whole = read_descriptor(self._descriptor, self._path, self._origin)
            self._size = os.fstat(self._descriptor).st_size
        contents.torn_bytes += self.torn_bytes
        return contents

    @property
    def torn_bytes(self) -> int:
        """Bytes at the end that `read` has found and `begin` cuts off."""
        return self._size - self._whole

    def begin(self, round_number: int) -> None:
        """Start to write after the entries read, with rounds from `round_number` open.

        Raises:
            OutputError: the entry cannot be written, or another fitter has opened the ledger.
        """
        torn_bytes = self.torn_bytes
        with self._alone():
            self._check_alone()
            self._cut_off()
            if self._whole:  # the fsync also brings to disk what a dead process may have left in memory only
                self._write(*line_of(Opened(round_number, torn_bytes), self._chain))
            else:
                self._write(*encode("header", {"format": FORMAT, **self._origin, "id": os.urandom(8).hex()}, 0))
            try:
                sync_directory(self._path.parent)
            except OSError as error:
                raise self._unwritable(error) from None

    def append(self, *entries: Entry) -> None:
        """Write entries with one fsync; they are on disk on return.

        Raises:
            OutputError: they cannot be written, and none stays; or another fitter writes to this ledger now.
        """
        text, chain, starts = b"", self._chain, list[tuple[str, str, int]]()
        for entry in entries:
            line, chain = line_of(entry, chain)
            starts.append((*_place_of(entry), len(text) + len(line) // 2))
            text += line
        for place, detail, _ in starts:
            fail_at(f"{place}_before_write", detail)
        with self._alone():
            self._check_alone()
            for place, detail, torn in starts:
                fail_at(f"{place}_torn", detail, partial(os.write, self._descriptor, text[:torn]))
            self._write(text, chain)
        for place, detail, _ in starts:
            fail_at(f"{place}_after_fsync", detail)

    def close(self) -> None:
        """Close the file; further calls but this one raise OutputError."""
        if not self._closed:
            self._closed = True
            self._refuses = f"{self._path}: was closed"
            os.close(self._descriptor)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Locks the file for the block. Raises OutputError when it stays locked."""
        if self._refuses is not None:
            raise OutputError(self._refuses)
        if not locked(self._descriptor, LOCK_WAIT_S):
            raise OutputError(f"{self._path}: another process has held it for {LOCK_WAIT_S:g} s; end that first")
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _check_alone(self) -> None:
        """Refuse a file that another process has changed or removed."""
        status = os.fstat(self._descriptor)
        if status.st_nlink == 0:
            self._refuses = f"{self._path}: was removed while it was in use; restore it or start a new run"
        elif status.st_size != self._size:
            self._refuses = f"{self._path}: another fitter writes to it now; this one takes nothing more"
        if self._refuses is not None:
            raise OutputError(self._refuses)

    def _write(self, line: bytes, chain: int) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self._cut_off()
            raise self._unwritable(error) from None
        try:
            os.fsync(self._descriptor)
        except OSError as error:  # a later fsync may succeed and still not have these bytes on disk: no more writes
            self._refuses = str(self._unwritable(error))
            with contextlib.suppress(OutputError):
                self._cut_off()
            raise OutputError(self._refuses) from None
        self._chain = chain
        self._whole = self._size = self._size + len(line)

    def _cut_off(self) -> None:
        """Remove an incomplete line: the next one must not continue it."""
        try:
            os.ftruncate(self._descriptor, self._whole)
        except OSError as error:
            self._refuses = str(self._unwritable(error))
            raise OutputError(self._refuses) from None
        self._size = self._whole

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(unwritable(self._path, error))


def _place_of(entry: Entry) -> tuple[str, str]:
    """Returns the prefix and the detail of the failpoints around an entry."""
    if isinstance(entry, Accepted | Different):
        return "fit" if isinstance(entry, Accepted) else "different", f"{entry.round}/{entry.shard}"
    return "close", str(entry.round)
