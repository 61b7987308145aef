"""The rollout actors: started, watched, replaced; one task at a time each.

An actor that died or stands still is never asked again: its process is killed, a new actor takes a new number, and
nothing that the old one may still deliver is read.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ray_probe.cluster.actors import RolloutActor
from ray_probe.errors import ClusterError, ProbeError

START_DEADLINE_S = 600.0
STALL_DEADLINE_S = 300.0
WATCH_EVERY_S = 5.0
PLACE_DEADLINE_S = 30.0
PAUSE_S = 3 * WATCH_EVERY_S
MAX_FAILED_STARTS = 3
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # Ray colours the names in its messages


@dataclass(frozen=True)
class Event:
    """Something that an actor's task came to.

    Attributes:
        actor: number of the actor.
        task: what it had been asked, as given to `submit`; None for its start.
        value: the task's result, or None.
        error: why the task failed (the actor lives), or None.
        died: why the actor is gone, or None.
    """

    actor: int
    task: Any
    value: Any = None
    error: str | None = None
    died: str | None = None


@dataclass
class _Worker:
    handle: Any
    started: bool = False
    task: Any = None
    reference: Any = None
    since: float = 0.0
    heartbeat: Any = None
    tokens: int = -1
    moved: float = 0.0


def _demand(options: dict[str, Any]) -> dict[str, float]:
    """Resources of one actor under Ray's names, zeros left out."""
    asked = {"CPU": options.get("num_cpus", 0), "GPU": options.get("num_gpus", 0), **options.get("resources", {})}
    return {name: float(amount) for name, amount in asked.items() if amount}


