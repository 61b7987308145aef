"""Runs of real models on Ray actors: one answer for any number of actors, and for one that died.

What needs no model is tested in `tests/faults`, on actors that start in a moment. One cluster for the whole file.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from safetensors.numpy import load_file, save_file
from support.answers import Answer
from support.checkpoints import raw_config, write_checkpoint
from support.processes import actors_of
from support.ray_runs import quiet, run_here, run_on

from ray_probe.cluster.backend import RayBackend
from ray_probe.cluster.head.environment import env_to_start, environment, private_dir
from ray_probe.config.loading import config_from_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.errors import CheckpointError, ClusterError
from ray_probe.rollout.builder import RolloutBuilder, build_rollout
from ray_probe.run.preparation.prepare import prepare
from ray_probe.run.preparation.prepared import PreparedRun
from ray_probe.run.progress import Listener, Progress

pytestmark = pytest.mark.cluster

BUCKET = 1000  # numbers: the model has several thousand
DEADLINE_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with private_dir() as directory, environment(env_to_start(directory)):
        ray.init(
            address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000,
            _temp_dir=os.path.join(directory, "r"),
        )  # fmt: skip
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


def configured(files: Path, actors: int = 2, **sections: dict[str, Any]) -> ProbeConfig:
    return config_from_dict(raw_config(files, cluster={"actors": actors} | sections.pop("cluster", {}), **sections))


@pytest.fixture(scope="module")
def shared(files: Path) -> Iterator[RayBackend]:
    """Actors that one run after the other uses, as those of a service: starting them is what takes time."""
    backend = RayBackend(configured(files), bucket_numbers=BUCKET)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def reference(files: Path) -> Answer:
    prepared = prepare(configured(files))
    rollout = build_rollout(prepared.config, prepared.checkpoint.directory, prepared.policy_id)
    return run_here(prepared, "reference", [rollout])


def killer_of(killed: list[int], when: Callable[[Progress], bool]) -> Callable[[RayBackend], Listener]:
    """Kills one of two actors, once."""

    def killer(backend: RayBackend) -> Listener:
        def listen(progress: Progress) -> None:
            if not killed and len(backend.pids) == 2 and when(progress):
                killed.append(min(backend.pids.values()))
                os.kill(killed[0], signal.SIGKILL)

        return listen

    return killer


@pytest.mark.parametrize("actors", [3, 1, 2])
def test_any_number_of_actors_gives_the_in_process_answer(
    shared: RayBackend, files: Path, reference: Answer, actors: int
) -> None:
    answer = run_on(shared, prepare(configured(files, actors)), f"actors-{actors}", quiet)
    answer.assert_same(reference)
    answer.assert_each_record_once()
    assert answer.result["counts"]["shards_retried"] == 0
    assert answer.result["counts"]["actors"] == actors
    assert any(len(line.shards_by_actor) == actors for line in answer.rounds), "all of them took part"


@pytest.fixture(scope="module")
def against(files: Path) -> dict[str, dict[str, Any]]:
    """Sections of a comparison with another checkpoint, whose midpoint takes the place of both in every round."""
    return {
        "compare": {"against": str(write_checkpoint(files / "earlier", seed=1)), "parts": True},
        "batch": {"responses_per_prompt": 4},
    }


@pytest.fixture(scope="module")
def compared(files: Path, against: dict[str, dict[str, Any]]) -> Answer:
    prepared = prepare(configured(files, **against))
    assert prepared.against is not None
    places = [(one.directory, one.adapter) for one in (prepared.against, prepared.checkpoint)]
    comparison = RolloutBuilder().compare(prepared.config, places, prepared.policy_id)
    return run_here(prepared, "compared", [comparison])


@pytest.mark.parametrize("actors", [1, 3, 2])
def test_any_number_of_actors_finds_the_same_change_to_the_bit(
    shared: RayBackend, files: Path, against: dict[str, dict[str, Any]], compared: Answer, actors: int
) -> None:
    answer = run_on(shared, prepare(configured(files, actors, **against)), f"compared-{actors}", quiet)
    assert answer.result["change"]["total"]["value"] != 0 and answer.result["change"]["parts"]
    answer.assert_same(compared)
    answer.assert_each_record_once()


def test_a_killed_actor_changes_nothing_in_a_comparison(
    shared: RayBackend, files: Path, against: dict[str, dict[str, Any]], compared: Answer
) -> None:
    killed: list[int] = []
    killer = killer_of(killed, lambda progress: progress.round == 1 and progress.accumulated >= 2)
    answer = run_on(shared, prepare(configured(files, **against)), "compared-killed", killer)
    assert killed and answer.result["counts"]["shards_retried"] >= 1
    answer.assert_same(compared)
    answer.assert_each_record_once()


@pytest.mark.parametrize("role", ["FitterActor", "WriterActor"])
def test_a_killed_fitter_or_writer_changes_nothing_in_a_comparison(
    shared: RayBackend, files: Path, against: dict[str, dict[str, Any]], compared: Answer, role: str
) -> None:
    killed: list[int] = []

    def killer(backend: RayBackend) -> Listener:
        def listen(progress: Progress) -> None:
            if not killed and progress.round == 1 and progress.collected >= 2:
                process = actors_of(role)[-1]
                killed.append(process.pid)
                process.kill()

        return listen

    answer = run_on(shared, prepare(configured(files, **against)), f"compared-{role.lower()}", killer)
    assert killed
    answer.assert_same(compared)
    answer.assert_each_record_once()


def test_scaling_in_the_middle_of_a_comparison_leaves_the_same_bits(
    shared: RayBackend, files: Path, against: dict[str, dict[str, Any]], compared: Answer
) -> None:
    scaled: list[int] = []

    def scaler(backend: RayBackend) -> Listener:
        def listen(progress: Progress) -> None:
            if len(scaled) < 2 and progress.round == 1 + len(scaled) and progress.collected >= 1:
                scaled.append(3 - 2 * len(scaled))
                backend.pool.scale(scaled[-1])

        return listen

    answer = run_on(shared, prepare(configured(files, **against)), "compared-scaled", scaler)
    assert scaled == [3, 1]
    answer.assert_same(compared)
    answer.assert_each_record_once()


@pytest.mark.parametrize("room", [10**9, 40])
def test_one_pass_over_held_graphs_gives_the_answer_of_two_also_where_there_is_room_for_some_only(
    shared: RayBackend, files: Path, reference: Answer, room: int
) -> None:
    answer = run_on(shared, prepare(configured(files)), f"held-{room}", held_positions=room)
    answer.assert_same(reference)
    answer.assert_each_record_once()
    assert np.linalg.norm(answer.gradient - reference.gradient) <= 1e-6 * np.linalg.norm(reference.gradient)


def test_commits_of_several_rounds_give_the_answer_of_single_ones(
    shared: RayBackend, files: Path, reference: Answer
) -> None:
    prepared = prepare(configured(files, output={"commit_rounds": 3, "save_gradient": True}))
    answer = run_on(shared, prepared, "commit-3")
    answer.assert_same(reference)
    assert [line.group for line in answer.rounds] == [(0, 2)] * 3
    written = load_file(files / "runs" / "commit-3" / "gradient.safetensors")
    mean = answer.gradient / answer.result["counts"]["sequences"]
    assert sum(part.size for part in written.values()) == mean.size
    assert np.sqrt(sum((part**2).sum() for part in written.values())) == pytest.approx(np.linalg.norm(mean))
    assert answer.result["gradient"]["norm_raw"] == pytest.approx(np.linalg.norm(mean))


def test_a_killed_actor_with_the_graphs_that_it_held_costs_its_shards_a_retry_and_nothing_else(
    shared: RayBackend, files: Path, reference: Answer
) -> None:
    killed: list[int] = []
    killer = killer_of(killed, lambda progress: progress.round == 1 and progress.accumulated >= 3)
    answer = run_on(shared, prepare(configured(files)), "killed", killer, held_positions=10**9)
    assert killed
    answer.assert_same(reference)
    answer.assert_each_record_once()
    assert answer.result["counts"]["shards_retried"] >= 1


def test_a_replacement_refuses_weights_that_were_overwritten_and_the_rest_goes_on(
    shared: RayBackend, tmp_path: Path, reference: Answer
) -> None:
    killed: list[int] = []

    def overwritten(progress: Progress) -> bool:
        if progress.round != 1 or progress.collected < 1:
            return False
        write_checkpoint(tmp_path / "model", seed=1)
        return True

    prepared = prepare(configured(tmp_path))
    answer = run_on(shared, prepared, "swapped", killer_of(killed, overwritten))
    assert killed
    answer.assert_same(reference)
    deadline = time.monotonic() + DEADLINE_S
    while "the run measures" not in str(shared.pool.last_failure):
        assert time.monotonic() < deadline
        shared.pool.wait(0.5)


def refused(shared: RayBackend, prepared: PreparedRun, kind: type[Exception], text: str) -> Any:
    """What a service's actors answer to a checkpoint; they go on with the next."""
    shared.pool.scale(1)
    with pytest.raises(kind, match=text) as error:
        shared.load(prepared)
    assert "\n" not in str(error.value)
    return error.value


def test_a_checkpoint_that_changed_before_the_start_is_refused(shared: RayBackend, tmp_path: Path) -> None:
    prepared = prepare(configured(tmp_path))
    write_checkpoint(tmp_path / "model", seed=1)
    refused(shared, prepared, CheckpointError, r"fingerprint .* the run measures")


def test_a_checkpoint_that_lost_a_tensor_is_refused_in_its_own_words(shared: RayBackend, tmp_path: Path) -> None:
    config = configured(tmp_path)
    prepared = prepare(config)
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    missing = r"missing: model\.layers\.1\.mlp\.up_proj\.weight"
    assert refused(shared, prepared, CheckpointError, missing).exit_code == 2
    with pytest.raises(CheckpointError, match=missing):
        prepare(config)


def test_a_gpu_run_without_cuda_ends_with_exit_code_4(shared: RayBackend, files: Path) -> None:
    prepared = prepare(configured(files, cluster={"gpus_per_actor": 1}))
    assert refused(shared, prepared, ClusterError, "sees no CUDA device").exit_code == 4
