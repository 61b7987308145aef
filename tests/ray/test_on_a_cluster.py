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
from ray_probe.cluster.actors import FitterActor, RolloutActor
from ray_probe.cluster.backend import RayBackend, actor_options
from ray_probe.cluster.environment import env_to_start, environment, private_dir
from ray_probe.cluster.keepers import FitterKeeper, fitter_actor
from ray_probe.cluster.pool import Pool
from ray_probe.cluster.reduction import Reduction
from ray_probe.cluster.round_work import GroupWork
from ray_probe.cluster.worker import Event
from ray_probe.config import ProbeConfig, config_from_dict
from ray_probe.errors import CheckpointError, ClusterError, OutputError, RecordError, ShardError
from ray_probe.fitter import Counts
from ray_probe.in_process import InProcess
from ray_probe.messages import Delivery
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.preflight import prepare
from ray_probe.prepared import Prepared
from ray_probe.progress import Listener, Progress
from ray_probe.rules import baseline_rule
from ray_probe.run_directory import RunDirectory
from ray_probe.tracker import Tracker
from ray_probe.work import Stopped

pytestmark = pytest.mark.cluster

FAKE_GPUS = 2
BUCKET = 1000  # numbers: the model has several thousand
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with private_dir() as directory, environment(env_to_start(directory)):
        ray.init(
            address="local", num_cpus=8, num_gpus=FAKE_GPUS, resources={"seat": 1}, include_dashboard=False,
            log_to_driver=False, object_store_memory=100_000_000, _temp_dir=os.path.join(directory, "r"),
        )  # fmt: skip
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


def configured(files: Path, **sections: dict[str, Any]) -> ProbeConfig:
    return config_from_dict(raw_config(files, **sections))


class Answer:
    """What must be the same: beta to the bit, counts, and the gradient to rounding."""

    def __init__(self, result: dict[str, Any], directory: RunDirectory) -> None:
        self.result = result
        self.beta = result["beta"]
        self.counts = {k: v for k, v in result["counts"].items() if k not in ("actors", "shards_retried")}
        self.rounds = directory.finished_rounds()
        self.gradient = load_file(directory.state / f"gradient-{len(self.rounds) - 1:06d}.safetensors")["sum"]

    def assert_same(self, other: "Answer") -> None:
        assert self.beta == other.beta
        assert self.counts == other.counts
        assert np.linalg.norm(self.gradient - other.gradient) <= 1e-5 * np.linalg.norm(other.gradient)


def in_process(files: Path, name: str, **sections: dict[str, Any]) -> Answer:
    prepared = prepare(configured(files, **sections))
    rollout = build_rollout(prepared.config, prepared.checkpoint.directory, prepared.policy_id)
    directory = RunDirectory.create(Path(prepared.config.output.dir), name)
    backend = InProcess([rollout], baseline_rule(prepared.config), prepared.policy_id, directory)
    return Answer(OfflineEntropyProbe(prepared.config, prepared.plan, backend, directory).run(), directory)


@pytest.fixture(scope="module")
def shared(files: Path) -> Iterator[RayBackend]:
    """Actors that one run after the other uses, as those of a service: starting them is what takes time."""
    backend = RayBackend(configured(files), bucket_numbers=BUCKET)
    yield backend
    backend.close()


def on_ray(
    backend: RayBackend,
    files: Path,
    name: str,
    actors: int = 2,
    listen: Callable[[RayBackend], Listener] = lambda backend: lambda progress: None,
    **sections: dict[str, Any],
) -> Answer:
    """A run on so many actors of the backend."""
    prepared: Prepared = prepare(configured(files, cluster={"actors": actors}, **sections))
    directory = RunDirectory.create(Path(prepared.config.output.dir), name)
    backend._pool.asked = actors
    backend.load(prepared, wait_for=actors)
    backend.open(directory)
    probe = OfflineEntropyProbe(prepared.config, prepared.plan, backend, directory, listen(backend))
    return Answer(probe.run(), directory)


def on_own_actors(actor_class: type, files: Path, name: str, actors: int = 2, **options: Any) -> Answer:
    """A run on actors of its own."""
    backend = RayBackend(configured(files), bucket_numbers=BUCKET, actor_class=actor_class)
    try:
        return on_ray(backend, files, name, actors, **options)
    finally:
        backend.close()