def task_error(error: Exception) -> Exception:
    """The exception that a remote method raised, in its own type where that is one of ours."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return cause if isinstance(cause, Exception) else error


def first_line(error: BaseException) -> str:
    """One line for people: the type and the first line of the text."""
    text = _COLOURS.sub("", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def fitter_lost(error: BaseException) -> ClusterError:
    """The error of a run whose fitter does not answer."""
    return ClusterError(f"fitter: does not answer ({first_line(error)}); go on with run --resume")


class Pool:
    """Keeps `size` rollout actors going.

    Args:
        size: actors asked for.
        options: `ray.remote` options of each (resources, environment).
        start_arguments: what `RolloutActor.start` is called with.
        on_note: told of deaths and replacements.
        clock: monotonic seconds.
        actor_class: the plain class that is wrapped; tests give their own.
        stall_deadline_s: a busy actor whose token count stands still for so long is killed.
        start_deadline_s: an actor must have loaded its checkpoint by then.
    """

    def __init__(
        self,
        size: int,
        options: dict[str, Any],
        start_arguments: tuple[Any, ...],
        on_note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        actor_class: type = RolloutActor,
        stall_deadline_s: float = STALL_DEADLINE_S,
        start_deadline_s: float = START_DEADLINE_S,
    ) -> None:
        self.size = size
        self._remote = ray.remote(actor_class).options(max_restarts=0, max_task_retries=0, max_concurrency=2, **options)
        self._arguments = start_arguments
        self._note = on_note
        self._clock = clock
        self._stall_deadline_s = stall_deadline_s
        self._start_deadline_s = start_deadline_s
        self._workers: dict[int, _Worker] = {}
        self._next = 0
        self._failed_starts = 0
        self._demand = _demand(options)
        self._last_death = "no actor has died"
        self._watched = clock()
        self.info: dict[str, Any] = {}
        self.pids: dict[int, int] = {}
        self.cpus: set[str | None] = set()

    @property
    def alive(self) -> list[int]:
        """Actors that have started."""
        return [number for number, worker in self._workers.items() if worker.started]

    @property
    def idle(self) -> list[int]:
        """Actors that wait for a task."""
        return [number for number in self.alive if self._workers[number].reference is None]

    @property
    def one_kind_of_cpu(self) -> bool:
        """Every actor so far computed on the same kind of CPU: then a shard's bytes are its own, whoever made them."""
        return len(self.cpus) == 1 and None not in self.cpus

    def forgive(self) -> None:
        """Try again to start what failed to: what kept actors from starting may be over."""
        self._failed_starts = 0

    def start(self, wait_for: int = 1) -> None:
        """Start all actors; returns when so many have loaded their checkpoint.

        Raises:
            ProbeError: what the checkpoint or the device of an actor is refused for.
            ClusterError: no actor started in time.
        """
        self.replenish()
        while len(self.alive) < wait_for:
            self.wait(1.0)

    def replenish(self) -> None:
        """Start an actor for each one that is missing, unless starting failed too often in a row."""
        while len(self._workers) < self.size and self._failed_starts < MAX_FAILED_STARTS:
            worker = _Worker(self._remote.remote(), since=self._clock())
            worker.reference = worker.handle.start.remote(*self._arguments)
            self._workers[self._next] = worker
            self._next += 1
        if not self._workers:
            raise ClusterError(f"cluster.actors: got {self.size}, and none is left that starts; {self._last_death}")

    def submit(self, actor: int, task: Any, method: str, *args: Any) -> None:
        """Give an idle actor a task."""
        worker = self._workers[actor]
        assert worker.reference is None, "one task at a time"
        worker.task, worker.reference = task, getattr(worker.handle, method).remote(*args)
        worker.since = worker.moved = self._clock()
        worker.tokens = -1

    def wait(self, timeout_s: float) -> list[Event]:
        """What came of the tasks at hand within the time; starts missing actors and watches busy ones."""
        self.replenish()
        by_reference = {worker.reference: number for number, worker in self._workers.items() if worker.reference}
        done, _ = ray.wait(list(by_reference), num_returns=len(by_reference), timeout=0) if by_reference else ([], [])
        if not done and by_reference:
            done, _ = ray.wait(list(by_reference), num_returns=1, timeout=timeout_s)
        events = [event for reference in done if (event := self._resolve(by_reference[reference])) is not None]
        return events + self._watch()

    def ask(self, actor: int, method: str, *args: Any, deadline_s: float) -> Any:
        """Call an idle actor and wait. Raises RayError when that fails, with the actor gone then."""
        try:
            return ray.get(getattr(self._workers[actor].handle, method).remote(*args), timeout=deadline_s)
        except RayError as error:
            self.remove(actor, first_line(error))
            raise

    def remove(self, actor: int, cause: str) -> None:
        """Kill an actor for good; `wait` starts another."""
        worker = self._workers.pop(actor)
        self.pids.pop(actor, None)
        ray.kill(worker.handle)
        self._last_death = f"actor {actor}: {cause}"
        more = "another is started" if self._failed_starts < MAX_FAILED_STARTS else "no more are started in this round"
        self._note(f"actor {actor} is gone ({cause}); {len(self._workers)} of {self.size} left, {more}")

    def close(self) -> None:
        """Kill all actors."""
        for worker in self._workers.values():
            ray.kill(worker.handle)
        self._workers = {}

    def _resolve(self, number: int) -> Event | None:
        worker = self._workers[number]
        task, worker.task = worker.task, None
        reference, worker.reference = worker.reference, None
        try:
            value = ray.get(reference, timeout=60)
        except RayTaskError as error:
            return self._failed(number, task, task_error(error))
        except RayError as error:
            self._failed_starts += not worker.started
            self.remove(number, first_line(error))
            return Event(number, task, died=first_line(error))
        if worker.started:
            return Event(number, task, value)
        worker.started, self._failed_starts, self.info = True, 0, value
        self.pids[number] = value["pid"]
        self.cpus.add(value["cpu"])
        return None

    def _failed(self, number: int, task: Any, cause: Exception) -> Event | None:
        started = self._workers[number].started
        if isinstance(cause, ProbeError) and (started or not self.info):
            raise cause  # a replacement that cannot load what others have loaded is a failed start, no more
        if isinstance(cause, RayActorError):
            raise fitter_lost(cause) from cause
        if started:
            return Event(number, task, error=first_line(cause))
        self._failed_starts += 1
        self.remove(number, first_line(cause))
        return Event(number, task, died=first_line(cause))

    def _watch(self) -> list[Event]:
        """Kill what stands still: by tokens done, never by wall time, which would favour short responses."""
        now, events = self._clock(), []
        paused, self._watched = now - self._watched > PAUSE_S, now
        for number, worker in list(self._workers.items()):
            if worker.reference is None:
                continue
            if paused:
                worker.moved = now  # we stood still ourselves: nothing is known of the others
            self._count_tokens(worker, now)
            limit = self._stall_deadline_s if worker.started else self._start_deadline_s
            if not worker.started and worker.tokens < 0 and now - worker.since > PLACE_DEADLINE_S:
                self._refuse_without_room()
            if now - max(worker.since, worker.moved) > limit:
                cause = f"no token in {limit:.0f} s" if worker.started else f"did not start in {limit:.0f} s"
                self._failed_starts += not worker.started
                self.remove(number, cause)
                events.append(Event(number, worker.task, died=cause))
        return events

    def _refuse_without_room(self) -> None:
        """An actor that has no process yet, and no room to get one. Raises ClusterError unless others work on."""
        free = ray.available_resources()
        lacking = [name for name, amount in self._demand.items() if free.get(name, 0.0) < amount]
        if lacking and not self.alive:
            asked = ", ".join(f"{amount:g} {name}" for name, amount in self._demand.items())
            there = ", ".join(f"{free.get(name, 0.0):g} {name}" for name in self._demand)
            raise ClusterError(
                f"cluster.actors: got {self.size}; none was placed in {PLACE_DEADLINE_S:.0f} s: each asks for {asked}, "
                f"free are {there}; wait until others are done, or ask for less"
            )

    def _count_tokens(self, worker: _Worker, now: float) -> None:
        if worker.heartbeat is None:
            if now - max(worker.since, worker.moved) > WATCH_EVERY_S:
                worker.heartbeat = worker.handle.tokens_done.remote()
            return
        done, _ = ray.wait([worker.heartbeat], timeout=0)
        if done:
            try:
                tokens = ray.get(worker.heartbeat, timeout=1)
            except Exception:  # the task's own reference tells of the death
                tokens = worker.tokens
            if tokens != worker.tokens:
                worker.tokens = tokens
                worker.moved = now if worker.started else worker.moved
            worker.heartbeat = None
