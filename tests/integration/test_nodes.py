"""Nodes freeze, die, join and leave in the middle of a run: every shard counts once, the answer keeps its bits.

Nodes are raylets on this machine, with room for one rollout actor each; fitter and writer are on the head, which has
room for none. Where a test needs an actor to be in the middle of something, a gate holds it there: nothing is timed.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import cloudpickle
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _internal_kv_get
from rich.console import Console
from support.answers import Answer
from support.light import BUCKET, LightActor, here, light_config, light_prepared
from support.ray_runs import run_here

from ray_probe.cli.tables.service_tables import status_table
from ray_probe.cluster.controller_backend import RayControllerBackend
from ray_probe.cluster.head.environment import env_to_start, environment, on_loopback, private_dir
from ray_probe.controller.replies import Status
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation.prepared import PreparedRun, baseline_rule
from ray_probe.run.progress import Progress
from ray_probe.system.clock import utc_now

pytestmark = [pytest.mark.cluster, pytest.mark.own_cluster]

DEADLINE_S = 60.0
ROUNDS, SHARDS = 4, 6
HEALTH = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}  # fmt: skip
"""Ray notices a frozen node in about 4 s, by default in 65 s."""
TESTS = Path(__file__).parents[1]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(private_dir())
        os.mkdir(os.path.join(directory, "ray"))  # where Cluster leaves a note of its address
        variables = env_to_start(directory) | {"PYTHONPATH": paths, "RAY_TMPDIR": directory}
        stack.enter_context(environment(variables))
        stack.enter_context(on_loopback())
        head = {
            "num_cpus": 0, "include_dashboard": False, "object_store_memory": 100_000_000, "_system_config": HEALTH,
            "temp_dir": os.path.join(directory, "r"),
        }  # fmt: skip
        there = Cluster(initialize_head=True, head_node_args=head)
        stack.callback(there.shutdown)
        ray.init(address=there.address, log_to_driver=False, logging_level="ERROR")
        stack.callback(ray.shutdown)
        yield there


class Place:
    """A node with room for one actor."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._node = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
        self._raylet = psutil.Process(self._node.all_processes["raylet"][0].process.pid)

    @property
    def id(self) -> str:
        return str(self._node.node_id)

    def holds(self, pid: int) -> bool:
        """Whether this process is a worker of the node."""
        return psutil.Process(pid).ppid() == self._raylet.pid

    def signal(self, number: int) -> None:
        self._raylet.send_signal(number)

    def leave(self) -> None:
        """The node's processes are killed, workers that its raylet left behind too."""
        if self._node not in self._cluster.worker_nodes:
            return
        workers = self._raylet.children(recursive=True) if self._raylet.is_running() else []
        with contextlib.suppress(psutil.NoSuchProcess):
            self.signal(signal.SIGCONT)
        self._cluster.remove_node(self._node, allow_graceful=False)
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()


@pytest.fixture
def add(cluster: Cluster) -> Iterator[Callable[[], Place]]:
    """Adds nodes, which are gone after the test."""
    places: list[Place] = []

    def added() -> Place:
        places.append(Place(cluster))
        return places[-1]

    yield added
    for place in places:
        place.leave()


def until(found: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.02)
    raise AssertionError(f"in {DEADLINE_S:g} s there was no {what}")


def is_dead(place: Place) -> bool:
    return any(node["NodeID"] == place.id and not node["Alive"] for node in ray.nodes())


class Gates:
    """Hold the first actor that is given a shard to collect, until the gate is opened."""

    def __init__(self, directory: Path, *shards: str) -> None:
        self._directory = directory
        directory.mkdir()
        for shard in shards:
            self._file("shut", shard).touch()

    def _file(self, state: str, shard: str) -> Path:
        return self._directory / f"{state}-{shard.replace('/', '-')}"

    def pass_through(self, shard: str) -> None:
        """In the actor."""
        reached = self._file("reached", shard)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._file("shut", shard), reached)  # by one actor alone
            part = reached.with_name(f"{reached.name}.part")
            part.write_text(str(os.getpid()))
            part.rename(self._file("held", shard))
            until(self._file("open", shard).exists, f"key for {shard}")

    def held(self, shard: str) -> int:
        """The process that stands at the gate; waits for it."""
        return int(until(lambda: self._file("held", shard).exists(), f"actor at {shard}") and self._text(shard))

    def _text(self, shard: str) -> str:
        return self._file("held", shard).read_text()

    def open(self, shard: str) -> None:
        self._file("open", shard).touch()


