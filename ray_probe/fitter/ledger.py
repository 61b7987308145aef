"""The ledger of accepted records: its contents, and checks before a resume.

The ledger is on disk before a record is acknowledged, and a restarted fitter knows nothing else. It holds one JSON
object a line, in order of time; a complete line never changes:

    header     what the ledger belongs to: run, policy, rule of the baseline, layout of the records; a random id
    record     a shard's record was accepted: round, shard, sha256 of its packed bytes, device, the bytes in base64
    closed     a round was fitted on the records of these shards; the rounds before `since` were committed then
    opened     the ledger was reopened: rounds from `round` on are open, `torn_bytes` were cut off
    different  a shard was delivered with other bytes, of this sha256, from this device; the first record counts

**Damage.** Every line ends in a CRC of itself and all lines before it. A line with another CRC is refused with its
number and offset. Bytes after the last line break are an unfinished line, which was never acknowledged: they are cut
off and counted when the ledger is opened. A complete line whose line break has another byte is damage.

**Groups.** Rounds of a commit group are closed one by one, so a resumed run may find rounds closed that it has not
finished. It reopens them, because it may give up other shards this time. Their records stay: a shard that is collected
again is a duplicate, and counts once.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_probe.errors import LedgerError, bad_value
from ray_probe.fitter.ledger_format import Accepted, Closed, Different, Entry, Opened, entry_of, require
from ray_probe.run.messages import ShardKey
from ray_probe.system.digests import lost_its_end, unchained

FORMAT = 2
HEADER_START = b'{"entry":"header","format":'
REMEDY = "restore the file or start a new run"


@dataclass
class Contents:
    """What a ledger says by the end of its last entry.

    Attributes:
        records: the first record of each shard.
        closed: the closed rounds, from round 0 on.
        different: deliveries with other bytes for a shard.
        torn_bytes: bytes that were cut off.
        openings: how often the ledger was opened, its creation included.
        committed: rounds that were committed when the last round was closed; later ones may be committed too.
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
            require(key not in self.records and entry.round == len(self.closed))
            self.records[key] = entry
        elif isinstance(entry, Closed):
            require(entry.round == len(self.closed) and 0 <= entry.since <= entry.round)
            require(all((entry.round, shard) in self.records for shard in entry.shards))
            self.closed.append(entry)
            self.committed = max(self.committed, entry.since)
        elif isinstance(entry, Opened):
            require(0 <= entry.round <= len(self.closed))
            del self.closed[entry.round :]
            self.torn_bytes += entry.torn_bytes
            self.openings += 1
        else:
            require((entry.round, entry.shard) in self.records)
            self.different.add(entry)


def read_ledger(path: Path) -> Contents:
    """Returns the contents of any run's ledger, torn bytes ignored.

    Raises LedgerError for damage.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return read_descriptor(descriptor, path, None)[0]
    finally:
        os.close(descriptor)


def kept_rounds(contents: Contents, finished: Sequence[Sequence[int]], path: Path) -> list[Closed]:
    """Returns the closed rounds that a resumed run keeps.

    Args:
        contents: of the ledger.
        finished: shards of each finished round, from rounds.jsonl.
        path: of the ledger.

    Raises:
        LedgerError: the ledger lacks a finished round, or has it with other shards.
    """
    closed = contents.closed
    for number, shards in enumerate(finished):
        if number >= len(closed) or closed[number].shards != tuple(sorted(set(shards))):
            there = f"has it closed with {list(closed[number].shards)}" if number < len(closed) else "has it not closed"
            what = f"round {number + 1} was finished with shards {sorted(set(shards))}, and the ledger {there}"
            raise LedgerError(f"{path}: {what}; {REMEDY}")
    return closed[: len(finished)]


def check_ledger(path: Path, finished: Sequence[Sequence[int]]) -> None:
    """Refuse a ledger that does not fit a run's finished rounds. Reads only.

    Raises:
        LedgerError: the ledger does not fit, or rounds.jsonl lacks rounds that were committed.
    """
    contents = read_ledger(path) if path.exists() else Contents()
    kept_rounds(contents, finished, path)
    if contents.committed > len(finished):
        had = f"{path.name} says that {contents.committed} rounds were committed"
        raise LedgerError(f"{path.with_name('rounds.jsonl')}: holds {len(finished)} rounds, and {had}; {REMEDY}")


def read_descriptor(descriptor: int, path: Path, origin: Mapping[str, Any] | None) -> tuple[Contents, int, int]:
    """Returns the contents, the last CRC, and the bytes of complete lines.

    Raises:
        LedgerError: a line is damaged, or the header is not of `origin` (None: of any run).
    """
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
                raise LedgerError(f"{path}: {place}, is damaged; {REMEDY}") from None
            whole += len(line)
    return contents, chain, whole


def _check_torn(number: int, line: bytes, chain: int) -> None:
    # A new ledger may have an unfinished first line; a file that starts with other bytes is no ledger.
    require(number > 1 or line.startswith(HEADER_START[: len(line)]))
    require(not lost_its_end(line, chain))


def _check_header(fields: Mapping[str, Any], path: Path, origin: Mapping[str, Any] | None) -> None:
    require(fields["entry"] == "header")
    if fields["format"] != FORMAT:
        remedy = f"this version of ray_probe reads format {FORMAT}; go on with the version that wrote it"
        raise LedgerError(f"{path}: {bad_value('format', fields['format'], remedy)}")
    for name, value in (origin or {}).items():
        if fields[name] != value:
            remedy = f"this run's is {value!r}; give each run a directory of its own"
            raise LedgerError(f"{path}: {bad_value(name, fields[name], remedy)}")
