"""The pool at work: what it does about actors that die, fail, stand still or are out of reach. No model in any."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from ray import cloudpickle
from ray.exceptions import ActorUnavailableError
from support.checkpoints import raw_config
from support.records import POLICY, rule

from ray_probe.cluster.actors.fitter import fitter_actor
from ray_probe.cluster.backend import actor_options
from ray_probe.cluster.head.environment import env_to_start, environment, private_dir
from ray_probe.cluster.pool import observe
from ray_probe.cluster.pool.failure_policy import MAX_FAILED_STARTS, MAX_REFUSALS, Decision
from ray_probe.cluster.pool.pool import Pool
from ray_probe.cluster.pool.worker import Event
from ray_probe.cluster.rounds.fitter_monitor import FitterMonitor
from ray_probe.config.loading import config_from_dict
from ray_probe.errors import CheckpointError, ClusterError, LedgerError, NonFiniteError, OutputError, ProbeError
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.run.messages import ActorFacts

pytestmark = pytest.mark.cluster

FAKE_GPUS = 2
DEADLINE_S = 60.0
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


class Fake:
    """An actor without a model: what it does is said by its tasks."""

    def __init__(self) -> None:
        self._tokens = 0

    def start(self, behaviour: str) -> ActorFacts:
        if behaviour.startswith("count "):
            Path(behaviour.removeprefix("count "), str(os.getpid())).touch()
            os._exit(1)
        if behaviour.startswith("once "):
            with contextlib.suppress(FileExistsError):
                Path(behaviour.removeprefix("once ")).touch(exist_ok=False)
                return ActorFacts(ParameterLayout((), ()), "cpu", 1, 0, pid=os.getpid())
            raise CheckpointError("model.path: it was overwritten")
        if behaviour.startswith("needs ") and not Path(behaviour.removeprefix("needs ")).exists():
            raise CheckpointError("model.path: no such directory")
        if behaviour == "crash":
            os._exit(1)
        if behaviour == "raise":
            raise RuntimeError("no such device")
        return ActorFacts(ParameterLayout((), ()), "cpu", 1, 0, pid=os.getpid())

    def tokens_done(self) -> int:
        return self._tokens

    def devices(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def sample(self, seconds: float) -> float:
        """Takes so long, with a token now and then."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            time.sleep(0.2)
            self._tokens += 1
        return seconds

    def fail(self, error: Exception) -> None:
        raise error

    def leave(self, code: int, words: str) -> None:
        print(words, file=sys.stderr, flush=True)
        if code < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(code)


@pytest.fixture
def pools() -> Iterator[Callable[..., Pool]]:
    made: list[Pool] = []

    def make(size: int, behaviour: str = "well", notes: list[str] | None = None, **options: Any) -> Pool:
        note = (lambda text: None) if notes is None else notes.append
        pool = Pool(size, options.pop("asked_of_ray", {"num_cpus": 0}), note, actor_class=Fake, **options)
        made.append(pool)
        pool.load(behaviour)
        return pool

    yield make
    for pool in made:
        pool.close()


def started(pool: Pool) -> Pool:
    pool.start(pool.asked)
    wait_for(pool, lambda: len(pool.idle) == pool.asked)
    return pool


def submit(pool: Pool, actor: int, task: str, method: str, *arguments: Any) -> None:
    pool.submit(actor, task, getattr(pool.handle(actor).actor, method).remote(*arguments))


def wait_for(pool: Pool, there: Callable[[], Any]) -> list[Event]:
    """Events until something is so."""
    events, give_up = list[Event](), time.monotonic() + DEADLINE_S
    while not there():
        assert time.monotonic() < give_up
        events += pool.wait(0.2)
    return events


def until_free(resource: str) -> None:
    """Ray takes a moment to release what killed actors of an earlier test held."""
    give_up = time.monotonic() + DEADLINE_S
    while not ray.available_resources().get(resource):
        assert time.monotonic() < give_up
        time.sleep(0.05)


def first_event(pool: Pool) -> Event:
    give_up = time.monotonic() + DEADLINE_S
    while time.monotonic() < give_up:
        if events := pool.wait(0.2):
            assert len(events) == 1
            return events[0]
    raise AssertionError("nothing happened")


def decided(event: Event) -> Decision:
    assert event.decision is not None
    return event.decision


def test_the_probes_options_place_actors_on_different_gpus(pools: Callable[..., Pool], tmp_path: Path) -> None:
    options = actor_options(config_from_dict(raw_config(tmp_path, cluster={"gpus_per_actor": 1})))
    pool = started(pools(FAKE_GPUS, asked_of_ray=options))
    devices = [pool.handle(actor).actor.devices.remote() for actor in pool.alive]
    assert set(ray.get(devices, timeout=30)) == {"0", "1"}


