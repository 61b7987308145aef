"""Whenever a run is cut off, its directory holds the last whole round and nothing half of the next."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from ray_probe.errors import ConfigError, OutputError
from ray_probe.estimates import Totals
from ray_probe.run_directory import RunDirectory, default_name, write_atomically

SIZE = 5


def some_totals(number: int) -> Totals:
    sizes = np.array([[4.0, 10.0 + number, 2.5]])
    return Totals(bins_3B=np.full((3, 2), number + 0.1), rounds=1, shards=[f"{number}/0"], sizes_S3=sizes)


def gradient_through(number: int) -> np.ndarray:
    return sum(np.random.default_rng(n).normal(size=SIZE) for n in range(number + 1))


def commit(directory: RunDirectory, number: int) -> None:
    directory.commit_round(number, some_totals(number), gradient_through(number), {"round": number, "records": [0]})


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(tmp_path / "runs", "first")
    made.config.write_text("{}")
    made.write_json("manifest.json", {"seed": 0})
    return made


def reopened(directory: RunDirectory) -> tuple[list[int], list[Totals], np.ndarray | None]:
    """What a resumed run finds: rounds in the file, their totals, and the gradient."""
    back = RunDirectory.open(directory.path)
    lines = back.finished_rounds()
    return [line["round"] for line in lines], *back.restore(len(lines))


def holds_exactly(directory: RunDirectory, rounds: int) -> bool:
    numbers, totals, gradient = reopened(directory)
    same_totals = [t.to_json() for t in totals] == [some_totals(n).to_json() for n in range(rounds)]
    if rounds == 0:
        return (numbers, totals, gradient) == ([], [], None)
    same_gradient = gradient is not None and gradient.tobytes() == gradient_through(rounds - 1).tobytes()
    return numbers == list(range(rounds)) and same_totals and same_gradient


def test_what_is_committed_comes_back_to_the_bit(directory: RunDirectory):
    assert holds_exactly(directory, 0)
    for number in range(3):
        commit(directory, number)
        assert holds_exactly(directory, number + 1)
    _, _, gradient = reopened(directory)
    assert gradient is not None and gradient.dtype == np.float64
    kept = sorted(path.name for path in (directory.path / "state").iterdir())
    assert kept == ["gradient-000002.safetensors", *(f"round-{n:06d}.json" for n in range(3))]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_run_killed_anywhere_in_a_commit_keeps_whole_rounds(
    directory: RunDirectory, rounds: int, monkeypatch: pytest.MonkeyPatch
):
    """Kill at each call of the operating system that a commit makes: before its 1st, 2nd, ... fsync, rename, unlink."""
    for number in range(rounds):
        commit(directory, number)
    calls = 0
    kill_at: int | None = None

    def counted(name: str, original):  # type: ignore[no-untyped-def]
        def call(*args: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls == kill_at:
                raise Killed(name)
            return original(*args, **named)

        return call

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", counted("fsync", os.fsync))
        patch.setattr(Path, "replace", counted("rename", Path.replace))
        patch.setattr(Path, "unlink", counted("unlink", Path.unlink))
        for kill_at in range(1, 6):
            calls = 0
            with pytest.raises(Killed) as killed:
                commit(directory, rounds)
            assert str(killed.value) == ["fsync", "rename", "fsync", "rename", "fsync"][kill_at - 1]
            if kill_at < 5:
                assert holds_exactly(directory, rounds), kill_at
    # killed at the fsync of rounds.jsonl, the line may be in the file or not: either is a whole state
    assert holds_exactly(directory, rounds + 1)
    (directory.path / "rounds.jsonl").write_text("".join(_line(n) for n in range(rounds)))
    assert holds_exactly(directory, rounds)
    calls, kill_at = 0, None
    commit(directory, rounds)
    assert holds_exactly(directory, rounds + 1)


def _line(number: int) -> str:
    return json.dumps({"round": number, "records": [0]}) + "\n"


def test_a_run_killed_between_the_line_and_the_clearing_up_goes_on(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
):
    commit(directory, 0)

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(Killed):
            commit(directory, 1)
    assert holds_exactly(directory, 2)
    commit(directory, 2)
    assert holds_exactly(directory, 3)


def test_a_torn_last_line_is_cut_off_wherever_it_is_torn(directory: RunDirectory):
    commit(directory, 0)
    commit(directory, 1)
    path = directory.path / "rounds.jsonl"
    first, last = path.read_bytes().splitlines(keepends=True)
    (directory.path / "state" / "gradient-000000.safetensors").write_bytes(b"")
    for end in range(len(last)):
        path.write_bytes(first + last[:end])
        assert [line["round"] for line in directory.finished_rounds()] == [0]
        assert path.read_bytes() == first, "the next line starts on a line of its own"
    path.write_bytes(first[:-1])
    assert directory.finished_rounds() == [] and path.read_bytes() == b""


def test_damage_in_a_file_of_the_run_is_refused_by_its_name(directory: RunDirectory):
    for number in range(3):
        commit(directory, number)
    rounds, state = directory.path / "rounds.jsonl", directory.path / "state"
    whole = rounds.read_bytes()
    rounds.write_bytes(whole.replace(b'{"round": 1', b'{"round": '))
    with pytest.raises(ConfigError, match=r"rounds.jsonl line 2 cannot be read \(.*restore it or start a new run"):
        directory.finished_rounds()
    for name in ("gradient-000002.safetensors", "round-000001.json"):
        for content in (b"", b"{" + 20 * b"\xff", None):
            if content is None:
                (state / name).unlink()
            else:
                (state / name).write_bytes(content)
            with pytest.raises(ConfigError, match=rf"{name} cannot be read \("):
                directory.restore(3)


def test_a_nan_is_refused_and_leaves_no_line(directory: RunDirectory):
    commit(directory, 0)
    with pytest.raises(ValueError, match="JSON compliant"):
        directory.commit_round(1, some_totals(1), gradient_through(1), {"round": 1, "x": float("nan")})
    assert holds_exactly(directory, 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        directory.write_json("result.json", {"x": float("inf")})
    assert not (directory.path / "result.json").exists()


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
    with pytest.raises(ConfigError, match="--resume"):
        RunDirectory.open(directory.path)
    with pytest.raises(ConfigError, match=r"manifest.json.*cannot be read"):
        directory.read_json("manifest.json")


def test_only_the_owner_may_enter(tmp_path: Path):
    previous = os.umask(0o022)
    try:
        made = RunDirectory.create(tmp_path, "mine")
    finally:
        os.umask(previous)
    assert made.path.stat().st_mode & 0o777 == 0o700


def test_the_mean_gradient_is_written_by_parameter_name(directory: RunDirectory):
    import safetensors.numpy

    by_name = {"a.weight": np.arange(6.0).reshape(2, 3), "a.bias": np.zeros(2)}
    directory.save_gradient(by_name)
    back = safetensors.numpy.load_file(directory.path / "gradient.safetensors")
    assert {name: value.tolist() for name, value in back.items()} == {n: v.tolist() for n, v in by_name.items()}


@pytest.mark.parametrize("stem", ["tiny", "My Config.v2", "Ünïcode", "___", "x" * 200, "-"])
def test_default_names_are_names_that_runs_may_have(stem: str):
    name = default_name(Path(f"/somewhere/{stem}.yaml"))
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name)
    assert re.search(r"-\d{8}-\d{6}-[0-9a-f]{4}$", name)


def test_a_second_driver_is_told_who_holds_the_run(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, "mine").lock()
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on ") as refused:
        RunDirectory(tmp_path / "mine").lock()
    assert "\n" not in str(refused.value)


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
    with pytest.raises(OutputError, match=r"gradient-000000.*No space left on device.*--resume") as refused:
        directory.commit_round(0, some_totals(0), gradient_through(0), {"round": 0})
    assert "\n" not in str(refused.value)
    assert directory.finished_rounds() == []
