"""The ledger of accepted records: on disk before a record is acknowledged, and all that the fitter is made of again.

One JSON object a line, in the order in which things happened; what was written whole is never changed:

    header     what the ledger belongs to: run, policy, rule of the baseline, layout of the records; a random id
    record     a shard's record was accepted: round, shard, sha256 of its packed bytes, device, the bytes in base64
    closed     a round was fitted on the records of these shards; the rounds before `since` were committed then
    opened     the ledger was opened again: rounds from `round` on are open, so many torn bytes were cut off
    different  a shard came again with other bytes, of this sha256, from this device; the first record stays

**Damage.** Every line ends in a CRC of itself and all lines before it. One that does not fit is refused, with its
number and the offset of its first byte. Bytes after the last line break are different: a line that was never finished,
so never acknowledged. They are cut off when the ledger is opened, and counted. A whole line with another byte in the
place of its line break is damage.

**Groups.** Rounds that are committed together are closed one by one, so a run that goes on may find rounds closed that
it has not finished. It reopens them: their `closed` no longer holds, as the plan may give up other shards this time,
but their records do. A shard that is collected again is then a duplicate, and counts once.

**Never acknowledged but not written.** A record is acknowledged after fsync; those that come together share one. One
that cannot be written whole is cut off again. After a failing fsync nobody knows what is on disk, whatever the next
fsync says, so this ledger takes nothing more. What a process has written just before it died may lie in memory only:
opening ends with an fsync.

**One writer.** Who opens a ledger writes to it; the one before notices by the file's size, and writes no more.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray_probe.errors import LedgerError, OutputError, bad_value
from ray_probe.fitter.ledger_format import (
    Accepted,
    Closed,
    Contents,
    Different,
    Entry,
    Opened,
    encode,
    entry_of,
    line_of,
)
from ray_probe.system.digests import lost_its_end, unchained
from ray_probe.system.failpoints import fail_at
from ray_probe.system.files import locked, sync_directory, unwritable

FORMAT = 2
HEADER_START = b'{"entry":"header","format":'
LOCK_WAIT_S = 10.0


class Ledger:
    """A ledger that is open, owned by the fitter: `read` it, `begin` to write, then `append`.

    Args:
        path: the file; made (0600) where there is none.
        origin: what records must belong to, by name; plain JSON types.

    Raises:
        OutputError: it cannot be opened.
    """

    def __init__(self, path: Path, origin: Mapping[str, Any]) -> None:
        self._path = path
        self._origin = dict(origin)
        self._refuses: str | None = None
        self._closed = False
        self.sync_s = 0.0
        """Seconds that the last fsync took."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise OutputError(f"{path}: cannot be opened ({error.strerror}); it must be a plain file") from None

    def read(self) -> Contents:
        """What holds now, torn bytes at the end counted; nothing is changed yet.

        Raises:
            LedgerError: it is damaged before its end, or belongs to something else.
        """
        with self._alone():
            contents, self._chain, self._whole = _read(self._descriptor, self._path, self._origin)
            self._size = os.fstat(self._descriptor).st_size
        contents.torn_bytes += self.torn_bytes
        return contents

    @property
    def torn_bytes(self) -> int:
        """Bytes at the end that `read` has found and `begin` cuts off."""
        return self._size - self._whole

    def begin(self, round_number: int) -> None:
        """Start to write to what `read` has found, with rounds from this one on open.

        Raises:
            OutputError: that cannot be written, or another has begun meanwhile.
        """
        torn_bytes = self.torn_bytes
        with self._alone():
            self._check_alone()
            self._cut_off()
            if self._whole:
                self._write(*line_of(Opened(round_number, torn_bytes), self._chain))
            else:
                self._write(*encode("header", {"format": FORMAT, **self._origin, "id": os.urandom(8).hex()}, 0))
            try:
                sync_directory(self._path.parent)
            except OSError as error:
                raise self._unwritable(error) from None

    def append(self, *entries: Entry) -> None:
        """Write entries, with one fsync for all; on return they are on disk.

        Raises:
            OutputError: they are not, and nothing of them stays; or another fitter writes to this ledger now.
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
        """Close the file; nothing is taken any more."""
        if not self._closed:
            self._closed = True
            self._refuses = f"{self._path}: was closed"
            os.close(self._descriptor)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process reads or writes during the block. Raises OutputError when that cannot be."""
        if self._refuses is not None:
            raise OutputError(self._refuses)
        if not locked(self._descriptor, LOCK_WAIT_S):
            raise OutputError(f"{self._path}: another process has held it for {LOCK_WAIT_S:g} s; end that first")
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _check_alone(self) -> None:
        """Refuse to go on in a file that is not as this ledger left it."""
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
        started = time.monotonic()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._refuses = str(self._unwritable(error))
            with contextlib.suppress(OutputError):  # nobody shall find it; the failure is told all the same
                self._cut_off()
            raise OutputError(self._refuses) from None
        self.sync_s = time.monotonic() - started
        self._chain = chain
        self._whole = self._size = self._size + len(line)

    def _cut_off(self) -> None:
        """Remove what was not written whole: the next line must not go on in it."""
        try:
            os.ftruncate(self._descriptor, self._whole)
        except OSError as error:
            self._refuses = str(self._unwritable(error))
            raise OutputError(self._refuses) from None
        self._size = self._whole

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(unwritable(self._path, error))