@pytest.fixture(scope="module")
def reference(files: Path) -> Answer:
    return in_process(files, "reference")


@pytest.mark.parametrize("actors", [1, 2, 3])
def test_any_number_of_actors_gives_the_in_process_answer(
    shared: RayBackend, files: Path, reference: Answer, actors: int
) -> None:
    answer = on_ray(shared, files, f"actors-{actors}", actors)
    answer.assert_same(reference)
    assert answer.result["counts"]["shards_retried"] == 0
    assert answer.result["counts"]["actors"] == actors
    assert any(len(line["shards_by_actor"]) == actors for line in answer.rounds), "all of them took part"


def test_lagged_fit_on_actors_gives_the_in_process_answer(shared: RayBackend, files: Path) -> None:
    lagged = {"estimator": {"baseline": {"fit": "lagged"}}}
    on_ray(shared, files, "lagged-ray", **lagged).assert_same(in_process(files, "lagged-here", **lagged))


@pytest.mark.parametrize(("phase", "minimum"), [("collected", 3), ("accumulated", 4)])
def test_a_killed_actor_costs_its_shards_a_retry_and_nothing_else(
    shared: RayBackend, files: Path, reference: Answer, phase: str, minimum: int
) -> None:
    killed: list[int] = []

    def killer(backend: RayBackend) -> Listener:
        def listen(progress: Progress) -> None:
            if not killed and progress.round == 1 and getattr(progress, phase) >= minimum and len(backend.pids) == 2:
                killed.append(min(backend.pids.values()))
                os.kill(killed[0], signal.SIGKILL)

        return listen

    answer = on_ray(shared, files, f"killed-{phase}", listen=killer)
    assert killed
    answer.assert_same(reference)
    assert answer.result["counts"]["shards_retried"] >= 1
    assert answer.result["partial"] is False


def test_scaling_down_in_the_middle_of_a_commit_changes_no_bit_and_does_no_shard_again(
    shared: RayBackend, files: Path, reference: Answer
) -> None:
    alive: dict[int, int] = {}

    def scaler(backend: RayBackend) -> Listener:
        def listen(progress: Progress) -> None:
            alive[progress.round] = len(backend.pids)
            if progress.accumulated >= 3:
                backend._pool.asked = 1

        return listen

    answer = on_ray(shared, files, "scaled", 3, scaler, output={"commit_rounds": 2})
    answer.assert_same(reference)
    assert answer.result["counts"]["shards_retried"] == 0, "who leaves stays until its sum is committed"
    assert alive == {0: 3, 1: 3, 2: 1}
    assert list(answer.rounds[2]["shards_by_actor"]) == list(answer.rounds[1]["shards_by_actor"]), "who leaves has none"


class Poisoned(RolloutActor):
    """A shard of round 1 fails in one of its halves, every time."""

    poison: tuple[str, int, int]

    def collect(self, shard: Any, *arguments: Any) -> Any:
        self._check("collect", shard)
        return super().collect(shard, *arguments)

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
    listen = lambda _: lambda progress: notes.append(progress.note or "")  # noqa: E731
    answer = on_own_actors(poisoned, files, f"poison-{half}", listen=listen)
    result, whole = answer.result, reference.result
    assert result["partial"] == ["1/2"]
    assert result["counts"]["shards"] == whole["counts"]["shards"] - 1
    assert result["counts"]["sequences"] == whole["counts"]["sequences"] - 3
    assert sum("shard 1/2 failed" in note for note in notes) == 3
    assert (result["beta"] == whole["beta"]) == (half == "accumulate"), "the fit may use a record without its gradient"


class DiesInTheReduction(RolloutActor):
    """The first actor that is asked for the second bucket of a round is gone, once."""

    mark: str

    def bucket(self, start: int, stop: int, *others: Any) -> Any:
        if start > 0 and len(self._rollout.gradient_report(self._rollout._group).shards) > 0:
            try:
                os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os._exit(1)
        return super().bucket(start, stop, *others)


