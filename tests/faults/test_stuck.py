"""Rollout actors that stand still are replaced, those that take long are not; and actors that cannot be started."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.answers import Answer
from support.failpoints import arm, fired
from support.light import BUCKET, LightActor, here, light_run, slow
from support.ray_runs import noted, own, run_here, run_on

from ray_probe.cluster.backend import RayBackend
from ray_probe.errors import ClusterError
from ray_probe.run.preparation.prepared import baseline_rule
from ray_probe.run.progress import Listener, Progress

pytestmark = pytest.mark.cluster

ALWAYS = 1000
STALL_S = 1.5
START_S = 60.0  # about 2 s on a machine that has nothing else to do; actors are given ten minutes to start


@pytest.fixture(scope="module")
def watched(files: Path) -> Iterator[RayBackend]:
    """Actors that may stand still for a moment only."""
    with own(light_run(files), slow(0.05), bucket_numbers=BUCKET, stall_deadline_s=STALL_S) as there:
        yield there


def test_an_actor_that_is_frozen_is_killed_and_its_shards_are_done_again(
    watched: RayBackend, files: Path, reference: Answer
) -> None:
    frozen: list[psutil.Process] = []
    notes: list[str] = []

    def freezer(backend: RayBackend) -> Listener:
        def listen(progress: Progress) -> None:
            noted(notes)(backend)(progress)
            busy = [actor.pid for actor in backend.pool.census().members if actor.state.startswith("collect")]
            if not frozen and progress.round == 1 and progress.collected >= 1 and busy:
                frozen.append(psutil.Process(busy[0]))
                frozen[0].suspend()

        return listen

    answer = run_on(watched, light_run(files), "frozen", freezer)
    assert frozen[0].pid not in watched.pids.values()
    answer.assert_same(reference)
    answer.assert_each_record_once()
    assert answer.result["counts"]["shards_retried"] >= 1
    assert any("no token" in note for note in notes)
    frozen[0].wait(START_S)  # Ray ends a process that does not answer after some seconds


def test_an_actor_whose_tokens_stand_still_is_killed_and_its_shards_are_done_again(
    watched: RayBackend, files: Path, points: Path, reference: Answer
) -> None:
    arm(points, "roll_before_send", "sleep", only="1/0", seconds=600)
    notes: list[str] = []
    answer = run_on(watched, light_run(files), "asleep", noted(notes))
    assert fired(points, "roll_before_send") == 1
    answer.assert_same(reference)
    answer.assert_each_record_once()
    assert answer.result["counts"]["shards_retried"] == 1
    assert any("no token" in note for note in notes)


def test_a_shard_that_takes_long_but_moves_is_left_alone(files: Path) -> None:
    run = light_run(files, batch={"prompts_per_round": 2, "responses_per_prompt": 12, "rounds": 1})
    notes: list[str] = []
    with own(run, slow(1.5 * STALL_S), bucket_numbers=BUCKET, stall_deadline_s=STALL_S) as backend:
        answer = run_on(backend, run, "long", noted(notes))
    answer.assert_same(run_here(run, "long-here", here(baseline_rule(run.config))))
    assert (answer.result["counts"]["shards_retried"], notes) == (0, [])


@pytest.mark.parametrize("place", ["light_init", "light_start"])
@pytest.mark.parametrize(("action", "cause"), [("kill", "its process ended"), ("raise", "failpoint {place}")])
def test_actors_that_cannot_be_started_end_the_run_with_their_cause_in_seconds(
    files: Path, points: Path, place: str, action: str, cause: str
) -> None:
    arm(points, place, action, times=ALWAYS)
    run, started = light_run(files), time.monotonic()
    with own(run, LightActor) as backend, pytest.raises(ClusterError, match=cause.format(place=place)) as failed:
        backend.load(run)
    assert time.monotonic() - started < START_S
    assert failed.value.exit_code == 4 and "\n" not in str(failed.value)
    assert fired(points, place) < 10, "no endless restarts"


def test_a_run_goes_on_with_the_actors_it_has_when_no_other_can_be_started(
    backend: RayBackend, files: Path, points: Path, reference: Answer
) -> None:
    notes: list[str] = []
    killed: list[int] = []

    def killer(backend: RayBackend) -> Listener:
        def listen(progress: Progress) -> None:
            noted(notes)(backend)(progress)
            if not killed and progress.round == 1 and progress.collected == 1:
                arm(points, "light_start", "raise", times=3)
                killed.append(min(backend.pids.values()))
                os.kill(killed[0], signal.SIGKILL)

        return listen

    answer = run_on(backend, light_run(files), "alone", killer)
    answer.assert_same(reference)
    answer.assert_each_record_once()
    assert answer.result["partial"] is False