class GatedActor(LightActor):
    gates: Gates

    def collect(self, shard: Any, *arguments: Any) -> Any:
        self.gates.pass_through(shard.id)
        return super().collect(shard, *arguments)


class Running:
    """A run in a thread of its own, on actors of its own; the test does meanwhile what it wants."""

    def __init__(self, prepared: PreparedRun, name: str, gates: Gates) -> None:
        self.notes: list[str] = []
        self.progress: list[Progress] = []
        self.directory = RunDirectory.create(Path(prepared.config.output.dir), name)
        self._prepared = prepared
        actor_class = type("GatedActor", (GatedActor,), {"gates": gates})
        self.workers = RayControllerBackend(
            prepared.config, self.notes.append, bucket_numbers=BUCKET, actor_class=actor_class
        )
        self._over = threading.Event()
        self._outcome: list[Any] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.workers.load(self._prepared, self._over.is_set, wait_for=self._prepared.config.cluster.actors)
            self.workers.open(self.directory, [])
            config, plan = self._prepared.config, self._prepared.plan
            probe = OfflineEntropyProbe(config, plan, self.workers, self.directory, self._listen, self._over.is_set)
            self._outcome.append(probe.run())
        except BaseException as error:
            self._outcome.append(error)

    def _listen(self, progress: Progress) -> None:
        self.progress.append(progress)
        self.notes += [] if progress.note is None else [progress.note]

    def in_round(self, number: int) -> bool:
        return any(progress.round >= number for progress in self.progress)

    def shown(self) -> str:
        """What `status` prints."""
        status = Status(
            name="mine", kind="run", state="measuring", directory=str(self.directory.path), since=utc_now(),
            draining=False, problem=None, measurement=None, progress=self.progress[-1], shards_retried=0, queued=(),
            ended=0, **self.workers.census(),
        )  # fmt: skip
        console = Console(width=120)
        with console.capture() as captured:
            console.print(status_table(status))
        return captured.get()

    def end(self) -> None:
        """Its actors are gone, wherever it is."""
        self._over.set()
        self.workers.close()
        self._thread.join(DEADLINE_S)

    @property
    def alive(self) -> int:
        return int(self.workers.census()["actors_alive"])

    def answer(self) -> Answer:
        self._thread.join(DEADLINE_S)
        assert self._outcome, "it has not ended"
        if isinstance(self._outcome[0], BaseException):
            raise self._outcome[0]
        return Answer(self._outcome[0], self.directory)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def prepared(files: Path, actors: int) -> PreparedRun:
    return light_prepared(light_config(files, cluster={"actors": actors}, batch={"rounds": ROUNDS}))


@pytest.fixture(scope="module")
def reference(files: Path) -> Answer:
    plan = prepared(files, 1)
    return run_here(plan, "reference", here(baseline_rule(plan.config)))


@pytest.fixture
def start(cluster: Cluster, files: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[Running, Gates]]]:
    """Starts a run whose actors are held at gates; its actors are gone after the test."""
    runs: list[Running] = []

    def started(actors: int, *shards: str) -> tuple[Running, Gates]:
        gates = Gates(tmp_path / "gates", *shards)
        runs.append(Running(prepared(files, actors), tmp_path.name, gates))
        return runs[-1], gates

    yield started
    for run in runs:
        run.end()