@pytest.mark.parametrize("actors", [1, 3])
def test_an_actor_that_dies_in_the_reduction_costs_its_shards_a_retry_and_nothing_else(
    files: Path, reference: Answer, tmp_path: Path, actors: int
) -> None:
    mark = str(tmp_path / "died")
    notes: list[str] = []
    mortal = type("Mortal", (DiesInTheReduction,), {"mark": mark})
    listen = lambda _: lambda progress: notes.append(progress.note or "")  # noqa: E731
    answer = on_own_actors(mortal, files, f"reduced-{actors}", actors, listen=listen)
    assert os.path.exists(mark)
    answer.assert_same(reference)
    assert answer.result["counts"]["shards_retried"] >= 1 and answer.result["partial"] is False
    assert any("before the commit" in note for note in notes)


class LosesGradients:
    """A pool without processes: tasks are done at once, and the actor is gone whenever its gradient is asked for."""

    leaving: tuple[int, ...] = ()
    asked = 1

    def __init__(self) -> None:
        self.actor, self.lost, self.events = 0, 0, list[Event]()

    @property
    def alive(self) -> list[int]:
        return [self.actor]

    idle = alive

    def forgive(self) -> None:
        pass

    def submit(self, actor: int, task: Any, method: str, *arguments: Any) -> None:
        collected = SimpleNamespace(tokens=1)
        accumulated = SimpleNamespace(
            round=0, shard=task.shard.index, version=1, own_left_out=True, sums=SimpleNamespace(advantage={})
        )
        self.events.append(Event(actor, task, collected if method == "collect" else accumulated))

    def wait(self, timeout_s: float) -> list[Event]:
        events, self.events = self.events, []
        return events

    def ask(self, actor: int, method: str, *arguments: Any, deadline_s: float) -> Any:
        self.actor, self.lost = self.actor + 1, self.lost + 1
        raise ActorUnavailableError("out of memory, say", None)


class FitsAnything:
    """A fitter that has always fitted version 1."""

    handle = opening = None

    def new_notes(self) -> list[str]:
        return []

    def ask(self, method: str, *arguments: Any) -> Any:
        if method == "counts":
            return Counts(0, 0, (), (), 0, 1)
        rule = SimpleNamespace(fit="leave_one_out")
        return {"version": 1} if method == "beta" else SimpleNamespace(version=1, round=0, rule=rule)


def work_on(pool: Any, stop: Callable[[], bool] = lambda: False) -> GroupWork:
    tracker = Tracker(lambda progress: None, 1, "none", 1)
    return GroupWork(pool, FitsAnything(), tracker, stop, lagged=False)


def test_a_gradient_that_can_never_be_fetched_ends_the_run_with_its_cause(files: Path) -> None:
    pool = LosesGradients()
    work = work_on(pool)
    work.run_round(prepare(configured(files)).plan.round(0))
    reduction = Reduction(pool, None, None, BUCKET, work.stop)
    with pytest.raises(ClusterError, match=r"round 0: .* could not be fetched 3 times, last: .*memory") as failed:
        work.commit(reduction, first=True)
    assert failed.value.exit_code == 4 and pool.lost == 3


def test_a_gradient_formed_under_another_version_than_the_plans_ends_the_run(files: Path) -> None:
    class Stale(LosesGradients):
        def submit(self, actor: int, task: Any, method: str, *arguments: Any) -> None:
            super().submit(actor, task, method, *arguments)
            if method == "accumulate":
                self.events[-1].value.version = 0

    with pytest.raises(ShardError, match=r"^shard 0/0: its baseline is version 0 .*; the plan asks for version 1"):
        work_on(Stale()).run_round(prepare(configured(files)).plan.round(0))


def test_work_that_is_to_stop_does_so_between_events(files: Path) -> None:
    class Slow(LosesGradients):
        def wait(self, timeout_s: float) -> list[Event]:
            assert timeout_s <= 1.0
            return []

    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        work_on(Slow(), lambda: next(asked)).run_round(prepare(configured(files)).plan.round(0))


