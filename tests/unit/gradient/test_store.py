"""The gradient on disk is the sum of what was committed, whole whenever a crash comes; no vector is held for it."""

import hashlib
import io
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from ray_probe.errors import ConfigError, GradientError, NonFiniteError, OutputError
from ray_probe.gradient import state_file
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.gradient.store import GradientStore, NotStaged

LAYOUT = ParameterLayout(("a.weight", "a.bias", "b"), ((3, 4), (), (10,)))
SIZE = 23
BUCKETS = ((0, 9), (9, 18), (18, 23))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_file, "CHUNK", 4)


def part_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=SIZE).astype(np.float32)


def sum_through(rounds: int) -> np.ndarray:
    total = np.zeros(SIZE)
    for number in range(rounds):
        total = total + part_of(number)
    return total


def staged(store: GradientStore, number: int, buckets: tuple[tuple[int, int], ...] = BUCKETS) -> str:
    staging = store.begin()
    for start, stop in buckets:
        store.add(staging, start, stop, part_of(number)[start:stop])
    return staging


def stage(store: GradientStore, number: int, buckets: tuple[tuple[int, int], ...] = BUCKETS) -> None:
    staged(store, number, buckets)


def square_through(rounds: int) -> float:
    return float(sum_through(rounds) @ sum_through(rounds))


def opened(directory: Path, rounds: int = 0) -> GradientStore:
    store = GradientStore(directory, LAYOUT)
    store.open(rounds)
    return store


def with_rounds(directory: Path, rounds: int) -> GradientStore:
    store = opened(directory)
    for number in range(rounds):
        stage(store, number)
        store.commit(number + 1)
        store.settle()
    return store


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_committed_is_the_sum_in_float64_and_so_is_its_norm(tmp_path: Path):
    store = opened(tmp_path)
    assert not store.read(0, SIZE).any()
    for number in range(3):
        stage(store, number, BUCKETS[::-1] if number == 1 else BUCKETS)
        np.testing.assert_array_equal(store.read(0, SIZE), sum_through(number), "staged is not committed")
        norm_sq = store.commit(number + 1)
        np.testing.assert_array_equal(store.read(0, SIZE), sum_through(number + 1))
        assert norm_sq == pytest.approx(sum_through(number + 1) @ sum_through(number + 1), rel=1e-14)
        store.settle()
        assert names(tmp_path) == [f"gradient-{number:06d}.npy"]
    again = GradientStore(tmp_path, LAYOUT)
    assert again.open(3) == pytest.approx(norm_sq, rel=1e-14)
    np.testing.assert_array_equal(again.read(5, 20), sum_through(3)[5:20])


def test_small_parts_are_not_lost_beside_large_ones(tmp_path: Path):
    store = opened(tmp_path)
    for number, value in enumerate([1e8, 1.0, 1.0]):
        staging = store.begin()
        store.add(staging, 0, SIZE, np.full(SIZE, value, np.float32))
        store.commit(number + 1)
    np.testing.assert_array_equal(store.read(0, SIZE), np.full(SIZE, 1e8 + 2.0), "float32 would have left 1e8")


def test_a_state_is_an_npy_file_and_one_that_numpy_saved_is_read(tmp_path: Path):
    with_rounds(tmp_path, 2)
    path = tmp_path / "gradient-000001.npy"
    np.testing.assert_array_equal(np.load(path), sum_through(2))
    np.save(path, sum_through(2))
    np.testing.assert_array_equal(opened(tmp_path, 2).read(0, SIZE), sum_through(2))


def test_a_state_in_the_format_of_an_earlier_version_is_refused_by_name(tmp_path: Path):
    directory = tmp_path / "run" / "state"
    directory.mkdir(parents=True)
    safetensors.numpy.save_file({"sum": sum_through(2)}, directory / "gradient-000001.safetensors")
    with pytest.raises(ConfigError) as refused:
        opened(directory, 2)
    remedy = "is in the format of an earlier ray_probe; resume with that one, or start a new run"
    assert str(refused.value) == f"--resume: got '{tmp_path}/run'; gradient-000001.safetensors {remedy}"


def test_the_mean_is_written_by_parameter_name(tmp_path: Path):
    store = with_rounds(tmp_path, 2)
    store.save_mean(tmp_path / "gradient.safetensors", 2, 8)
    found = safetensors.numpy.load_file(tmp_path / "gradient.safetensors")
    mean = sum_through(2) / 8
    assert {name: value.shape for name, value in found.items()} == dict(zip(LAYOUT.names, LAYOUT.shapes, strict=True))
    for name, shape, start, stop in LAYOUT.ranges():
        np.testing.assert_array_equal(found[name], mean[start:stop].reshape(shape))


