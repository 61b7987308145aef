"""The ledger keeps what was acknowledged: a torn end is cut off, damage refused, what is not on disk not taken."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.failpoints import arm, failpoints_in

from ray_probe.errors import LedgerError, OutputError
from ray_probe.fitter.ledger import HEADER_START, Contents, read_ledger
from ray_probe.fitter.ledger_format import Accepted, Closed, Different, Entry, Opened, digest_of, encode
from ray_probe.fitter.ledger_writer import LedgerFile
from ray_probe.system.files import locked

MADE_ON = "cpu of a kind"
ORIGIN = {"run": "a run", "policy_id": "a policy", "ridge_lambda": 1e-3, "features": ["H", "top1"]}


def accepted(round_number: int, shard: int) -> Accepted:
    numbers = np.random.default_rng([round_number, shard])
    packed = np.append(numbers.normal(size=4 + shard), [-0.0, 5e-324])
    return Accepted(round_number, shard, digest_of(packed), MADE_ON, packed)


def some_entries() -> list[Entry]:
    first, second = accepted(0, 1), accepted(0, 0)
    return [first, second, Different(0, 1, "ab" * 32, MADE_ON), Closed(0, (0, 1), 0), accepted(1, 2)]


def written(path: Path, entries: list[Entry], origin: dict[str, Any] = ORIGIN) -> bytes:
    """Open, go on where it ends, write these entries and close."""
    ledger = LedgerFile(path, origin)
    ledger.begin(len(ledger.read().closed))
    for entry in entries:
        ledger.append(entry)
    ledger.close()
    return path.read_bytes()


def plain(contents: Contents) -> tuple[Any, ...]:
    records = {key: (entry.sha256, entry.made_on, entry.packed.tobytes()) for key, entry in contents.records.items()}
    return records, contents.closed, contents.different


def expected(entries: list[Entry]) -> tuple[Any, ...]:
    contents = Contents()
    for entry in entries:
        contents.add(entry)
    return plain(contents)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_what_is_read_is_what_was_written_to_the_bit(path: Path):
    written(path, some_entries())
    contents = read_ledger(path)
    assert plain(contents) == expected(some_entries())
    assert (contents.torn_bytes, contents.openings) == (0, 1)
    assert all(entry.packed.dtype == np.float64 for entry in contents.records.values())


def test_every_line_is_json_and_the_first_says_what_the_ledger_belongs_to(path: Path):
    header, *lines = [json.loads(line) for line in written(path, some_entries()).splitlines()]
    assert header.items() >= ({"entry": "header", "format": 2} | ORIGIN).items()
    assert path.read_bytes().startswith(HEADER_START)
    assert [line["entry"] for line in lines] == ["record", "record", "different", "closed", "record"]
    assert all(len(line["crc"]) == 8 for line in (header, *lines))


def test_a_ledger_that_is_opened_again_goes_on_and_says_so(path: Path):
    before = written(path, some_entries()[:2])
    assert written(path, some_entries()[2:]).startswith(before), "what was written is never changed"
    assert plain(read_ledger(path)) == expected(some_entries())
    assert read_ledger(path).openings == 2


def test_opening_changes_nothing_before_it_begins(path: Path):
    whole = written(path, some_entries())
    path.write_bytes(whole + b'{"entry":"rec')
    ledger = LedgerFile(path, ORIGIN)
    assert ledger.read().torn_bytes == ledger.torn_bytes == 13
    ledger.close()
    assert path.read_bytes() == whole + b'{"entry":"rec'


def test_rounds_that_are_opened_again_keep_their_records(path: Path):
    entries: list[Entry] = [accepted(0, 0), Closed(0, (0,), 0), accepted(1, 0), Closed(1, (0,), 0), accepted(2, 0)]
    written(path, entries)
    ledger = LedgerFile(path, ORIGIN)
    ledger.read()
    ledger.begin(1)
    ledger.append(accepted(1, 1))
    ledger.append(Closed(1, (0, 1), 1))
    contents = read_ledger(path)
    assert sorted(contents.records) == [(0, 0), (1, 0), (1, 1), (2, 0)]
    assert contents.closed == [Closed(0, (0,), 0), Closed(1, (0, 1), 1)]


def test_a_torn_last_line_is_cut_off_wherever_it_is_torn_and_counted(path: Path):
    whole = written(path, some_entries())
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        written(path, [accepted(1, 2)])
        contents = read_ledger(path)
        assert plain(contents) == expected(some_entries()), end
        assert (contents.torn_bytes, contents.openings) == (end - start, 2)


def test_a_header_that_was_never_finished_is_that_of_a_new_ledger(path: Path):
    header = written(path, [])
    for end in range(len(header)):
        path.write_bytes(header[:end])
        written(path, some_entries())
        assert plain(read_ledger(path)) == expected(some_entries()), end


@pytest.mark.parametrize("data", [b"no line of ours", b"\0" * 300, b'{"round": 0}'])
def test_a_file_that_is_no_ledger_is_refused_and_left_alone(path: Path, data: bytes):
    for content in (data, data + b"\n"):
        path.write_bytes(content)
        with pytest.raises(LedgerError, match="entry 1, at byte 0, is damaged"):
            LedgerFile(path, ORIGIN).read()
        assert path.read_bytes() == content


def test_any_flipped_bit_is_refused_with_its_entry_and_offset(path: Path):
    whole = written(path, some_entries())
    for place in range(len(whole)):
        number = 1 + whole[:place].count(b"\n")
        offset = whole[:place].rfind(b"\n") + 1
        for bit in (0, 3, 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            with pytest.raises(LedgerError, match=rf"ledger\.jsonl: entry {number}, at byte {offset}, is dam") as bad:
                read_ledger(path)
            assert bad.value.exit_code == 2 and "\n" not in str(bad.value)


@pytest.mark.parametrize(
    ("change", "number"),
    [
        pytest.param(lambda lines, other: [*lines[:2], *lines[3:]], 3, id="a line is missing"),
        pytest.param(lambda lines, other: [lines[0], lines[2], lines[1], *lines[3:]], 2, id="two lines are swapped"),
        pytest.param(lambda lines, other: [*lines[:3], lines[2], *lines[3:]], 4, id="a line is there twice"),
        pytest.param(lambda lines, other: [*lines[:2], other[2], *lines[3:]], 3, id="a line is of another ledger"),
        pytest.param(lambda lines, other: [*lines[:2], b"\n", *lines[2:]], 3, id="an empty line"),
        pytest.param(lambda lines, other: lines[1:], 1, id="the header is missing"),
    ],
)  # fmt: skip
def test_lines_that_do_not_follow_each_other_are_damage(
    path: Path, tmp_path: Path, change: Callable[..., list[bytes]], number: int
):
    lines = written(path, some_entries()).splitlines(keepends=True)
    other = written(tmp_path / "other.jsonl", some_entries()).splitlines(keepends=True)
    path.write_bytes(b"".join(change(lines, other)))
    with pytest.raises(LedgerError, match=rf"entry {number}, at byte \d+, is damaged; restore the file or start a new"):
        read_ledger(path)


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(accepted(0, 0), id="a shard twice"),
        pytest.param(accepted(2, 0), id="a round that is not open"),
        pytest.param(Closed(0, (0,), 0), id="a round that is closed already"),
        pytest.param(Closed(1, (0,), 0), id="closed without a record"),
        pytest.param(Closed(1, (), 2), id="committed before it was closed"),
        pytest.param(Different(1, 0, "ab" * 32, MADE_ON), id="different from nothing"),
        pytest.param(Opened(2, 0), id="opened beyond the end"),
        pytest.param(replace(accepted(1, 0), sha256="ab" * 32), id="bytes that are not those of the digest"),
    ],
)
def test_entries_that_cannot_follow_are_damage_though_their_checksums_fit(path: Path, entry: Entry):
    ledger = LedgerFile(path, ORIGIN)
    ledger.read()
    ledger.begin(0)
    for before in (accepted(0, 0), Closed(0, (0,), 0)):
        ledger.append(before)
    read_ledger(path)
    ledger.append(entry)
    with pytest.raises(LedgerError, match="entry 4, at byte"):
        read_ledger(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("run", "another run"), ("policy_id", "x" * 200), ("ridge_lambda", 2e-3), ("features", ["top1", "H"])],
)
def test_another_runs_ledger_is_refused_and_left_alone(path: Path, name: str, value: Any):
    whole = written(path, some_entries())
    with pytest.raises(LedgerError, match=rf"ledger\.jsonl: {name}: got .*; this run's is .*of its own") as bad:
        LedgerFile(path, ORIGIN | {name: value}).read()
    assert bad.value.exit_code == 2 and "\n" not in str(bad.value)
    assert path.read_bytes() == whole


def test_a_ledger_of_a_later_format_is_refused(path: Path):
    path.write_bytes(encode("header", {"format": 3} | ORIGIN, 0)[0])
    with pytest.raises(LedgerError, match=r"ledger\.jsonl: format: got 3; this version of ray_probe reads format 2"):
        LedgerFile(path, ORIGIN).read()


def test_an_entry_and_the_files_name_are_on_disk_when_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch):
    synced, fsync = [], os.fsync

    def watch(descriptor: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), path.read_bytes().count(b"\n")))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", watch)
    written(path, some_entries())
    assert synced[:2] == [(str(path), 1), (str(path.parent), 1)], "the header, then the name"
    assert synced[2:] == [(str(path), 1 + number) for number in range(1, 6)], "each entry is whole, then synced"


def test_what_a_killed_process_had_not_synced_is_synced_before_anybody_relies_on_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    written(path, some_entries()[:2])
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    ledger = LedgerFile(path, ORIGIN)
    ledger.read()
    assert not synced
    ledger.begin(0)
    assert synced == [path.stat().st_ino, path.parent.stat().st_ino], "the file, then its name"


def begun(path: Path) -> LedgerFile:
    ledger = LedgerFile(path, ORIGIN)
    ledger.begin(len(ledger.read().closed))
    return ledger


@pytest.mark.parametrize("part", [0, 1, 40])
def test_a_full_disk_leaves_nothing_of_an_entry_and_the_next_one_goes_in(
    path: Path, monkeypatch: pytest.MonkeyPatch, part: int
):
    written(path, some_entries())
    ledger, write, room = begun(path), os.write, [part]
    before = path.read_bytes()

    def full(descriptor: int, data: bytes) -> int:
        taken = write(descriptor, bytes(data[: room[0]])) if room[0] else 0
        room[0] = 0
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return taken

    with monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\); make room"):
            ledger.append(accepted(1, 5))
    assert path.read_bytes() == before
    ledger.append(accepted(1, 5))
    assert sorted(read_ledger(path).records)[-1] == (1, 5)


def test_short_writes_are_gone_on_with(path: Path, monkeypatch: pytest.MonkeyPatch):
    write = os.write
    monkeypatch.setattr("os.write", lambda descriptor, data: write(descriptor, bytes(data[:7])))
    written(path, some_entries())
    assert plain(read_ledger(path)) == expected(some_entries())


def failing(code: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_after_a_failing_fsync_nothing_is_taken_any_more(path: Path, monkeypatch: pytest.MonkeyPatch):
    ledger = begun(path)
    ledger.append(accepted(0, 0))
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", failing(errno.EIO))
        with pytest.raises(OutputError, match=r"cannot be written \(Input/output error\)"):
            ledger.append(accepted(0, 1))
    assert path.read_bytes() == before, "nobody finds, and acknowledges, what may not be on disk"
    with pytest.raises(OutputError, match=r"cannot be written \(Input/output error\)"):
        ledger.append(accepted(0, 2))
    assert path.read_bytes() == before
    assert sorted(read_ledger(path).records) == [(0, 0)]


def test_what_can_be_neither_written_nor_cut_off_ends_the_ledger_and_is_a_torn_end_to_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    ledger, write = begun(path), os.write
    ledger.append(accepted(0, 0))
    with monkeypatch.context() as patch:

        def half(descriptor: int, data: bytes) -> int:
            patch.setattr("os.write", failing(errno.ENOSPC))
            return write(descriptor, bytes(data[: len(data) // 2]))

        patch.setattr("os.write", half)
        patch.setattr("os.ftruncate", failing(errno.EIO))
        for _ in range(2):
            with pytest.raises(OutputError, match="cannot be written"):
                ledger.append(accepted(0, 1))
    assert not path.read_bytes().endswith(b"\n")
    written(path, [accepted(0, 1)])
    assert sorted(read_ledger(path).records) == [(0, 0), (0, 1)]


LIMITED = """
import resource, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from test_ledger import accepted, begun
ledger = begun(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    for shard in range(1000):
        ledger.append(accepted(0, shard))
        print(shard, flush=True)
except Exception as error:
    print(f"{{type(error).__name__}}: {{error}}")
"""


def test_at_the_limit_of_a_files_size_what_was_acknowledged_is_there_and_nothing_else(path: Path):
    code = LIMITED.format(paths=[str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    done = subprocess.run([sys.executable, "-c", code, path, "5000"], capture_output=True, text=True, check=True)
    *acknowledged, error = done.stdout.splitlines()
    assert len(acknowledged) > 5 and error.startswith("OutputError: ") and "File too large" in error
    assert [shard for _, shard in read_ledger(path).records] == [int(shard) for shard in acknowledged]
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("point", ["fit_before_write", "fit_torn", "fit_after_fsync"])
def test_a_process_that_is_killed_while_it_writes_leaves_what_it_acknowledged(path: Path, tmp_path: Path, point: str):
    code = LIMITED.format(paths=[str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    with failpoints_in(tmp_path):
        arm(tmp_path, point, only="0/7")
        done = subprocess.run([sys.executable, "-c", code, path, "-1"], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    acknowledged = [int(shard) for shard in done.stdout.splitlines()]
    assert acknowledged == list(range(7))
    kept = [shard for _, shard in read_ledger(path).records]
    assert kept == acknowledged + ([7] if point == "fit_after_fsync" else [])
    written(path, [])
    assert (read_ledger(path).torn_bytes > 0) == (point == "fit_torn")


def test_who_opens_a_ledger_writes_to_it_and_the_one_before_no_more(path: Path):
    first = begun(path)
    first.append(accepted(0, 0))
    second = begun(path)
    for _ in range(2):
        with pytest.raises(OutputError, match=r"ledger\.jsonl: another fitter writes to it now"):
            first.append(accepted(0, 1))
    second.append(accepted(0, 2))
    assert sorted(read_ledger(path).records) == [(0, 0), (0, 2)]


def test_of_two_that_open_at_once_one_begins(path: Path):
    written(path, some_entries())
    first, second = LedgerFile(path, ORIGIN), LedgerFile(path, ORIGIN)
    first.read(), second.read()
    second.begin(1)
    with pytest.raises(OutputError, match="another fitter"):
        first.begin(1)
    second.append(accepted(1, 0))
    read_ledger(path)


def test_a_ledger_that_is_held_elsewhere_for_long_is_told(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray_probe.fitter.ledger_writer.LOCK_WAIT_S", 0.0)
    first = begun(path)
    with path.open("rb") as other, pytest.raises(OutputError, match="another process has held it for 0 s"):
        assert locked(other.fileno(), 0.0)
        first.append(accepted(0, 0))


def test_a_ledger_that_was_removed_or_closed_takes_nothing_more(path: Path):
    ledger = begun(path)
    path.unlink()
    with pytest.raises(OutputError, match="was removed while it was in use"):
        ledger.append(accepted(0, 0))
    other = begun(path)
    other.close()
    other.close()
    with pytest.raises(OutputError, match="was closed"):
        other.append(accepted(0, 0))


def test_only_the_owner_may_read_it(path: Path):
    previous = os.umask(0o022)
    try:
        written(path, some_entries())
    finally:
        os.umask(previous)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_link_in_its_place_is_not_followed(path: Path):
    elsewhere = path.with_name("elsewhere")
    path.symlink_to(elsewhere)
    with pytest.raises(OutputError, match=r"cannot be opened \(Too many levels of symbolic links\)"):
        LedgerFile(path, ORIGIN)
    assert not elsewhere.exists()