@pytest.mark.parametrize("fit", ["leave_one_out", "lagged"])
def test_an_actor_killed_in_the_second_round_of_a_commit_has_both_rounds_shards_done_again(
    shared: RayBackend, files: Path, fit: str
) -> None:
    sections: dict[str, Any] = {
        "estimator": {"baseline": {"fit": fit}}, "output": {"commit_rounds": 2}, "batch": {"rounds": 4},
    }  # fmt: skip
    expected = in_process(files, f"group-here-{fit}", **sections)
    killed: list[int] = []

    def killer(backend: RayBackend) -> Listener:
        def listen(progress: Progress) -> None:
            if not killed and progress.round == 1 and progress.accumulated >= 3 and len(backend.pids) == 2:
                killed.append(min(backend.pids.values()))
                os.kill(killed[0], signal.SIGKILL)

        return listen

    answer = on_ray(shared, files, f"group-killed-{fit}", listen=killer, **sections)
    assert killed
    answer.assert_same(expected)
    assert [line["group"] for line in answer.rounds] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [line["fit"] for line in answer.rounds] == [line["fit"] for line in expected.rounds], "bit for bit"
    assert answer.rounds[0]["shards_retried"] >= 1, "its sums of the first round were lost with it"
    assert answer.result["partial"] is False and answer.result["conflicts"] == []


def test_commits_of_several_rounds_give_the_answer_of_single_ones(
    shared: RayBackend, files: Path, reference: Answer
) -> None:
    sections: dict[str, Any] = {"output": {"commit_rounds": 3, "save_gradient": True}}
    answer = on_ray(shared, files, "commit-3", **sections)
    answer.assert_same(reference)
    assert [line["group"] for line in answer.rounds] == [[0, 2]] * 3
    written = load_file(files / "runs" / "commit-3" / "gradient.safetensors")
    mean = answer.gradient / answer.result["counts"]["sequences"]
    assert sum(part.size for part in written.values()) == mean.size
    assert np.sqrt(sum((part**2).sum() for part in written.values())) == pytest.approx(np.linalg.norm(mean))
    assert answer.result["gradient"]["norm"] == pytest.approx(np.linalg.norm(mean))


def test_a_run_that_goes_on_has_the_writer_go_on_from_the_gradient_on_disk(
    shared: RayBackend, files: Path, reference: Answer
) -> None:
    prepared = prepare(configured(files, cluster={"actors": 2}))
    directory = RunDirectory.create(Path(prepared.config.output.dir), "gone-on")
    last: list[Progress] = []
    shared.load(prepared)
    shared.open(directory)
    stop = lambda: bool(last) and last[-1].round == 1 and last[-1].accumulated >= 2  # noqa: E731
    probe = OfflineEntropyProbe(prepared.config, prepared.plan, shared, directory, last.append, stop)
    with pytest.raises(Stopped):
        probe.run()
    assert probe.finished_rounds == 1 and probe.result() == probe.finish()
    shared.load(prepared)  # what the stopped measurement has left at work is of no interest any more
    shared.open(directory, [line["records"] for line in directory.finished_rounds()])
    again = OfflineEntropyProbe(prepared.config, prepared.plan, shared, directory)
    Answer(again.run(), directory).assert_same(reference)


def test_a_writer_that_cannot_write_ends_the_run_in_its_own_words(shared: RayBackend, files: Path) -> None:
    prepared = prepare(configured(files, cluster={"actors": 2}))
    directory = RunDirectory.create(Path(prepared.config.output.dir), "full")
    shared.load(prepared)
    shared.open(directory)
    directory.state.rmdir()
    with pytest.raises(OutputError, match=r"gradient\.staged: cannot be written"):
        OfflineEntropyProbe(prepared.config, prepared.plan, shared, directory).run()


@pytest.mark.parametrize("who", ["fitter", "writer"])
def test_a_run_whose_fitter_or_writer_dies_ends_and_the_next_gets_another(
    shared: RayBackend, files: Path, reference: Answer, who: str
) -> None:
    def killer(backend: RayBackend) -> Listener:
        def listen(progress: Progress) -> None:
            if progress.round == 1 and progress.accumulated == progress.shards:
                ray.kill(getattr(backend, f"_{who}").handle)

        return listen

    with pytest.raises(ClusterError, match=f"^{who}: does not answer") as failed:
        on_ray(shared, files, f"without-{who}", listen=killer)
    assert failed.value.exit_code == 4 and "\n" not in str(failed.value)
    on_ray(shared, files, f"with-another-{who}").assert_same(reference)