def test_the_mean_can_be_that_of_the_rounds_which_count(tmp_path: Path):
    """A commit is in place and its lines could not be written: the result is of the rounds before."""
    store = with_rounds(tmp_path, 1)
    stage(store, 1)
    store.commit(2)
    store.save_mean(tmp_path / "gradient.safetensors", 1, 4)
    found = safetensors.numpy.load_file(tmp_path / "gradient.safetensors")
    np.testing.assert_array_equal(found["b"], sum_through(1)[13:] / 4)


def test_a_commit_that_was_given_up_leaves_nothing_behind(tmp_path: Path):
    store = with_rounds(tmp_path, 1)
    old = store.begin()
    store.add(old, 0, 9, np.full(9, 7.0, np.float32))
    new = store.begin()
    store.add(old, 9, 18, np.full(9, 7.0, np.float32))
    for start, stop in BUCKETS:
        store.add(new, start, stop, part_of(1)[start:stop])
    store.add(old, 0, 9, np.full(9, 7.0, np.float32))
    store.commit(2)
    np.testing.assert_array_equal(store.read(0, SIZE), sum_through(2))


@pytest.mark.parametrize("missing", BUCKETS)
def test_a_commit_without_every_bucket_is_refused(tmp_path: Path, missing: tuple[int, int]):
    store = with_rounds(tmp_path, 1)
    stage(store, 1, tuple(bucket for bucket in BUCKETS if bucket != missing))
    with pytest.raises(GradientError, match=r"^gradient: not every bucket"):
        store.commit(2)
    np.testing.assert_array_equal(store.read(0, SIZE), sum_through(1))


def test_a_bucket_that_comes_twice_is_a_fault_of_ours(tmp_path: Path):
    store = opened(tmp_path)
    staging = store.begin()
    store.add(staging, 0, 9, part_of(0)[:9])
    with pytest.raises(AssertionError):
        store.add(staging, 0, 9, part_of(0)[:9])


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_sum_of_zero_is_refused_and_what_was_committed_stays(tmp_path: Path, rounds: int):
    store = with_rounds(tmp_path, rounds)
    staging = store.begin()
    for start, stop in BUCKETS:
        store.add(staging, start, stop, np.zeros(stop - start, np.float32))
    with pytest.raises(GradientError, match=r"is zero in each of 23 numbers; .*model\.trainable") as refused:
        store.commit(rounds + 1)
    assert refused.value.exit_code == 1 and "\n" not in str(refused.value)
    np.testing.assert_array_equal(store.read(0, SIZE), sum_through(rounds))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_sum_that_is_not_finite_is_refused(tmp_path: Path, value: float):
    store = with_rounds(tmp_path, 1)
    staging = staged(store, 1, BUCKETS[:2])
    spoilt = part_of(1)[18:]
    spoilt[3] = value
    store.add(staging, 18, 23, spoilt)
    with pytest.raises(NonFiniteError, match="nothing was committed"):
        store.commit(2)
    np.testing.assert_array_equal(opened(tmp_path, 1).read(0, SIZE), sum_through(1))


class Killed(BaseException):
    pass


