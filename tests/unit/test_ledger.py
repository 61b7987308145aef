"""The ledger keeps what was acknowledged: a torn end is forgiven, damage before it is named, modes are private."""

import os
from pathlib import Path

import numpy as np
import pytest

from ray_probe.errors import RecordError
from ray_probe.ledger import Entry, Ledger, read_ledger, rewrite_ledger


def some_entries(count: int = 3) -> list[Entry]:
    numbers = np.random.default_rng(0)
    return [Entry(i // 2, i, np.append(numbers.normal(size=4 + i), [-0.0, 5e-324])) for i in range(count)]


def written(path: Path, entries: list[Entry]) -> bytes:
    ledger = Ledger(path)
    for entry in entries:
        ledger.append(entry)
    ledger.close()
    return path.read_bytes()


def contents(entries: list[Entry]) -> list[tuple[int, int, bytes]]:
    return [(entry.round, entry.shard, entry.packed.tobytes()) for entry in entries]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_what_is_read_is_what_was_written_to_the_bit(path: Path):
    assert read_ledger(path) == []
    written(path, some_entries())
    assert contents(read_ledger(path)) == contents(some_entries())
    assert all(entry.packed.dtype == np.float64 for entry in read_ledger(path))


def test_a_ledger_that_is_opened_again_goes_on(path: Path):
    written(path, some_entries()[:1])
    written(path, some_entries()[1:])
    assert contents(read_ledger(path)) == contents(some_entries())


def test_a_torn_last_line_is_ignored_wherever_it_is_torn(path: Path):
    whole = written(path, some_entries())
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        assert contents(read_ledger(path)) == contents(some_entries()[:-1]), end
    path.write_bytes(whole + b"\0" * 300)
    assert contents(read_ledger(path)) == contents(some_entries())


def test_any_flipped_byte_before_the_end_is_refused_with_its_line(path: Path):
    whole = written(path, some_entries())
    for place in range(len(whole) - 1):
        line = 1 + whole[:place].count(b"\n")
        for bit in (0, 3, 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            with pytest.raises(RecordError, match=rf"^ledger.jsonl line {line}: the ledger is damaged"):
                read_ledger(path)


@pytest.mark.parametrize(
    "line", [b"", b"[]", b"7", b'{"round": 0}', b'{"round": 0, "shard": 0, "record": 7, "crc": 0}']
)
def test_a_line_that_is_no_record_is_refused_with_its_number(path: Path, line: bytes):
    whole = written(path, some_entries())
    path.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(RecordError, match=r"^ledger.jsonl line 4: .*restore the file or start a new run"):
        read_ledger(path)


def test_two_lines_swapped_are_two_records_and_not_damage(path: Path):
    lines = written(path, some_entries()).splitlines(keepends=True)
    path.write_bytes(b"".join(reversed(lines)))
    assert contents(read_ledger(path)) == contents(some_entries()[::-1])


def test_a_record_under_another_shards_number_is_damage(path: Path):
    whole = written(path, some_entries())
    path.write_bytes(whole.replace(b'"shard": 1', b'"shard": 2'))
    with pytest.raises(RecordError, match="line 2: "):
        read_ledger(path)


def test_rewriting_replaces_the_file_whole(path: Path, monkeypatch: pytest.MonkeyPatch):
    written(path, some_entries())
    rewrite_ledger(path, some_entries()[:1])
    assert contents(read_ledger(path)) == contents(some_entries()[:1])
    assert os.listdir(path.parent) == [path.name]

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        rewrite_ledger(path, some_entries())
    assert contents(read_ledger(path)) == contents(some_entries()[:1]), "until the new one is on disk, the old stands"


def test_only_the_owner_may_read_it(path: Path):
    previous = os.umask(0o022)
    try:
        written(path, some_entries())
        assert path.stat().st_mode & 0o777 == 0o600
        rewrite_ledger(path, some_entries())
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(previous)


def test_a_link_in_its_place_is_not_followed(path: Path):
    elsewhere = path.with_name("elsewhere")
    path.symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic link"):
        Ledger(path)
    assert not elsewhere.exists()
