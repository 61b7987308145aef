"""The writer's process dies at any point of a commit: the gradient on disk is that of the same commit undisturbed."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.answers import Answer
from support.failpoints import arm, disarm_all, fired
from support.light import BUCKET, LAYOUT, LightActor, here, light_config, light_prepared
from support.ray_runs import own, run_here, run_on

from ray_probe.cluster.actors import writer
from ray_probe.cluster.backend import RayBackend
from ray_probe.cluster.rounds.schedule import MAX_ATTEMPTS
from ray_probe.errors import ClusterError
from ray_probe.run.preparation.prepared import PreparedRun, baseline_rule
from ray_probe.run.progress import Progress

pytestmark = pytest.mark.cluster

ALWAYS = 1000
LAST = str(LAYOUT.size // BUCKET * BUCKET)  # where the last bucket starts


@pytest.fixture(scope="module")
def told() -> list[str]:
    """What the backend's log was told."""
    return []


@pytest.fixture(scope="module")
def alone(files: Path, told: list[str]) -> Iterator[RayBackend]:
    """A backend of one actor: its sums are formed in one order, so that what is written has the same bits each time."""
    with own(prepared(files), LightActor, bucket_numbers=BUCKET, log=told.append) as there:
        yield there


@pytest.fixture(scope="module")
def undisturbed(alone: RayBackend, files: Path) -> Answer:
    return run_on(alone, prepared(files), "undisturbed")


def prepared(files: Path, actors: int = 1, **output: Any) -> PreparedRun:
    return light_prepared(light_config(files, cluster={"actors": actors}, output=output))


def assert_bits(answer: Answer, other: Answer) -> None:
    """The same answer, with the same bits in the gradient, and no shard done again."""
    answer.assert_same(other)
    np.testing.assert_array_equal(answer.gradient, other.gradient)
    assert answer.result["gradient"]["norm_raw"] == pytest.approx(other.result["gradient"]["norm_raw"], rel=1e-14)
    assert answer.result["counts"]["shards_retried"] == 0


def assert_one_state(answer: Answer) -> None:
    left = sorted(path.name for path in answer.directory.state.glob("*gradient*"))
    assert left == [f"gradient-{len(answer.rounds) - 1:06d}.npy"]


POINTS = {
    "the first bucket comes": ("write_before_add", "0"),
    "the last bucket is on disk": ("write_after_add", LAST),
    "all are on disk": ("write_before_commit", "2"),
    "the sum is in place and nobody knows": ("write_after_commit", "2"),
    "the state before is there": ("write_before_settle", "2"),
    "the state before is removed": ("write_after_settle", "2"),
    "the first commit ever is in place": ("write_after_commit", "1"),
}


@pytest.mark.parametrize("case", POINTS)
def test_a_writer_that_is_killed_at_any_point_adds_every_commit_once(
    alone: RayBackend, undisturbed: Answer, points: Path, files: Path, told: list[str], case: str
) -> None:
    place, only = POINTS[case]
    arm(points, place, only=only)
    told.clear()
    answer = run_on(alone, prepared(files), case.replace(" ", "-"))
    assert fired(points, place) == 1
    assert_bits(answer, undisturbed)
    assert_one_state(answer)
    assert [text for text in told if text.startswith("writer: its process died; it goes on from")] == told != []


def test_a_writer_that_dies_between_two_rounds_goes_on_and_so_does_the_gradient_that_is_saved(
    alone: RayBackend, undisturbed: Answer, files: Path, points: Path
) -> None:
    killed: list[int] = []

    def killer(progress: Progress) -> None:
        if progress.round == 1 and progress.accumulated and not killed:
            killed.append(alone.writer.pid())
            os.kill(killed[0], signal.SIGKILL)

    arm(points, "write_after_settle", only="3")
    answer = run_on(alone, prepared(files, save_gradient=True), "between", lambda backend: killer)
    assert killed and fired(points, "write_after_settle") == 1
    assert_bits(answer, undisturbed)
    saved = load_file(answer.directory.gradient)
    mean = np.concatenate([saved[name].ravel() for name in LAYOUT.names])
    np.testing.assert_array_equal(mean, undisturbed.gradient / answer.result["counts"]["sequences"])


def test_deaths_of_the_writer_use_up_none_of_the_attempts_of_a_commit(
    alone: RayBackend, undisturbed: Answer, files: Path, points: Path
) -> None:
    arm(points, "write_before_add", times=MAX_ATTEMPTS, only=LAST)
    arm(points, "write_before_commit", times=MAX_ATTEMPTS, only="1")
    answer = run_on(alone, prepared(files), "often")
    assert fired(points, "write_before_add") == fired(points, "write_before_commit") == MAX_ATTEMPTS
    assert_bits(answer, undisturbed)
    assert_one_state(answer)


WINDOWS = [0, 0, 2, 2, 4, 5]
"""Of the commits of a run over 14 prompts, six a round, from the plan alone."""


DEATHS = ("write_after_add", "write_before_commit", "write_after_commit", "write_after_settle")


@pytest.mark.parametrize("actors", [1, 2])
@pytest.mark.parametrize("place", DEATHS)
def test_a_writer_that_dies_in_the_middle_of_a_window_loses_no_product_of_commits(
    backend: RayBackend, files: Path, points: Path, place: str, actors: int
) -> None:
    prompts = [f"prompt {number}" for number in range(14)]
    config = light_config(
        files, cluster={"actors": actors}, data={"prompts": prompts}, batch={"rounds": len(WINDOWS)},
        output={"name": f"{place}-{actors}"},
    )  # fmt: skip
    expected = run_here(light_prepared(config), f"here-{place}-{actors}", here(baseline_rule(config)))
    arm(points, place, only=LAST if place == "write_after_add" else "4")
    answer = run_on(backend, light_prepared(config), f"{place}-{actors}")
    assert fired(points, place) == 1
    assert [line.gradient_window for line in answer.rounds] == WINDOWS
    answer.assert_same(expected)
    for line, other in zip(answer.rounds, expected.rounds, strict=True):
        assert line.gradient_cross == pytest.approx(other.gradient_cross, rel=1e-6)  # float32 sums
    left = sorted(path.name for path in answer.directory.state.glob("*gradient*"))
    assert left == ["gradient-000004.npy", "gradient-000005.npy"], "the newest, and that at its window's start"


def test_a_writer_that_always_dies_ends_the_run_with_what_to_do(
    alone: RayBackend, undisturbed: Answer, files: Path, points: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MAX_DEATHS", 2)
    arm(points, "write_before_add", times=ALWAYS)
    with pytest.raises(ClusterError, match=r"^writer: its process died 3 times in one commit; .*--resume") as refused:
        run_on(alone, prepared(files), "always")
    assert refused.value.exit_code == 4 and "\n" not in str(refused.value)
    assert fired(points, "write_before_add") == 3
    disarm_all(points)
    assert_bits(run_on(alone, prepared(files), "after-all"), undisturbed)


def test_a_writer_and_an_actor_that_die_in_one_commit_cost_that_actors_shards_and_nothing_else(
    backend: RayBackend, reference: Answer, files: Path, points: Path
) -> None:
    arm(points, "write_after_add", only="1000")
    arm(points, "light_bucket", only="3000")
    answer = run_on(backend, prepared(files, actors=2), "both")
    assert fired(points, "write_after_add") == fired(points, "light_bucket") == 1
    answer.assert_same(reference)
    assert_one_state(answer)
    assert answer.result["counts"]["shards_retried"] >= 1 and answer.result["partial"] is False
