"""Whenever a run is cut off, its directory holds the last whole round and nothing half of the next."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_probe.errors import ConfigError, OutputError
from ray_probe.run.directory import RunDirectory, default_name
from ray_probe.run.result import Beta, Result
from ray_probe.run.rounds_file import FinishedRound
from ray_probe.run.totals import Totals
from ray_probe.system.files import write_atomically

HOLDER = (
    r"^--resume: got '.*'; process \d+ on .* since [-0-9]+ [:0-9]+ UTC is driving this run; wait for it or stop it$"
)
FIT = Beta(features=("H",), values=(0.5,))


def some_totals(number: int) -> Totals:
    sizes = np.array([[4.0, 10.0 + number, 2.5]])
    return Totals(bins_3B=np.full((3, 2), number + 0.1), rounds=1, shards=[f"{number}/0"], sizes_S3=sizes)


def some_line(number: int) -> FinishedRound:
    fit = replace(FIT, version=number + 1, round=number)
    return FinishedRound(number, records=(0,), beta_version=number + 1, fit=fit)


def commit(directory: RunDirectory, first: int, rounds: int = 1) -> None:
    numbers = range(first, first + rounds)
    directory.commit([some_totals(number) for number in numbers], [some_line(number) for number in numbers])


def snapshot(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and the time of its last change, ns."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(tmp_path / "runs", "first")
    made.config.write_text("{}")
    made.write_json("manifest.json", {"seed": 0})
    return made


def holds_exactly(directory: RunDirectory, rounds: int) -> bool:
    """Whether a resumed run finds these rounds: their lines and their totals."""
    back = RunDirectory.open(directory.path)
    numbers = [line.round for line in back.finished_rounds()]
    totals = [part.to_json() for part in back.restore(len(numbers))]
    return numbers == list(range(rounds)) and totals == [some_totals(n).to_json() for n in range(rounds)]


def test_what_is_committed_comes_back(directory: RunDirectory):
    assert holds_exactly(directory, 0)
    done = 0
    for rounds in (1, 3, 1, 2):
        commit(directory, done, rounds)
        done += rounds
        assert holds_exactly(directory, done)
    groups = [list(line.group) for line in directory.finished_rounds()]
    assert groups == [[0, 0], [1, 3], [1, 3], [1, 3], [4, 4], [5, 6], [5, 6]]
    assert sorted(path.name for path in directory.state.iterdir()) == [f"round-{n:06d}.json" for n in range(7)]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("finished", [0, 2])
def test_a_run_killed_anywhere_in_a_commit_keeps_whole_groups(
    directory: RunDirectory, finished: int, rounds: int, monkeypatch: pytest.MonkeyPatch
):
    """Kill at each call of the operating system that a commit makes: before its 1st, 2nd, ... fsync and rename."""
    if finished:
        commit(directory, 0, finished)
    before = (directory.path / "rounds.jsonl").read_bytes() if finished else b""
    calls, kill_at = 0, 0

    def counted(name: str, original: Any) -> Any:
        def call(*args: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls == kill_at:
                raise Killed(name)
            return original(*args, **named)

        return call

    steps = 3 * rounds + 1  # of each file of sums: its bytes, its name, the directory; then the lines
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", counted("fsync", os.fsync))
        patch.setattr(Path, "replace", counted("rename", Path.replace))
        for kill_at in range(1, steps + 1):
            calls = 0
            with pytest.raises(Killed) as killed:
                commit(directory, finished, rounds)
            assert str(killed.value) == ("rename" if kill_at % 3 == 2 else "fsync")
            assert holds_exactly(directory, finished if kill_at < steps else finished + rounds)
    # killed at the fsync of rounds.jsonl, the lines may be in the file or not: either is a whole state
    (directory.path / "rounds.jsonl").write_bytes(before)
    assert holds_exactly(directory, finished)
    commit(RunDirectory.open(directory.path), finished, rounds)
    assert holds_exactly(directory, finished + rounds)


def test_of_lines_that_are_torn_anywhere_only_whole_groups_count_and_the_next_starts_on_its_own(
    directory: RunDirectory,
):
    commit(directory, 0)
    path = directory.path / "rounds.jsonl"
    first = path.read_bytes()
    commit(directory, 1, 2)
    whole = path.read_bytes()
    for end in range(len(first), len(whole)):
        path.write_bytes(whole[:end])
        assert holds_exactly(directory, 1)
        assert path.read_bytes() == whole[:end], "to look is not to repair: the run may be writing"
    for end in (len(first) + 5, whole.rindex(b"\n", 0, -1) + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        commit(RunDirectory.open(directory.path), 1)
        assert holds_exactly(directory, 2)
    path.write_bytes(first[:-1])
    assert directory.finished_rounds() == []


def test_lines_without_a_checksum_as_of_another_version_are_refused(directory: RunDirectory):
    commit(directory, 0, 2)
    path = directory.path / "rounds.jsonl"
    old = [{key: value for key, value in json.loads(line).items() if key != "crc"} for line in path.open()]
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    with pytest.raises(ConfigError, match=r"rounds.jsonl line 1 cannot be read \(it has no checksum\), restore it"):
        directory.finished_rounds()


def test_damage_in_a_file_of_the_run_is_refused_by_its_name(directory: RunDirectory):
    for number in range(3):
        commit(directory, number)
    rounds = directory.path / "rounds.jsonl"
    whole = rounds.read_bytes()
    rounds.write_bytes(whole.replace(b'{"round": 1', b'{"round": '))
    with pytest.raises(ConfigError, match=r"rounds.jsonl line 2 cannot be read \(.*restore it or start a new run"):
        directory.finished_rounds()
    rounds.write_bytes(whole)
    path = directory.state / "round-000001.json"
    for content in (b"", b"{" + 20 * b"\xff", None):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"round-000001.json cannot be read \("):
            directory.restore(3)


def test_a_nan_is_refused_and_leaves_no_line(directory: RunDirectory):
    commit(directory, 0)
    with pytest.raises(ValueError, match="JSON compliant"):
        directory.commit([some_totals(1)], [replace(some_line(1), seconds=float("nan"))])
    assert holds_exactly(directory, 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        directory.write_json("result.json", {"x": float("inf")})
    assert not (directory.path / "result.json").exists()


def test_every_version_of_beta_can_be_read_back(directory: RunDirectory):
    with pytest.raises(ConfigError, match=r"^version: got 1; no finished round holds one$"):
        directory.beta(1)
    commit(directory, 0)
    commit(directory, 1, 2)
    for number in range(3):
        assert directory.beta(number + 1) == some_line(number).fit
    for version in (0, 4):
        with pytest.raises(ConfigError, match=rf"^version: got {version}; there are versions 1 to 3$"):
            directory.beta(version)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x"
    write_atomically(path, b"old")

    def killed(descriptor: int) -> None:
        raise Killed

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(Killed):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_an_existing_name_is_refused_with_the_way_to_go_on(directory: RunDirectory):
    with pytest.raises(ConfigError) as caught:
        RunDirectory.create(directory.path.parent, "first")
    message = str(caught.value)
    assert message.startswith("output.name: got 'first'; ") and "choose another output.name" in message
    assert message.endswith(f"run --resume {directory.path}") and "\n" not in message


def test_a_place_that_cannot_hold_runs_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for parent in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"output.dir: got .*; cannot be written in"):
            RunDirectory.create(parent, "name")


def test_what_is_no_run_directory_is_refused(directory: RunDirectory, tmp_path: Path):
    for path in (tmp_path, tmp_path / "missing", directory.config):
        with pytest.raises(ConfigError, match=r"--resume: got .*; need the directory of a run"):
            RunDirectory.open(path)
    (directory.path / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"^--resume: got '.*'; manifest.json is missing, restore it or start a new"):
        RunDirectory.open(directory.path)
    with pytest.raises(ConfigError, match=r"manifest.json.*cannot be read"):
        directory.read_json("manifest.json")


def test_a_run_without_digests_as_of_an_earlier_version_is_read_but_not_gone_on_with(directory: RunDirectory):
    directory.write_json("result.json", {"config": {"x": 1}})
    assert directory.result() == Result(config={"x": 1})
    with pytest.raises(ConfigError, match=r"^--resume: got '.*'; SHA256SUMS is missing \(ray_probe 0\.1\.1 and before"):
        directory.check_start()


def test_what_is_written_whole_is_read_back_as_it_was_written_or_refused_by_its_name(tmp_path: Path):
    files = {"config.yaml": "a: 1\n", "manifest.json": '{"seed": 0}\n'}
    made = RunDirectory.create(tmp_path, "mine", files)
    assert made.result() is None
    made.write_result(Result(config={"x": 0.1}))
    made.check_start()
    assert made.result() == Result(config={"x": 0.1}) and made.read_json("manifest.json") == {"seed": 0}
    for name, text in files.items():
        (made.path / name).write_text(text.replace("0", "1").replace("1", "2"))
        with pytest.raises(ConfigError, match=rf"{name}: is damaged or was edited: it does not match SHA") as bad:
            made.check_start()
        assert bad.value.exit_code == 2 and "\n" not in str(bad.value)
        (made.path / name).write_text(text)
    (made.path / "result.json").write_text('{"x": 0.2}')
    with pytest.raises(ConfigError, match=r"result.json: is damaged .*; restore it, or write it again with run --res"):
        made.result()
    made.write_result(Result(config={"x": 0.3}))
    assert made.result() == Result(config={"x": 0.3})


def test_rounds_that_ended_before_the_gradient_are_blamed_and_not_the_gradient(directory: RunDirectory):
    for number in range(3):
        commit(directory, number)
        (directory.state / f"gradient-{number:06d}.npy").touch()
    assert len(directory.committed_rounds()) == 3, "what a crash leaves before the states are cleared up"
    for number in range(2):
        (directory.state / f"gradient-{number:06d}.npy").unlink()
    assert len(directory.committed_rounds()) == 3
    path = directory.path / "rounds.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(ConfigError, match=r"rounds.jsonl ends with round 1, and state/ has the gradient of a later"):
        directory.committed_rounds()
    (directory.state / "gradient-000000.npy").touch()  # a window starts after the first round
    with pytest.raises(ConfigError, match=r"rounds.jsonl ends with round 1, and state/ has the gradient of a later"):
        directory.committed_rounds()


def test_sums_that_another_version_wrote_are_refused_in_one_line(directory: RunDirectory):
    totals = some_totals(0).to_json()
    del totals["within"]
    with pytest.MonkeyPatch.context() as earlier:
        earlier.setattr(Totals, "to_json", lambda self: totals)
        commit(directory, 0)
    with pytest.raises(ConfigError) as refused:
        directory.restore(1)
    remedy = "another ray_probe wrote it; resume with that one, or start a new run"
    assert str(refused.value) == f"--resume: got '{directory.path}'; round-000000.json has no 'within': {remedy}"


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"), (errno.EACCES, "let this user write there"),
        (errno.EROFS, "let this user write there"), (errno.EIO, "see to the disk"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_told_with_what_helps(
    directory: RunDirectory, code: int, remedy: str, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OutputError) as refused:
        directory.write_result(Result(config={"x": 1}))
    said = f"{directory.path}/result.json: cannot be written ({os.strerror(code)}); {remedy}, then go on with run"
    assert str(refused.value).startswith(said)


def test_only_the_owner_may_enter(tmp_path: Path):
    previous = os.umask(0o022)
    try:
        made = RunDirectory.create(tmp_path, "mine")
    finally:
        os.umask(previous)
    assert made.path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("stem", ["tiny", "My Config.v2", "Ünïcode", "___", "x" * 200, "-"])
def test_default_names_are_names_that_runs_may_have(stem: str):
    name = default_name(Path(f"/somewhere/{stem}.yaml"))
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name)
    assert re.search(r"-\d{8}-\d{6}-[0-9a-f]{4}$", name)


def test_a_second_driver_is_told_who_holds_the_run_until_it_lets_go(directory: RunDirectory) -> None:
    other = RunDirectory.open(directory.path)
    with directory.held():
        before = snapshot(directory.path)
        with pytest.raises(ConfigError, match=HOLDER) as refused, other.held():
            pass
        assert "\n" not in str(refused.value) and refused.value.exit_code == 2
        assert f"process {os.getpid()} on {socket.gethostname()} since" in str(refused.value)
        assert snapshot(directory.path) == before, "nothing was changed"
    with other.held():
        pass


def test_a_driver_on_another_host_is_told_by_that_hosts_name(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may lie on a disk that several hosts share: its words are the holder's, not the reader's."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "far-away")
        elsewhere.setattr(os, "getpid", lambda: 4242)
        there = directory.held()
        there.__enter__()
    with (
        pytest.raises(ConfigError, match=r"process 4242 on far-away since .* is driving"),
        RunDirectory(directory.path).held(),
    ):
        pass
    there.__exit__(None, None, None)


def test_a_holder_that_was_killed_leaves_no_lock_and_one_that_is_about_to_end_is_waited_for(
    directory: RunDirectory,
) -> None:
    hold = (
        f"import sys, time, pathlib; from ray_probe.run.directory import RunDirectory as R\n"
        f"with R(pathlib.Path({str(directory.path)!r})).held(): print('held', flush=True); time.sleep(60)"
    )
    told: list[str] = []
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid} on .* is driving this run"), directory.held():
            pass

        def kill(who: str) -> None:
            told.append(who)
            holder.kill()

        with directory.held(30.0, kill):
            assert told and told[0].startswith(f"process {holder.pid} on ")
            assert (directory.path / "lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize("other_is_done", [True, False])
def test_of_two_that_make_the_same_run_one_does_and_the_other_is_told(tmp_path: Path, other_is_done: bool) -> None:
    class Meanwhile(dict[str, str]):
        """Files of a run; while they are written another driver makes the same run, or is about to."""

        def items(self) -> Any:
            if other_is_done:
                RunDirectory.create(tmp_path, "mine", {"config.yaml": "the other's"})
            else:
                tmp_path.joinpath(".mine.part").mkdir()
            return super().items()

    files = Meanwhile({"config.yaml": "one's"})
    if other_is_done:
        with pytest.raises(ConfigError, match=r"^output.name: got 'mine'; .* exists; choose another"):
            RunDirectory.create(tmp_path, "mine", files)
        assert [path.name for path in tmp_path.iterdir()] == ["mine"], "what the second had begun is removed"
        assert (tmp_path / "mine" / "config.yaml").read_text() == "the other's"
    else:
        made = RunDirectory.create(tmp_path, "mine", files)
        assert made.config.read_text() == "one's"
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_directory_that_cannot_be_written_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output\.dir"):
        RunDirectory.check_free(tmp_path / "file" / "runs", "mine")
    RunDirectory.check_free(tmp_path / "not" / "yet", "mine")
    assert not (tmp_path / "not").exists()


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory.create(tmp_path, "mine")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"round-000000.*No space left on device.*--resume") as refused:
        commit(directory, 0)
    assert "\n" not in str(refused.value)
    assert directory.finished_rounds() == []