def test_a_cluster_without_free_room_is_told_with_what_is_asked_and_free(pools: Callable[..., Pool]) -> None:
    seat = {"num_cpus": 0, "resources": {"seat": 1}}
    started(pools(1, asked_of_ray=seat))
    crowded = pools(1, asked_of_ray=seat, place_deadline_s=1.0)
    for _ in ("a measurement", "the next"):
        with pytest.raises(ClusterError, match=r"each asks for 1 seat, free are 0 seat") as failed:
            crowded.start()
        assert failed.value.exit_code == 4
        crowded.load("well")


def test_one_actor_for_which_there_is_no_room_is_waited_for_while_another_works(pools: Callable[..., Pool]) -> None:
    until_free("seat")
    later, notes = [0.0], list[str]()
    options: dict[str, Any] = {"asked_of_ray": {"num_cpus": 0, "resources": {"seat": 1}}, "idle_deadline_s": 1e6}
    pool = pools(2, notes=notes, clock=lambda: time.monotonic() + later[0], start_deadline_s=120.0, **options)
    assert pool.census().starting == 0
    pool.tend()
    census = pool.census()
    assert (census.starting, census.waiting) == (1, None), "there was room for one"
    pool.start()
    census = pool.census()
    assert (census.starting, census.waiting) == (0, None), "the other may have room yet, and no report is made of it"
    for _ in range(100):
        later[0] += 4.0
        assert pool.wait(0.05) == []
    assert notes == [
        "actors: 1 of 2 wait for room: each asks for 1 seat, free are 0 seat; they start when other work leaves it"
    ]
    assert pool.census().waiting == notes[0] and pool.census().starting == 0
    assert [member.state for member in pool.census().members] == ["idle", "starting"], "nobody was ended for it"


@pytest.mark.parametrize(("behaviour", "cause"), [("crash", "its process ended"), ("raise", "no such device")])
def test_actors_that_do_not_start_end_the_run_with_their_cause(
    pools: Callable[..., Pool], behaviour: str, cause: str
) -> None:
    with pytest.raises(ClusterError, match=cause) as failed:
        pools(2, behaviour).start()
    assert failed.value.exit_code == 4 and "\n" not in str(failed.value)


def test_an_actor_that_always_crashes_is_started_three_times(pools: Callable[..., Pool], tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="none is left that starts"):
        pools(1, f"count {tmp_path}").start()
    assert len(list(tmp_path.iterdir())) == MAX_FAILED_STARTS


def test_a_checkpoint_that_was_overwritten_is_tried_three_times_and_not_again_in_later_rounds(
    pools: Callable[..., Pool], tmp_path: Path
) -> None:
    notes: list[str] = []
    pool = pools(2, f"once {tmp_path / 'loaded'}", notes)
    pool.start()
    wait_for(pool, lambda: "no more are started for this checkpoint" in "".join(notes))
    for _ in range(3):
        pool.forgive()  # a round begins
        for _ in range(5):
            pool.wait(0.1)
    refused = [note for note in notes if "CheckpointError: model.path: it was overwritten" in note]
    assert len(refused) == MAX_REFUSALS and len(pool.alive) == 1
    assert pool.started == 2 + MAX_REFUSALS - 1, "the last refusal is followed by no actor"
    pool.scale(2)
    wait_for(pool, lambda: pool.started > 2 + MAX_REFUSALS - 1)


def test_an_actor_that_finds_the_checkpoint_gone_between_two_measurements_waits_for_the_next(
    pools: Callable[..., Pool], tmp_path: Path
) -> None:
    checkpoint, notes = tmp_path / "checkpoint", list[str]()
    checkpoint.touch()
    pool = started(pools(1, f"needs {checkpoint}", notes))
    checkpoint.unlink()
    os.kill(pool.pids[0], signal.SIGKILL)
    give_up = time.monotonic() + DEADLINE_S
    while [member.state for member in pool.census().members] != ["no checkpoint"]:
        assert time.monotonic() < give_up
        pool.rest()
        time.sleep(0.05)
    assert "waits for the next (CheckpointError: model.path: no such directory)" in notes[-1], notes
    (before,) = pool.census().members
    pool.load("well")
    assert started(pool).alive == [before.number], "the process that is there loads the next one"


