"""Runs on Ray actors: one answer for any number of actors, whoever dies. One cluster for the whole file."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from ray import cloudpickle
from ray.exceptions import ActorUnavailableError
from safetensors.numpy import load_file, save_file
from support.checkpoints import raw_config, write_checkpoint

from ray_probe.assembly import build_rollout
from ray_probe.cluster import pool as pool_module
from ray_probe.cluster.actors import RolloutActor
from ray_probe.cluster.backend import RayBackend, actor_options
from ray_probe.cluster.environment import env_to_start, environment, private_dir
from ray_probe.cluster.pool import Event, Pool
from ray_probe.cluster.round_work import RoundWork
from ray_probe.config import ProbeConfig, config_from_dict
from ray_probe.errors import CheckpointError, ClusterError
from ray_probe.fitter import Fitter
from ray_probe.offline_entropy_probe import InProcess, OfflineEntropyProbe
from ray_probe.preflight import Prepared, prepare
from ray_probe.progress import Listener, Progress
from ray_probe.rules import baseline_rule
from ray_probe.run_directory import RunDirectory
from ray_probe.tracker import Tracker

pytestmark = pytest.mark.cluster

FAKE_GPUS = 2
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with private_dir() as directory, environment(env_to_start(directory)):
        ray.init(
            address="local", num_cpus=8, num_gpus=FAKE_GPUS, include_dashboard=False, log_to_driver=False,
            object_store_memory=100_000_000, _temp_dir=os.path.join(directory, "r"),
        )  # fmt: skip
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


def configured(files: Path, **sections: dict[str, Any]) -> ProbeConfig:
    return config_from_dict(raw_config(files, **sections))


def backend_of(prepared: Prepared, **pool_options: Any) -> RayBackend:
    checkpoint = prepared.checkpoint
    return RayBackend(prepared.config, checkpoint.directory, prepared.policy_id, checkpoint.fingerprint, **pool_options)


class Answer:
    """What must be the same: beta to the bit, counts, and the gradient to rounding."""

    def __init__(self, result: dict[str, Any], directory: RunDirectory) -> None:
        self.result = result
        self.beta = result["beta"]
        self.counts = {k: v for k, v in result["counts"].items() if k not in ("actors", "shards_retried")}
        self.rounds = directory.finished_rounds()
        self.gradient = directory.restore(result["counts"]["rounds"])[1]

    def assert_same(self, other: "Answer") -> None:
        assert self.beta == other.beta
        assert self.counts == other.counts
        assert np.linalg.norm(self.gradient - other.gradient) <= 1e-5 * np.linalg.norm(other.gradient)


def in_process(files: Path, name: str, **sections: dict[str, Any]) -> Answer:
    prepared = prepare(configured(files, **sections))
    rollout = build_rollout(prepared.config, prepared.checkpoint.directory, prepared.policy_id)
    directory = RunDirectory.create(Path(prepared.config.output.dir), name)
    fitter = Fitter(baseline_rule(prepared.config), prepared.policy_id, directory.ledger)
    probe = OfflineEntropyProbe(prepared.config, prepared.plan, InProcess([rollout], fitter), directory)
    return Answer(probe.run(), directory)


def on_ray(
    files: Path,
    name: str,
    actors: int,
    listen: Callable[[RayBackend], Listener] = lambda backend: lambda progress: None,
    actor_class: type = RolloutActor,
    **sections: dict[str, Any],
) -> Answer:
    prepared: Prepared = prepare(configured(files, cluster={"actors": actors}, **sections))
    backend = backend_of(prepared, actor_class=actor_class)
    directory = RunDirectory.create(Path(prepared.config.output.dir), name)
    try:
        backend.start(wait_for=actors)
        backend.open(directory.ledger)
        probe = OfflineEntropyProbe(prepared.config, prepared.plan, backend, directory, listen(backend))
        return Answer(probe.run(), directory)
    finally:
        backend.close()


@pytest.fixture(scope="module")
def reference(files: Path) -> Answer:
    return in_process(files, "reference")


@pytest.mark.parametrize("actors", [1, 2, 3])
def test_any_number_of_actors_gives_the_in_process_answer(files: Path, reference: Answer, actors: int) -> None:
    answer = on_ray(files, f"actors-{actors}", actors)
    answer.assert_same(reference)
    assert answer.result["counts"]["shards_retried"] == 0
    assert answer.result["counts"]["actors"] == actors
    assert any(len(line["shards_by_actor"]) == actors for line in answer.rounds), "all of them took part"


def test_lagged_fit_on_actors_gives_the_in_process_answer(files: Path) -> None:
    lagged = {"estimator": {"baseline": {"fit": "lagged"}}}
    on_ray(files, "lagged-ray", 2, **lagged).assert_same(in_process(files, "lagged-here", **lagged))


@pytest.mark.parametrize(("phase", "minimum"), [("collected", 3), ("accumulated", 4)])
def test_a_killed_actor_costs_its_shards_a_retry_and_nothing_else(
    files: Path, reference: Answer, phase: str, minimum: int
) -> None:
    killed: list[int] = []

    def killer(backend: RayBackend) -> Listener:
        def listen(progress: Progress) -> None:
            if not killed and progress.round == 1 and getattr(progress, phase) >= minimum and len(backend.pids) == 2:
                killed.append(min(backend.pids.values()))
                os.kill(killed[0], signal.SIGKILL)

        return listen

    answer = on_ray(files, f"killed-{phase}", 2, killer)
    assert killed
    answer.assert_same(reference)
    assert answer.result["counts"]["shards_retried"] >= 1
    assert answer.result["partial"] is False


class Poisoned(RolloutActor):
    """A shard of round 1 fails in one of its halves, every time."""

    poison: tuple[str, int, int]

    def collect(self, shard: Any, fitter: Any, deadline_s: float) -> Any:
        self._check("collect", shard)
        return super().collect(shard, fitter, deadline_s)

    def accumulate(self, shard: Any, fit: Any) -> Any:
        self._check("accumulate", shard)
        return super().accumulate(shard, fit)

    def _check(self, half: str, shard: Any) -> None:
        if self.poison == (half, shard.round, shard.index):
            raise RuntimeError("this shard does not fit in memory, say")


@pytest.mark.parametrize("half", ["collect", "accumulate"])
def test_a_shard_that_always_fails_is_given_up_after_three_attempts_and_listed(
    files: Path, reference: Answer, half: str
) -> None:
    poisoned = type("PoisonedActor", (Poisoned,), {"poison": (half, 1, 2)})
    notes: list[str] = []
    answer = on_ray(files, f"poison-{half}", 2, lambda _: lambda p: notes.append(p.note or ""), poisoned)
    result, whole = answer.result, reference.result
    assert result["partial"] == ["1/2"]
    assert result["counts"]["shards"] == whole["counts"]["shards"] - 1
    assert result["counts"]["sequences"] == whole["counts"]["sequences"] - 3
    assert sum("shard 1/2 failed" in note for note in notes) == 3
    assert (result["beta"] == whole["beta"]) == (half == "accumulate"), "the fit may use a record without its gradient"


class LosesGradients:
    """A pool without processes: tasks are done at once, and the actor is gone whenever its gradient is asked for."""

    def __init__(self) -> None:
        self.actor, self.asked, self.events = 0, 0, list[Event]()

    @property
    def alive(self) -> list[int]:
        return [self.actor]

    idle = alive

    def forgive(self) -> None:
        pass

    def submit(self, actor: int, task: Any, method: str, *arguments: Any) -> None:
        collected, accumulated = SimpleNamespace(tokens=1), SimpleNamespace(sums=SimpleNamespace(advantage={}))
        self.events.append(Event(actor, task, (collected, "accepted") if method == "collect" else accumulated))

    def wait(self, timeout_s: float) -> list[Event]:
        events, self.events = self.events, []
        return events

    def ask(self, actor: int, method: str, *arguments: Any, deadline_s: float) -> Any:
        self.actor, self.asked = self.actor + 1, self.asked + 1
        raise ActorUnavailableError("out of memory, say", None)


def test_a_gradient_that_can_never_be_fetched_ends_the_run_with_its_cause(files: Path) -> None:
    pool = LosesGradients()
    shards = prepare(configured(files)).plan.round(0)
    tracker = Tracker(lambda progress: None, 1, "none", 1)
    work = RoundWork(shards, pool, None, lambda *asked: SimpleNamespace(version=1), tracker, lagged=False)
    with pytest.raises(ClusterError, match=r"round 0: .* could not be fetched 3 times, last: .*memory") as failed:
        work.run(size=5)
    assert failed.value.exit_code == 4 and pool.asked == 3


def test_a_replacement_refuses_weights_that_were_overwritten_and_the_rest_goes_on(
    tmp_path: Path, reference: Answer
) -> None:
    swapped: list[int] = []

    def swapper(backend: RayBackend) -> Listener:
        def listen(progress: Progress) -> None:
            if not swapped and progress.round == 1 and progress.collected >= 1:
                write_checkpoint(tmp_path / "model", seed=1)
                swapped.append(min(backend.pids.values()))
                os.kill(swapped[0], signal.SIGKILL)

        return listen

    raw_config(tmp_path)
    answer = on_ray(tmp_path, "swapped", 2, swapper)
    assert swapped
    answer.assert_same(reference)


def test_a_checkpoint_that_changed_before_the_start_is_refused(tmp_path: Path) -> None:
    prepared = prepare(config_from_dict(raw_config(tmp_path, cluster={"actors": 1})))
    write_checkpoint(tmp_path / "model", seed=1)
    backend = backend_of(prepared)
    with pytest.raises(CheckpointError, match=r"fingerprint .* the run measures") as refused:
        backend.start()
    backend.close()
    assert "\n" not in str(refused.value)


def test_a_cluster_without_free_room_is_told_with_what_is_asked_and_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "PLACE_DEADLINE_S", 1.0)
    taken = Pool(1, {"num_cpus": 8}, ("well",), lambda text: None, actor_class=Fake)
    taken.start()
    crowded = Pool(1, {"num_cpus": 1}, ("well",), lambda text: None, actor_class=Fake)
    with pytest.raises(ClusterError, match=r"each asks for 1 CPU, free are 0 CPU") as failed:
        crowded.start()
    crowded.close()
    taken.close()
    assert failed.value.exit_code == 4


def test_a_checkpoint_with_a_missing_tensor_is_refused_in_its_own_words(files: Path, tmp_path: Path) -> None:
    raw = raw_config(tmp_path, cluster={"actors": 1})
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    prepared = prepare(config_from_dict(raw))
    backend = backend_of(prepared)
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight") as refused:
        backend.start()
    backend.close()
    assert refused.value.exit_code == 2 and "\n" not in str(refused.value)


def test_a_gpu_run_without_cuda_ends_with_exit_code_4(files: Path) -> None:
    prepared = prepare(configured(files, cluster={"actors": 1, "gpus_per_actor": 1}))
    backend = backend_of(prepared)
    with pytest.raises(ClusterError, match="sees no CUDA device") as refused:
        backend.start()
    backend.close()
    assert refused.value.exit_code == 4


class Fake:
    """An actor without a model: what it does is said by its tasks."""

    def start(self, behaviour: str) -> dict[str, Any]:
        if behaviour == "crash":
            os._exit(1)
        if behaviour == "raise":
            raise RuntimeError("no such device")
        return {"pid": os.getpid(), "cpu": "a cpu"}

    def tokens_done(self) -> int:
        return 0

    def devices(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    def sleep(self, seconds: float) -> float:
        import time

        time.sleep(seconds)
        return seconds

    def fail(self) -> None:
        raise ValueError("out of memory, say")


def fake_pool(size: int, behaviour: str = "well", **options: Any) -> Pool:
    return Pool(size, {"num_cpus": 0}, (behaviour,), lambda text: None, actor_class=Fake, **options)


def test_the_probes_options_place_actors_on_different_gpus(files: Path) -> None:
    options = actor_options(configured(files, cluster={"gpus_per_actor": 1}))
    pool = Pool(FAKE_GPUS, options, ("well",), lambda text: None, actor_class=Fake)
    pool.start()
    while len(pool.alive) < FAKE_GPUS:
        pool.wait(1.0)
    devices = {pool.ask(actor, "devices", deadline_s=30) for actor in pool.alive}
    pool.close()
    assert devices == {"0", "1"}


@pytest.mark.parametrize(("behaviour", "cause"), [("crash", "ActorDiedError"), ("raise", "no such device")])
def test_actors_that_do_not_start_end_the_run_with_their_cause(behaviour: str, cause: str) -> None:
    pool = fake_pool(2, behaviour)
    with pytest.raises(ClusterError, match=cause) as failed:
        pool.start()
    assert failed.value.exit_code == 4 and "\n" not in str(failed.value)


def test_an_actor_whose_tokens_stand_still_is_killed_and_replaced() -> None:
    pool = fake_pool(1, stall_deadline_s=1.0)
    pool.start()
    stuck = pool.alive[0]
    pool.submit(stuck, "a task", "sleep", 600.0)
    events = []
    while not events:
        events = pool.wait(0.2)
    assert [(event.actor, event.task) for event in events] == [(stuck, "a task")]
    assert "no token" in str(events[0].died)
    while not pool.alive:
        pool.wait(1.0)
    assert pool.alive != [stuck]
    pool.close()


def test_a_failing_task_is_reported_and_its_actor_goes_on() -> None:
    pool = fake_pool(1)
    pool.start()
    actor = pool.alive[0]
    pool.submit(actor, "first", "fail")
    events = []
    while not events:
        events = pool.wait(0.2)
    assert events[0].error == "ValueError: out of memory, say" and events[0].died is None
    pool.submit(actor, "second", "sleep", 0.0)
    while not (events := pool.wait(0.2)):
        pass
    assert events[0].value == 0.0
    pool.close()