def killed_before(call: int, work: Callable[[], object]) -> str | None:
    """Do the work, but be killed before its n-th call of the operating system; returns which that was, None: none."""
    left = iter(range(call, -1, -1))

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **named: Any) -> Any:
            if next(left, None) == 0:
                raise Killed(name)
            return original(*arguments, **named)

        return counting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", counted("fsync", os.fsync))
        for name in ("replace", "unlink", "open"):
            patch.setattr(Path, name, counted(name, getattr(Path, name)))
        try:
            work()
        except Killed as killed:
            return str(killed)
    return None


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_process_killed_in_a_commit_leaves_the_state_before(tmp_path: Path, rounds: int):
    steps = []
    for call in range(100):
        directory = tmp_path / str(call)
        directory.mkdir()
        store = with_rounds(directory, rounds)

        def commit(store: GradientStore = store) -> None:
            stage(store, rounds)
            store.commit(rounds + 1)

        killed = killed_before(call, commit)
        if killed is None:
            break
        steps.append(killed)
        back = opened(directory, rounds)
        np.testing.assert_array_equal(back.read(0, SIZE), sum_through(rounds))
        assert len(names(directory)) == min(rounds, 1), "what was left over is cleared up"
        stage(back, rounds)
        back.commit(rounds + 1)
        np.testing.assert_array_equal(opened(directory, rounds + 1).read(0, SIZE), sum_through(rounds + 1))
    assert steps.count("fsync") == len(BUCKETS) + 1 and steps.count("replace") == 1, "every step was one to die at"


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_writer_that_comes_back_finds_a_commit_done_or_has_it_begun_anew_and_adds_it_once(
    tmp_path: Path, rounds: int
):
    outcomes = []
    for call in range(100):
        directory = tmp_path / str(call)
        directory.mkdir()
        store = with_rounds(directory, rounds)
        staging = staged(store, rounds)
        killed = killed_before(call, lambda store=store, staging=staging: store.commit_once(staging, rounds + 1))  # type: ignore[misc]
        if killed is None:
            assert store.commit_once(staging, rounds + 1) == pytest.approx(square_through(rounds + 1), rel=1e-14)
            break
        back = GradientStore(directory, LAYOUT)
        back.go_on(rounds)
        try:
            back.commit_once(staging, rounds + 1)
            outcomes.append("done")
        except NotStaged:
            outcomes.append("begun anew")
            assert not back.holds(staging)
            back.add(staging, 0, 9, part_of(rounds)[:9])
            back.commit_once(staged(back, rounds), rounds + 1)
        np.testing.assert_array_equal(back.read(0, SIZE), sum_through(rounds + 1))
        back.settle()
        assert names(directory) == [f"gradient-{rounds:06d}.npy"]
    assert outcomes == ["begun anew", "done"], "killed before the state has its name, and after it"


def test_a_writer_that_was_thought_dead_puts_nothing_of_its_successor_in_place(tmp_path: Path):
    store = with_rounds(tmp_path, 1)
    stale = staged(store, 1)
    back = GradientStore(tmp_path, LAYOUT)
    back.go_on(1)
    fresh = back.begin()
    back.add(fresh, 0, 9, part_of(1)[:9])
    with pytest.raises(OutputError, match="No such file"):
        store.commit_once(stale, 2)
    np.testing.assert_array_equal(back.read(0, SIZE), sum_through(1))
    for start, stop in BUCKETS[1:]:
        back.add(fresh, start, stop, part_of(1)[start:stop])
    back.commit_once(fresh, 2)
    np.testing.assert_array_equal(back.read(0, SIZE), sum_through(2))


def test_the_norm_has_the_same_bits_whether_it_is_taken_bucket_by_bucket_or_from_the_file(tmp_path: Path):
    store = opened(tmp_path)
    for order in (1, -1):
        staging = store.begin()
        for start in range(0, SIZE, state_file.CHUNK)[::order]:
            stop = min(start + state_file.CHUNK, SIZE)
            store.add(staging, start, stop, part_of(0)[start:stop])
        norm_sq = store.commit(1)
        assert opened(tmp_path, 1).read(0, SIZE) @ sum_through(1) == pytest.approx(norm_sq, rel=1e-14)
        assert GradientStore(tmp_path, LAYOUT).open(1) == norm_sq == store.commit_once(staging, 1)
        store.go_on(0)


@pytest.mark.parametrize("rounds", [1, 2])
def test_after_a_commit_both_states_are_whole_until_the_rounds_count(tmp_path: Path, rounds: int):
    """The lines of the rounds are written in between: a run that goes on may find them or not."""
    for number, count in enumerate((rounds, rounds + 1)):
        directory = tmp_path / str(number)
        directory.mkdir()
        stage(store := with_rounds(directory, rounds), rounds)
        store.commit(rounds + 1)
        back = opened(directory, count)
        np.testing.assert_array_equal(back.read(0, SIZE), sum_through(count))
        stage(back, count)
        back.commit(count + 1)
        np.testing.assert_array_equal(back.read(0, SIZE), sum_through(count + 1))


def test_a_process_killed_while_it_clears_up_leaves_the_new_state(tmp_path: Path):
    stage(store := with_rounds(tmp_path, 2), 2)
    store.commit(3)
    assert killed_before(0, store.settle) == "unlink"
    np.testing.assert_array_equal(opened(tmp_path, 3).read(0, SIZE), sum_through(3))
    assert names(tmp_path) == ["gradient-000002.npy"]


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


