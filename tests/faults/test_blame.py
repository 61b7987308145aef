"""What is charged to a shard and what is not, what ends the run and what is mended: whole runs on light actors."""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray import cloudpickle
from support.answers import Answer
from support.failpoints import arm, fired
from support.light import BUCKET, LightActor, light_config, light_prepared
from support.ray_runs import noted, own, run_on

from ray_probe.cluster.backend import RayBackend
from ray_probe.cluster.pool.failure_policy import LESS_MEMORY
from ray_probe.cluster.rounds import commit_group
from ray_probe.cluster.rounds.fitter_monitor import FitterMonitor
from ray_probe.errors import NonFiniteError, OutputError
from ray_probe.run.preparation.prepared import PreparedRun
from ray_probe.run.progress import Listener, Progress

pytestmark = pytest.mark.cluster
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

ALWAYS = 1000


def prepared(files: Path, **sections: dict[str, Any]) -> PreparedRun:
    return light_prepared(light_config(files, **sections))


class Overflows(LightActor):
    """One shard's logits are no numbers, whoever samples it."""

    def collect(self, shard: Any, *arguments: Any) -> Any:
        if shard.id == "1/2":
            raise NonFiniteError("logits: the model gave NaN or infinity")
        return super().collect(shard, *arguments)


class NoDisk(LightActor):
    """The ledger's disk is full when shard 1/2 comes."""

    def collect(self, shard: Any, *arguments: Any) -> Any:
        if shard.id == "1/2":
            raise OutputError("ledger.jsonl: cannot be written (no space left)")
        return super().collect(shard, *arguments)


def test_one_shard_without_finite_logits_is_given_up_after_three_attempts_and_the_run_goes_on(
    files: Path, reference: Answer
) -> None:
    notes: list[str] = []
    run = prepared(files)
    with own(run, Overflows, bucket_numbers=BUCKET) as backend:
        answer = run_on(backend, run, "overflows", noted(notes))
    assert answer.result["partial"] == ["1/2"]
    assert answer.result["counts"]["shards"] == reference.result["counts"]["shards"] - 1
    told = [note for note in notes if note.startswith("shard 2 of round 2 failed (NonFiniteError: logits: ")]
    assert [note.split("; it is ")[1] for note in told] == ["tried again"] * 2 + ["given up after 3 attempts"]


def test_an_error_that_every_shard_would_meet_ends_the_run_at_once_in_its_own_words(files: Path) -> None:
    notes: list[str] = []
    run = prepared(files)
    with (
        own(run, NoDisk, bucket_numbers=BUCKET) as backend,
        pytest.raises(OutputError, match=r"^ledger\.jsonl: cannot be written \(no space left\)$"),
    ):
        run_on(backend, run, "no-disk", noted(notes))
    assert not any("shard" in note for note in notes)


def test_a_shard_is_not_charged_with_the_death_of_an_actor_that_was_idle(
    backend: RayBackend, files: Path, reference: Answer
) -> None:
    notes: list[str] = []
    run = prepared(files, cluster={"actors": 2})
    run_on(backend, run, "before")

    def listener(backend: RayBackend) -> Listener:
        os.kill(min(backend.pids.values()), signal.SIGKILL)
        time.sleep(1.0)
        return noted(notes)(backend)

    answer = run_on(backend, run, "idle-dead", listener)
    answer.assert_same(reference)
    answer.assert_each_record_once()
    assert answer.result["counts"]["shards_retried"] == 0
    assert not any("failed" in note for note in notes)


def test_a_shard_that_ends_its_actors_without_a_word_says_what_to_lower(
    backend: RayBackend, files: Path, points: Path
) -> None:
    arm(points, "roll_before_gradient", times=ALWAYS, only="1/2")
    notes: list[str] = []
    answer = run_on(backend, prepared(files), "memory", noted(notes))
    assert fired(points, "roll_before_gradient") == 3 and answer.result["partial"] == ["1/2"]
    told = [note for note in notes if note.startswith("shard 2 of round 2 failed")]
    assert [LESS_MEMORY in note for note in told] == [False, False, True]
    assert all("its process ended" in note and "on node" in note and "memory" in note for note in told)


def test_a_fitter_that_stands_still_is_made_again_from_its_ledger_and_the_run_goes_on(
    backend: RayBackend, files: Path, reference: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit_group, "FitterMonitor", partial(FitterMonitor, silent_s=2.0))
    frozen: list[psutil.Process] = []
    notes: list[str] = []

    def listener(backend: RayBackend) -> Listener:
        def listen(progress: Progress) -> None:
            noted(notes)(backend)(progress)
            if not frozen and progress.round == 1 and progress.collected == 1:
                frozen.append(psutil.Process(backend.fitter.pid()))
                frozen[0].suspend()

        return listen

    answer = run_on(backend, prepared(files), "frozen-fitter", listener)
    answer.assert_same(reference)
    answer.assert_each_record_once()
    assert not frozen[0].is_running()
    assert "fitter: no answer in 2 s; it is killed, and restarted from its ledger" in notes
    assert sum("fitter: restored from its ledger" in note for note in notes) == 1
    assert answer.result["counts"]["shards_retried"] == 0, "who delivered has waited"