def test_the_fitter_answers_while_it_is_busy(files: Path) -> None:
    class Busy(FitterActor):
        def close_round(self, *arguments: Any) -> Any:
            import time

            time.sleep(3)

    remote = ray.remote(concurrency_groups={"queries": 2})(Busy)
    fitter = FitterKeeper("fitter", remote.options(num_cpus=0).remote())
    fitter.open_fitter(baseline_rule(configured(files)), "policy", files / "busy.jsonl")
    solving = fitter.handle.close_round.remote()
    assert fitter.ask("beta", 0, deadline_s=2)["version"] == fitter.ask("variance", deadline_s=2)["version"] == 0
    assert not ray.wait([solving], timeout=0)[0], "it is at it still"
    fitter.close()


def test_what_is_delivered_for_a_measurement_that_is_over_is_not_taken(files: Path) -> None:
    rule = baseline_rule(configured(files))
    fitter = fitter_actor({})
    late = fitter.open_fitter(rule, "policy", files / "first.jsonl").opening
    opening = fitter.open_fitter(rule, "policy", files / "second.jsonl").opening
    delivery = Delivery("policy", rule.features, 0, 0, np.zeros(3), "cpu")
    with pytest.raises(RecordError, match="of a measurement before"):
        fitter.ask("accept", late, delivery)
    with pytest.raises(RecordError, match="schema version"):
        fitter.ask("accept", opening, delivery)
    fitter.close()


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
    answer = on_own_actors(RolloutActor, tmp_path, "swapped", listen=swapper)
    assert swapped
    answer.assert_same(reference)


def test_a_checkpoint_that_changed_before_the_start_is_refused(tmp_path: Path) -> None:
    prepared = prepare(config_from_dict(raw_config(tmp_path, cluster={"actors": 1})))
    write_checkpoint(tmp_path / "model", seed=1)
    backend = RayBackend(prepared.config)
    with pytest.raises(CheckpointError, match=r"fingerprint .* the run measures") as refused:
        backend.load(prepared)
    backend.close()
    assert "\n" not in str(refused.value)


def test_a_cluster_without_free_room_is_told_with_what_is_asked_and_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "PLACE_DEADLINE_S", 1.0)
    seat = {"num_cpus": 0, "resources": {"seat": 1}}
    taken = Pool(1, seat, lambda text: None, actor_class=Fake)
    taken.load("well")
    taken.start()
    crowded = Pool(1, seat, lambda text: None, actor_class=Fake)
    crowded.load("well")
    with pytest.raises(ClusterError, match=r"each asks for 1 seat, free are 0 seat") as failed:
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
    backend = RayBackend(prepared.config)
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight") as refused:
        backend.load(prepared)
    backend.close()
    assert refused.value.exit_code == 2 and "\n" not in str(refused.value)


def test_a_gpu_run_without_cuda_ends_with_exit_code_4(files: Path) -> None:
    prepared = prepare(configured(files, cluster={"actors": 1, "gpus_per_actor": 1}))
    backend = RayBackend(prepared.config)
    with pytest.raises(ClusterError, match="sees no CUDA device") as refused:
        backend.load(prepared)
    backend.close()
    assert refused.value.exit_code == 4


class Fake:
    """An actor without a model: what it does is said by its tasks."""

    def start(self, behaviour: str) -> dict[str, Any]:
        if behaviour == "crash":
            os._exit(1)
        if behaviour == "raise":
            raise RuntimeError("no such device")
        return {"pid": os.getpid()}

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
    pool = Pool(size, {"num_cpus": 0}, lambda text: None, actor_class=Fake, **options)
    pool.load(behaviour)
    return pool


def test_the_probes_options_place_actors_on_different_gpus(files: Path) -> None:
    options = actor_options(configured(files, cluster={"gpus_per_actor": 1}))
    pool = Pool(FAKE_GPUS, options, lambda text: None, actor_class=Fake)
    pool.load("well")
    pool.start()
    while len(pool.alive) < FAKE_GPUS:
        pool.wait(1.0)
    devices = {pool.ask(actor, "devices", deadline_s=30) for actor in pool.alive}
    pool.close()
    assert devices == {"0", "1"}


@pytest.mark.parametrize(("behaviour", "cause"), [("crash", "its process ended"), ("raise", "no such device")])
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