def test_an_actor_that_takes_too_long_to_start_is_given_up(pools: Callable[..., Pool]) -> None:
    class Slow(Fake):
        def start(self, behaviour: str) -> ActorFacts:
            time.sleep(600)
            return {}

    pool = Pool(1, {"num_cpus": 0}, lambda text: None, actor_class=Slow, start_deadline_s=1.0)
    pool.load("well")
    with pytest.raises(ClusterError, match=r"got 1, .* did not start in 1 s") as failed:
        pool.start()
    assert failed.value.exit_code == 4


def test_an_actor_whose_tokens_stand_still_is_killed_and_replaced_and_its_shard_charged(
    pools: Callable[..., Pool],
) -> None:
    pool = started(pools(1, stall_deadline_s=1.0))
    stuck = pool.alive[0]
    submit(pool, stuck, "a task", "sleep", 600.0)
    assert first_event(pool) == Event(
        stuck, "a task", decision=Decision("no token in 1 s", replace=True, shard="charged")
    )
    wait_for(pool, lambda: pool.alive)
    assert pool.alive != [stuck]


def test_a_frozen_actor_is_killed_at_its_deadline_and_its_process_ends(pools: Callable[..., Pool]) -> None:
    pool = started(pools(1, stall_deadline_s=1.0))
    actor, process = pool.alive[0], psutil.Process(pool.pids[pool.alive[0]])
    submit(pool, actor, "a task", "sample", 600.0)
    wait_for(pool, lambda: pool.census().members[0].tokens)
    process.suspend()
    event = first_event(pool)
    assert (event.actor, decided(event).cause, decided(event).shard) == (actor, "no token in 1 s", "charged")
    process.wait(DEADLINE_S)


def test_a_task_that_takes_long_is_left_alone_while_there_are_tokens(pools: Callable[..., Pool]) -> None:
    pool = started(pools(1, stall_deadline_s=3.0))
    submit(pool, pool.alive[0], "a task", "sample", 5.0)
    assert first_event(pool) == Event(pool.alive[0], "a task", 5.0)


def test_a_failing_task_is_charged_and_its_actor_goes_on(pools: Callable[..., Pool]) -> None:
    pool = started(pools(1))
    actor = pool.alive[0]
    for error, cause in (
        (ValueError("shapes"), "ValueError: shapes"),
        (NonFiniteError("logits: NaN"), "NonFiniteError: logits: NaN"),
    ):
        submit(pool, actor, "a task", "fail", error)
        assert first_event(pool) == Event(actor, "a task", decision=Decision(cause, shard="charged"))
    submit(pool, actor, "the last", "sleep", 0.0)
    assert first_event(pool) == Event(actor, "the last", 0.0)


@pytest.mark.parametrize("error", [OutputError("ledger: full"), LedgerError("damaged"), ClusterError("fitter: gone")])
def test_a_task_that_fails_for_the_whole_run_ends_it_in_its_own_words(
    pools: Callable[..., Pool], error: ProbeError
) -> None:
    pool = started(pools(1))
    submit(pool, pool.alive[0], "a task", "fail", error)
    with pytest.raises(type(error), match=str(error)) as ended:
        first_event(pool)
    assert ended.value.exit_code == error.exit_code
    pool.load("well")
    assert started(pool).idle, "the next measurement goes on with the actor"


@pytest.mark.parametrize(("code", "words", "by_memory"), [(-9, "loading", True), (-9, "SIGBUS received", False),
                                                          (3, "RuntimeError: no device", False)])  # fmt: skip
def test_a_death_at_a_task_is_charged_and_told_with_process_node_memory_and_last_words(
    pools: Callable[..., Pool], code: int, words: str, by_memory: bool
) -> None:
    notes: list[str] = []
    pool = started(pools(1, notes=notes))
    actor, pid = pool.alive[0], pool.pids[pool.alive[0]]
    submit(pool, actor, "a task", "leave", code, words)
    decision = decided(event := first_event(pool))
    assert (event.actor, event.task, decision.replace, decision.shard) == (actor, "a task", True, "charged")
    assert decision.by_memory is by_memory
    for part in ("its process ended", f"process {pid} on node", "memory", f"last words: {words}"):
        assert part in decision.cause and part in notes[0]


def test_an_actor_that_died_idle_is_given_nothing_and_what_it_had_is_told_lost(pools: Callable[..., Pool]) -> None:
    pool = started(pools(2))
    dead, other = pool.alive
    os.kill(pool.pids[dead], signal.SIGKILL)
    time.sleep(pool.limits.fresh_s + 0.1)
    assert pool.idle == [], "nobody is taken at a word that is old"
    events = list[Event]()
    while not events:
        events += pool.wait(0.2)
        assert dead not in pool.idle
    assert [(event.actor, event.task, decided(event).replace, decided(event).shard) for event in events] == [
        (dead, None, True, None)
    ]
    wait_for(pool, lambda: other in pool.idle)