def _place_of(entry: Entry) -> tuple[str, str]:
    """What the failpoints around an entry are called, and their detail."""
    if isinstance(entry, Accepted | Different):
        return "fit" if isinstance(entry, Accepted) else "different", f"{entry.round}/{entry.shard}"
    return "close", str(entry.round)


def read_ledger(path: Path) -> Contents:
    """What holds by the end of a ledger, whomever it belongs to; torn bytes at the end are not looked at.

    Raises LedgerError for damage before the end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return _read(descriptor, path, None)[0]
    finally:
        os.close(descriptor)


def kept_rounds(contents: Contents, finished: Sequence[Sequence[int]], path: Path) -> list[Closed]:
    """The closed rounds that a resumed run keeps.

    Args:
        contents: of the ledger.
        finished: shards of each finished round, from rounds.jsonl.
        path: of the ledger.

    Raises:
        LedgerError: the ledger does not have them as they were finished.
    """
    closed = contents.closed
    for number, shards in enumerate(finished):
        if number >= len(closed) or closed[number].shards != tuple(sorted(set(shards))):
            there = f"has it closed with {list(closed[number].shards)}" if number < len(closed) else "has it not closed"
            raise LedgerError(
                f"{path}: round {number + 1} was finished with shards {sorted(set(shards))}, and the ledger {there}; "
                "restore the file or start a new run"
            )
    return closed[: len(finished)]


def check_ledger(path: Path, finished: Sequence[Sequence[int]]) -> None:
    """Refuse a ledger that a run with these finished rounds could not continue from; nothing is changed.

    Raises LedgerError for the ledger, or for rounds.jsonl, which lacks rounds that were committed.
    """
    contents = read_ledger(path) if path.exists() else Contents()
    kept_rounds(contents, finished, path)
    if contents.committed > len(finished):
        had = f"{path.name} says that {contents.committed} rounds were committed"
        remedy = "restore the file or start a new run"
        raise LedgerError(f"{path.with_name('rounds.jsonl')}: holds {len(finished)} rounds, and {had}; {remedy}")


def _read(descriptor: int, path: Path, origin: Mapping[str, Any] | None) -> tuple[Contents, int, int]:
    """What holds, the CRC that the next line goes on from, and how many bytes are whole lines."""
    contents, chain, whole = Contents(), 0, 0
    with open(descriptor, "rb", closefd=False) as stream:
        stream.seek(0)
        for number, line in enumerate(stream, start=1):
            try:
                if not line.endswith(b"\n"):
                    _check_torn(number, line, chain)
                    break
                fields, chain = unchained(line, chain)
                if number == 1:
                    _check_header(fields, path, origin)
                    contents.openings = 1
                else:
                    contents.add(entry_of(fields))
            except (ValueError, KeyError, TypeError):
                place = f"entry {number}, at byte {whole}"
                raise LedgerError(f"{path}: {place}, is damaged; restore the file or start a new run") from None
            whole += len(line)
    return contents, chain, whole


def _check_torn(number: int, line: bytes, chain: int) -> None:
    """A first line that was never finished is that of a new ledger; a file that begins otherwise is none of ours."""
    if (number == 1 and not line.startswith(HEADER_START[: len(line)])) or lost_its_end(line, chain):
        raise ValueError


def _check_header(fields: Mapping[str, Any], path: Path, origin: Mapping[str, Any] | None) -> None:
    if fields["entry"] != "header":
        raise ValueError
    if fields["format"] != FORMAT:
        remedy = f"this version of ray_probe reads format {FORMAT}; go on with the version that wrote it"
        raise LedgerError(f"{path}: {bad_value('format', fields['format'], remedy)}")
    for name, value in (origin or {}).items():
        if fields[name] != value:
            remedy = f"this run's is {value!r}; give each run a directory of its own"
            raise LedgerError(f"{path}: {bad_value(name, fields[name], remedy)}")
