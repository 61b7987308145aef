"""Rollout actors die, stand still or fail: every shard is counted once, and the answer is that of one process."""

import os
import signal
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from support.answers import Answer, counted
from support.failpoints import arm, fired
from support.light import BUCKET, LAYOUT, POLICY, here, light_run
from support.light_rollout import LightRollout
from support.ray_runs import noted, run_here, run_on

from ray_probe.cluster.backend import RayBackend
from ray_probe.fitter.fitter import Fitter
from ray_probe.run.messages import ShardKey
from ray_probe.run.preparation.prepared import PreparedRun, baseline_rule
from ray_probe.run.progress import Listener, Progress

pytestmark = pytest.mark.cluster

SHARDS = 6
ALWAYS = 1000
DEADLINE_S = 30.0


def kill_once(when: Callable[[Progress], bool], killed: list[int], sent: int = signal.SIGKILL):
    """Sends a signal to the actor with the smallest pid, once both work and the run is so far."""

    def listener(backend: RayBackend) -> Listener:
        def listen(progress: Progress) -> None:
            if not killed and when(progress) and len(backend.pids) == 2:
                killed.append(min(backend.pids.values()))
                os.kill(killed[0], sent)

        return listen

    return listener


@pytest.mark.parametrize("actors", [4, 1, 2])
def test_any_number_of_actors_gives_the_answer_of_one_process(
    backend: RayBackend, files: Path, reference: Answer, actors: int
) -> None:
    answer = run_on(backend, light_run(files, actors), f"actors-{actors}")
    answer.assert_same(reference)
    answer.assert_each_record_once()
    assert answer.result["counts"]["shards_retried"] == 0
    assert answer.result["counts"]["actors"] == actors
    assert any(len(line.shards_by_actor) == actors for line in answer.rounds), "all of them took part"


def test_a_light_actor_imports_nothing_heavy(backend: RayBackend, files: Path) -> None:
    run_on(backend, light_run(files), "light")
    handles = [backend.pool.handle(actor) for actor in backend.pool.alive]
    assert len(handles) == 2
    assert ray.get([handle.actor.heavy.remote() for handle in handles], timeout=DEADLINE_S) == [[], []]


KILLS = [  # where, of how many actors, how many shards are done again, of how many the record was in
    ("roll_before_send", "1/0", 2, 1, 0), ("roll_after_send", "1/0", 2, 1, 1), ("roll_before_send", "1/3", 1, 4, 3),
    ("roll_after_send", "1/3", 1, 4, 4), ("roll_before_gradient", "1/3", 1, 6, 6),
]  # fmt: skip


@pytest.mark.parametrize(("place", "only", "actors", "retried", "duplicates"), KILLS)
def test_an_actor_that_is_killed_costs_its_shards_a_retry_and_nothing_else(
    backend: RayBackend,
    files: Path,
    points: Path,
    reference: Answer,
    place: str,
    only: str,
    actors: int,
    retried: int,
    duplicates: int,
) -> None:
    arm(points, place, only=only)
    answer = run_on(backend, light_run(files, actors), f"killed-{place}-of-{actors}")
    assert fired(points, place) == 1
    answer.assert_same(reference)
    answer.assert_each_record_once()
    counts = backend.fitter.counts()
    assert (counts.records, counts.conflicts) == (3 * SHARDS, ())
    assert answer.result["counts"]["shards_retried"] == retried, "all that it had, and no other"
    assert counts.duplicates == duplicates, "what was in already is delivered again, and not added"


def without(
    prepared: PreparedRun, record: Collection[ShardKey], gradient: Collection[ShardKey]
) -> tuple[Any, np.ndarray]:
    """Beta and gradient of a run in which these shards' records, and gradients, were left out."""
    rule = baseline_rule(prepared.config)
    rollout, fitter = LightRollout(rule, POLICY), Fitter(rule, POLICY)
    rollout.begin("all rounds")
    for number in range(3):
        shards = [shard for shard in prepared.plan.round(number) if shard.key not in record]
        for shard in shards:
            fitter.accept(rollout.collect(shard).delivery)
        fit = fitter.close_round(number, [shard.index for shard in shards])
        for shard in (shard for shard in shards if shard.key not in gradient):
            rollout.accumulate(shard, fit)
    return fitter.beta(), rollout.bucket(0, LAYOUT.size)


@pytest.mark.parametrize("action", ["kill", "raise"])
@pytest.mark.parametrize("place", ["roll_before_send", "roll_before_gradient"])
def test_a_shard_that_always_fails_is_given_up_after_three_attempts_and_the_others_count(
    backend: RayBackend, files: Path, points: Path, reference: Answer, place: str, action: str
) -> None:
    arm(points, place, action, times=ALWAYS, only="1/2")
    notes: list[str] = []
    run = light_run(files)
    answer = run_on(backend, run, f"poison-{place}-{action}", noted(notes))
    result, whole = answer.result, reference.result
    assert fired(points, place) == 3
    assert result["partial"] == ["1/2"] and result["conflicts"] == []
    assert [counted(line) for line in answer.rounds] == [[0, 1, 2, 3, 4, 5], [0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert result["counts"]["shards"] == whole["counts"]["shards"] - 1
    assert result["counts"]["sequences"] == whole["counts"]["sequences"] - 3
    beta, gradient = without(run, [(1, 2)] if place == "roll_before_send" else [], [(1, 2)])
    assert answer.beta == beta.to_json(), "the fit may use a record without its gradient"
    assert np.linalg.norm(answer.gradient - gradient) <= 1e-5 * np.linalg.norm(gradient)
    told = [note for note in notes if note.startswith("shard 2 of round 2 failed")]
    assert len(told) == 3 and "given up after 3 attempts" in told[-1]
    cause = f"failpoint {place} 1/2" if action == "raise" else "its process ended"
    assert all(cause in note for note in told)


@pytest.mark.parametrize("actors", [1, 3])
def test_an_actor_that_dies_in_the_reduction_costs_its_shards_a_retry_and_nothing_else(
    backend: RayBackend, files: Path, points: Path, reference: Answer, actors: int
) -> None:
    arm(points, "light_bucket", only=str(2 * BUCKET))
    notes: list[str] = []
    answer = run_on(backend, light_run(files, actors), f"reduced-{actors}", noted(notes))
    assert fired(points, "light_bucket") == 1
    answer.assert_same(reference)
    answer.assert_each_record_once()
    assert answer.result["counts"]["shards_retried"] >= 1
    assert any("before the commit" in note for note in notes)


@pytest.mark.parametrize("fit", ["leave_one_out", "lagged"])
def test_an_actor_killed_in_the_second_round_of_a_commit_has_both_rounds_shards_done_again(
    backend: RayBackend, files: Path, fit: str
) -> None:
    sections: dict[str, Any] = {
        "estimator": {"baseline": {"fit": fit}}, "output": {"commit_rounds": 2}, "batch": {"rounds": 4},
    }  # fmt: skip
    run, killed = light_run(files, **sections), list[int]()
    expected = run_here(run, f"group-here-{fit}", here(baseline_rule(run.config)))
    in_second = kill_once(lambda progress: progress.round == 1 and progress.accumulated >= 3, killed)
    answer = run_on(backend, run, f"group-killed-{fit}", in_second)
    assert killed
    answer.assert_same(expected)
    answer.assert_each_record_once()
    assert [line.group for line in answer.rounds] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert answer.rounds[0].shards_retried >= 1, "its sums of the first round were lost with it"