def test_a_frozen_nodes_actor_delivers_late_beside_its_replacement_and_its_shard_counts_once(
    add: Callable[[], Place], start: Callable[..., tuple[Running, Gates]], reference: Answer
) -> None:
    places = [add(), add()]
    run, gates = start(2, "1/0", "3/0")
    orphan = gates.held("1/0")
    (frozen,) = [place for place in places if place.holds(orphan)]
    frozen.signal(signal.SIGSTOP)
    until(lambda: is_dead(frozen), "word of the node's death")
    until(lambda: run.in_round(2), "round after that of the shard, which another actor has done")
    assert psutil.Process(orphan).is_running(), "nobody has told the worker"
    before = run.workers.fitter.counts()
    gates.open("1/0")
    after = until(
        lambda: (counts := run.workers.fitter.counts()).duplicates > before.duplicates and counts,
        "delivery from the worker of the frozen node",
    )
    assert (before.duplicates, after.duplicates, after.conflicts) == (0, 1, ())
    assert after.records >= 2 * SHARDS, "of whole rounds that are closed"
    gates.open("3/0")
    answer = run.answer()
    answer.assert_same(reference)
    answer.assert_each_record_once()
    assert answer.result["counts"]["shards_retried"] == 1
    assert any("its node is gone" in note and "1 of 2 left" in note for note in run.notes)


def test_a_run_goes_on_with_fewer_when_a_node_is_lost_and_with_all_when_one_joins_again(
    add: Callable[[], Place], start: Callable[..., tuple[Running, Gates]], reference: Answer
) -> None:
    places = [add(), add()]
    run, gates = start(2, "1/0", "2/5", "3/5")
    on_lost = gates.held("1/0")
    (lost,) = [place for place in places if place.holds(on_lost)]
    lost.signal(signal.SIGKILL)
    gates.held("2/5")  # the other actor has done round 1 alone
    census = run.workers.census()
    assert (census["actors_asked"], census["actors_alive"], census["nodes"]) == (2, 1, 2)
    assert "asked 2, have 1" in run.shown() and "1 missing" in run.shown()
    assert (run.progress[-1].actors_asked, run.progress[-1].actors_alive) == (2, 1)
    assert any("its node is gone" in note and "1 of 2 left" in note for note in run.notes)
    psutil.Process(on_lost).kill()
    add()
    until(lambda: run.alive == 2, "second actor on the node that has joined")
    gates.open("2/5")
    gates.held("3/5")
    assert "asked 2, have 2" in run.shown()
    told = [note for note in run.notes if note.startswith("actors: asked ")]
    assert told == ["actors: asked 2, have 1", "actors: asked 2, have 2"], "every change is told, and when it comes"
    gates.open("3/5")
    answer = run.answer()
    answer.assert_same(reference)
    answer.assert_each_record_once()
    assert [len(line.shards_by_actor) for line in answer.rounds][1:] == [1, 1, 2]
    assert (answer.result["counts"]["shards_retried"], answer.result["counts"]["actors"]) == (1, 2)


def requested() -> list[dict[str, float]]:
    """What the autoscaler is asked for."""
    bundles: list[dict[str, float]] = json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or b"[]")
    return bundles


def test_nodes_join_and_leave_during_a_run_and_plan_and_bits_stay(
    add: Callable[[], Place], start: Callable[..., tuple[Running, Gates]], reference: Answer
) -> None:
    add()
    run, gates = start(1, "0/5", "1/5", "2/5", "3/5")
    gates.held("0/5")
    scaled = run.workers.scale(3)
    assert (scaled.asked, scaled.room) == (3, 1)
    assert "requested 3 actors (1 CPU each), the cluster has room for 1" in scaled.messages[-1]
    assert requested() == [{"CPU": 1}] * 3, "the autoscaler is asked, were there one"
    assert "asked 3, have 1" in run.shown()
    second, _ = add(), add()
    until(lambda: run.alive == 3, "actors on the nodes that have joined")
    gates.open("0/5")
    gates.held("1/5")
    second.leave()
    until(lambda: run.alive == 2, "word of the actor that left with its node")
    gates.open("1/5")
    gates.held("2/5")
    assert "asked 3, have 2" in run.shown()
    gates.open("2/5")
    gates.open("3/5")
    answer = run.answer()
    answer.assert_same(reference)
    answer.assert_each_record_once()
    assert [len(line.shards_by_actor) for line in answer.rounds][2:] == [2, 2]
    run.workers.close()
    assert requested() == [], "what was asked of the autoscaler is taken back"