DAMAGE: dict[str, tuple[Callable[[bytes], bytes] | None, str]] = {
    "missing": (None, "No such file"),
    "empty": (lambda data: b"", "EOF: reading magic string"),
    "torn head": (lambda data: data[:40], "EOF: reading array header"),
    "cut short": (lambda data: data[:-1], "greater than file size"),
    "noise": (lambda data: 30 * b"\xff", "magic string is not correct"),
    "objects": (lambda data: npy(np.full(SIZE, None)), "Python objects in dtype"),
    "float32": (lambda data: npy(np.zeros(SIZE, np.float32)), r"float32 of shape \(23,\), .* has 23 numbers"),
    "another model's": (lambda data: npy(np.zeros(7)), r"shape \(7,\), .* has 23 numbers"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_state_is_refused_by_its_name(tmp_path: Path, case: str):
    spoil, reason = DAMAGE[case]
    directory = tmp_path / "run" / "state"
    directory.mkdir(parents=True)
    with_rounds(directory, 2)
    path = directory / "gradient-000001.npy"
    if spoil is None:
        path.unlink()
    else:
        path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ConfigError, match=rf"^--resume: got '{tmp_path}/run'; {path.name} cannot be read") as refused:
        opened(directory, 2)
    assert refused.match(reason) and "\n" not in str(refused.value)


def test_the_digest_of_each_state_is_that_of_its_file_in_whatever_order_buckets_came(tmp_path: Path):
    store = opened(tmp_path)
    assert store.sha256 is None
    for number, buckets in enumerate((BUCKETS, BUCKETS[::-1], (BUCKETS[1], BUCKETS[0], BUCKETS[2]))):
        stage(store, number, buckets)
        store.commit(number + 1)
        path = tmp_path / f"gradient-{number:06d}.npy"
        assert store.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert GradientStore(tmp_path, LAYOUT).open(number + 1, {number + 1: store.sha256}) == pytest.approx(
            square_through(number + 1), rel=1e-14
        )


@pytest.mark.parametrize("order", [1, -1])
def test_a_flipped_bit_is_found_by_whoever_reads_the_whole_state(tmp_path: Path, order: int):
    directory = tmp_path / "run" / "state"
    directory.mkdir(parents=True)
    store = with_rounds(directory, 2)
    recorded, path = store.sha256, directory / "gradient-000001.npy"
    whole = path.read_bytes()
    refused = rf"^--resume: got '{tmp_path}/run'; {path.name} is damaged: its sha256 is not the one that its commit put"
    head = len(whole) - 8 * SIZE
    for place in (head, head + 8 * 9 + 6, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ConfigError, match=refused):
            GradientStore(directory, LAYOUT).open(2, {2: recorded})
        back = GradientStore(directory, LAYOUT)
        back.go_on(2, {2: recorded})
        for user in (store, back):
            stage(user, 2, BUCKETS[::order])
            with pytest.raises(ConfigError, match=refused):
                user.commit(3)
            with pytest.raises(ConfigError, match=refused):
                user.save_mean(directory / "mean.safetensors", 2, 4)
    assert not (directory / "mean.safetensors").exists() and not (directory / "gradient-000002.npy").exists()
    path.write_bytes(whole)
    stage(store, 2)
    store.commit(3)


@pytest.mark.parametrize("step", ["begin", "add", "commit", "save_mean"])
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch):
    store = with_rounds(tmp_path, 1)
    staging = store.begin()
    if step == "commit":
        stage(store, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    steps: dict[str, Callable[[], object]] = {
        "begin": store.begin,
        "add": lambda: store.add(staging, 0, 9, part_of(1)[:9]),
        "commit": lambda: store.commit(2),
        "save_mean": lambda: store.save_mean(tmp_path / "mean.safetensors", 1, 4),
    }
    with monkeypatch.context() as patch:
        if step == "begin":
            patch.setattr("builtins.open", full)
        patch.setattr(Path, "replace", full)
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\).*--resume") as refused:
            steps[step]()
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)
    np.testing.assert_array_equal(opened(tmp_path, 1).read(0, SIZE), sum_through(1))