def test_a_frozen_idle_actor_is_given_nothing_and_replaced(pools: Callable[..., Pool]) -> None:
    pool = started(pools(1, idle_deadline_s=2.0))
    frozen, process = pool.alive[0], psutil.Process(pool.pids[pool.alive[0]])
    process.suspend()
    time.sleep(pool.limits.fresh_s + 0.1)
    event = first_event(pool)
    assert (event.actor, event.task, decided(event).cause) == (frozen, None, "idle, and no answer in 2 s")
    wait_for(pool, lambda: pool.idle)
    assert frozen not in pool.alive


class Hiccups:
    """What Ray says while a node cannot be reached, so many times; then it is as it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.left = times
        monkeypatch.setattr(
            observe, "ray",
            SimpleNamespace(get=self.get, wait=ray.wait, available_resources=ray.available_resources),
        )  # fmt: skip

    def get(self, reference: Any, timeout: float) -> Any:
        if self.left > 0:
            self.left -= 1
            raise ActorUnavailableError("connection reset", None)
        return ray.get(reference, timeout=timeout)


def test_an_actor_out_of_reach_for_a_moment_is_replaced_and_its_shard_not_charged(
    pools: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = started(pools(2))
    actor = pool.idle[0]
    process = psutil.Process(pool.pids[actor])
    submit(pool, actor, "a task", "sleep", 0.0)
    with monkeypatch.context() as patched:
        Hiccups(patched, times=3)
        event = first_event(pool)
    assert (event.actor, event.task, decided(event).replace, decided(event).shard) == (actor, "a task", True, "spared")
    assert "was not reachable for a while" in decided(event).cause and "connection reset" in decided(event).cause
    process.wait(DEADLINE_S)  # what it was at can do no harm any more
    wait_for(pool, lambda: len(pool.idle) == 2)


def test_an_idle_actor_out_of_reach_for_a_moment_stays(
    pools: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = started(pools(1))
    before = pool.alive
    with monkeypatch.context() as patched:
        hiccups = Hiccups(patched, times=2)
        time.sleep(pool.limits.fresh_s + 0.1)
        assert wait_for(pool, lambda: hiccups.left == 0) == []
        assert pool.idle == [] and pool.census().members[0].state == "idle, not reachable"
        assert wait_for(pool, lambda: pool.idle) == []
    assert pool.idle == before


def test_an_actor_that_stays_out_of_reach_is_replaced_and_its_shard_not_charged(
    pools: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = started(pools(1, unreachable_deadline_s=2.0))
    submit(pool, actor := pool.idle[0], "a task", "sleep", 0.0)
    with monkeypatch.context() as patched:
        Hiccups(patched, times=1000)
        event = first_event(pool)
    assert (event.actor, event.task, decided(event).shard) == (actor, "a task", "spared")
    assert decided(event).cause.startswith("not reachable for 2 s (ActorUnavailableError")


def test_an_actor_that_is_said_to_be_out_of_reach_and_is_dead_is_told_dead(
    pools: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = started(pools(1))
    submit(pool, pool.idle[0], "a task", "leave", 3, "no device")
    with monkeypatch.context() as patched:
        Hiccups(patched, times=1)
        event = first_event(pool)
    assert (event.task, decided(event).shard) == ("a task", "charged")
    assert "its process ended" in decided(event).cause and "no device" in decided(event).cause


def test_a_pause_of_our_own_costs_no_actor_its_life(pools: Callable[..., Pool]) -> None:
    pause = [0.0]
    pool = started(pools(1, clock=lambda: time.monotonic() + pause[0], stall_deadline_s=12.0))
    submit(pool, actor := pool.idle[0], "a task", "sleep", 5.0)
    assert wait_for(pool, lambda: pool._workers[actor].tokens == 0) == []
    pause[0] = 1e6
    assert first_event(pool) == Event(actor, "a task", 5.0)


def test_a_fitter_that_answers_or_that_ray_makes_again_is_left_alone(tmp_path: Path) -> None:
    fitter, notes = fitter_actor({}, tmp_path / "fitter.json"), list[str]()
    fitter.open(rule(), POLICY, tmp_path / "ledger.jsonl")
    watch = FitterMonitor(fitter, notes.append, silent_s=6.0)
    before = fitter.pid()
    ends = time.monotonic() + 8.0
    while time.monotonic() < ends:
        watch.look()
        time.sleep(0.2)
        if before is not None and time.monotonic() > ends - 7.0:
            os.kill(before, signal.SIGKILL)
            before = None
    assert notes == [] and fitter.counts().openings == 2
    fitter.kill()