def test_memory_is_that_of_a_chunk_however_large_the_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(state_file, "CHUNK", 10_000)
    size, bucket = 2_000_000, np.ones(200_000, np.float32)
    store = GradientStore(tmp_path, ParameterLayout(("w",), ((size,),)))
    tracemalloc.start()
    store.open(0)
    for rounds in (1, 2):
        staging = store.begin()
        for start in range(0, size, len(bucket)):
            store.add(staging, start, start + len(bucket), bucket)
        assert store.commit(rounds) == size * rounds**2
    store.open(2)
    store.save_mean(tmp_path / "mean.safetensors", 2, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 10_000 * 8, "a few chunks of 80 kB; the vector has 16 MB"
    assert (safetensors.numpy.load_file(tmp_path / "mean.safetensors")["w"] == 1.0).all()


# Products of commits


def commit_in(store: GradientStore, number: int, window: int, buckets: tuple[tuple[int, int], ...] = BUCKETS) -> None:
    staging = store.begin(window)
    for start, stop in buckets:
        store.add(staging, start, stop, part_of(number)[start:stop])
    store.commit(number + 1)
    store.settle()


def cross_of(number: int, window: int) -> float:
    before = sum_through(number) - sum_through(window)
    return float(before @ part_of(number).astype(np.float64))


WINDOWS = (0, 0, 2, 2, 4, 5)
"""Of six commits: the third, fifth and sixth repeat a prompt of their window."""


def test_a_commit_has_its_product_with_the_earlier_commits_of_its_window(tmp_path: Path):
    store = opened(tmp_path)
    for number, window in enumerate(WINDOWS):
        commit_in(store, number, window, BUCKETS[::-1] if number % 2 else BUCKETS)
        assert store.cross == pytest.approx(cross_of(number, window), rel=1e-12, abs=1e-12)
        kept = {f"gradient-{rounds - 1:06d}.npy" for rounds in {window, number + 1} if rounds}
        assert set(names(tmp_path)) == kept, "the state at the window's start stays as long as the window"


def test_a_resumed_run_has_the_same_products_in_the_middle_of_a_window(tmp_path: Path):
    store = opened(tmp_path)
    for number, window in enumerate(WINDOWS[:3]):
        commit_in(store, number, window)
    again = GradientStore(tmp_path, LAYOUT)
    again.open(3, {2: "of another file"}, window=2)
    assert names(tmp_path) == ["gradient-000001.npy", "gradient-000002.npy"]
    again.open(3, {}, window=2)
    commit_in(again, 3, 2)
    assert again.cross == pytest.approx(cross_of(3, 2), rel=1e-12)


def test_a_commit_of_a_process_that_died_has_its_product_from_disk(tmp_path: Path):
    store = opened(tmp_path)
    for number, window in enumerate(WINDOWS[:3]):
        commit_in(store, number, window)
    staging = store.begin(2)
    for start, stop in BUCKETS:
        store.add(staging, start, stop, part_of(3)[start:stop])
    store.commit(4)
    again = GradientStore(tmp_path, LAYOUT)
    again.go_on(3, window=2)
    assert again.commit_once(staging, 4) == pytest.approx(square_through(4), rel=1e-12)
    assert again.cross == pytest.approx(store.cross, rel=1e-12)
    assert again.commit_once(staging, 4) == pytest.approx(square_through(4), rel=1e-12)
    assert again.cross == pytest.approx(store.cross, rel=1e-12), "a repeated call changes nothing"


def test_a_damaged_state_at_the_windows_start_is_refused(tmp_path: Path):
    directory = tmp_path / "run" / "state"
    directory.mkdir(parents=True)
    store = opened(directory)
    for number, window in enumerate(WINDOWS[:3]):
        commit_in(store, number, window)
    path = directory / "gradient-000001.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
    staging = store.begin(2)
    for start, stop in BUCKETS:
        store.add(staging, start, stop, part_of(3)[start:stop])
    with pytest.raises(ConfigError, match=rf"{path.name} is damaged: its sha256 is not the one"):
        store.commit(4)


@pytest.mark.parametrize("damaged", ["gradient-000001.npy", "gradient-000002.npy"])
def test_a_product_from_disk_is_refused_where_a_state_is_damaged(tmp_path: Path, damaged: str):
    directory = tmp_path / "run" / "state"
    directory.mkdir(parents=True)
    store = opened(directory)
    digests = {}
    for number, window in enumerate(WINDOWS[:3]):
        commit_in(store, number, window)
        digests[number + 1] = store.sha256
    staging = store.begin(2)
    for start, stop in BUCKETS:
        store.add(staging, start, stop, part_of(3)[start:stop])
    store.commit(4)
    path = directory / damaged
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
    again = GradientStore(directory, LAYOUT)
    again.go_on(3, digests, window=2)
    with pytest.raises(ConfigError, match=rf"{damaged} is damaged: its sha256 is not the one"):
        again.commit_once(staging, 4)
