"""The rollout actors: started, watched, replaced; one task at a time each.

An actor that died or stands still is never asked again: its process is killed, a new actor takes a new number, and
nothing that the old one may still deliver is read.
"""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ray_probe.cluster.actors import RolloutActor
from ray_probe.cluster.autopsy import cause_of_death
from ray_probe.cluster.calls import first_line, task_error
from ray_probe.cluster.worker import Event, Member, Worker, demand_of, member
from ray_probe.errors import ClusterError, ProbeError

START_DEADLINE_S = 600.0
STALL_DEADLINE_S = 300.0
WATCH_EVERY_S = 5.0
PLACE_DEADLINE_S = 30.0
PAUSE_S = 3 * WATCH_EVERY_S
MAX_FAILED_STARTS = 3


def fitter_lost(error: BaseException) -> ClusterError:
    """The error of a run whose fitter does not answer."""
    return ClusterError(f"fitter: does not answer ({first_line(error)}); go on with run --resume")


class Pool:
    """Keeps as many rollout actors going as are asked for, each with the same checkpoint loaded.

    Used by one thread; only `asked` may be set, and `members` read, by others.

    Args:
        size: actors asked for.
        options: `ray.remote` options of each (resources, environment, lifetime).
        on_note: told of deaths and replacements.
        clock: monotonic seconds.
        actor_class: the plain class that is wrapped; tests give their own.
        stall_deadline_s: a busy actor whose token count stands still for so long is killed.
        start_deadline_s: an actor must have loaded its checkpoint by then.
        prefix: actors are named `PREFIX/rollout-N`; None leaves them without a name.
        first: number of the first actor.
    """

    def __init__(
        self,
        size: int,
        options: dict[str, Any],
        on_note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        actor_class: type = RolloutActor,
        stall_deadline_s: float = STALL_DEADLINE_S,
        start_deadline_s: float = START_DEADLINE_S,
        prefix: str | None = None,
        first: int = 0,
    ) -> None:
        self.asked = size
        self._remote = ray.remote(actor_class)
        self._options = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": 2, **options}
        self._arguments: tuple[Any, ...] = ()
        self._note = on_note
        self._clock = clock
        self._stall_deadline_s = stall_deadline_s
        self._start_deadline_s = start_deadline_s
        self._prefix = prefix
        self._workers: dict[int, Worker] = {}
        self._version = -1
        self._refused = False
        self._next = first
        self._failed_starts = 0
        self._demand = demand_of(options)
        self.last_failure: str | None = None
        self._watched = clock()
        self.info: dict[str, Any] = {}

    @property
    def alive(self) -> list[int]:
        """Actors that have loaded the checkpoint at hand."""
        return [number for number, worker in self._workers.copy().items() if worker.loaded == self._version]

    @property
    def idle(self) -> list[int]:
        """Actors that wait for a task."""
        return [number for number in self.alive if self._workers[number].reference is None]

    @property
    def leaving(self) -> set[int]:
        """Actors too many: they take on nothing new, and go once nothing depends on them (see `release`)."""
        return {number for number, worker in self._workers.items() if worker.leaving}

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the actors that have loaded the checkpoint at hand."""
        return {number: self._workers[number].facts["pid"] for number in self.alive}

    @property
    def members(self) -> list[Member]:
        """Every actor and what it does."""
        return [member(number, worker, self._version) for number, worker in sorted(self._workers.copy().items())]

    def handle(self, actor: int) -> Any:
        """The Ray handle of an actor, for calls whose results stay in the object store."""
        return self._workers[actor].handle

    def load(self, *arguments: Any) -> None:
        """Have every actor, those to come too, call `RolloutActor.start` with these arguments.

        What comes of tasks that were given before is dropped.
        """
        self._arguments = arguments
        self._version += 1
        self._refused = False
        self.info = {}
        self.forgive()

    def forgive(self) -> None:
        """Try again to start what failed to: what kept actors from starting may be over."""
        self._failed_starts = 0

    def start(self, wait_for: int = 1, stop: Callable[[], bool] = lambda: False) -> None:
        """Returns when so many actors have loaded the checkpoint, or `stop` says so.

        Raises:
            ProbeError: what the checkpoint or the device of an actor is refused for.
            ClusterError: no actor started in time.
        """
        self.tend()
        while len(self.alive) < min(wait_for, self.asked) and not stop():
            self.wait(0.5)

    def tend(self) -> None:
        """Start actors that are missing, mark those that are too many, load what is to be loaded.

        Raises ClusterError when none is left and starting failed too often in a row.
        """
        self._mark_leaving()
        if len(self._workers) < self.asked and self._failed_starts < MAX_FAILED_STARTS:
            self._start_missing()
        if not self._workers:
            raise ClusterError(f"cluster.actors: got {self.asked}, and none is left that starts; {self.last_failure}")
        for worker in self._workers.values():
            if worker.reference is None and worker.loaded != self._version and not self._refused:
                self._submit(worker, None, "start", self._arguments)

    def submit(self, actor: int, task: Any, method: str, *args: Any) -> None:
        """Give an idle actor a task."""
        worker = self._workers[actor]
        assert worker.reference is None, "one task at a time"
        self._submit(worker, task, method, args)

    def wait(self, timeout_s: float) -> list[Event]:
        """What came of the tasks at hand within the time; starts missing actors and watches busy ones."""
        self.tend()
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
            self.remove(actor, cause_of_death(error))
            raise

    def remove(self, actor: int, cause: str) -> None:
        """Kill an actor for good; `wait` starts another."""
        worker = self._workers.pop(actor)
        ray.kill(worker.handle)
        self.last_failure = f"actor {actor}: {cause}"
        more = "another is started" if self._failed_starts < MAX_FAILED_STARTS else "no more are started in this round"
        if len(self._workers) >= self.asked:
            more = "it was leaving"
        self._note(f"actor {actor} is gone ({cause}); {len(self._workers)} of {self.asked} left, {more}")

    def release(self, actors: Collection[int]) -> None:
        """End these leaving actors: nothing depends on them any more."""
        for number in sorted(self.leaving & set(actors)):
            ray.kill(self._workers.pop(number).handle)
            self._note(f"actor {number} left; {len(self._workers)} of {self.asked} are there")

    def close(self) -> None:
        """Kill all actors."""
        workers, self._workers = self._workers, {}
        for worker in list(workers.values()):
            ray.kill(worker.handle)

    def _start_missing(self) -> None:
        """Start actors up to the number asked for; of each it is known whether there was room for it."""
        free = dict(ray.available_resources())
        while len(self._workers) < self.asked:
            had_room = all(free.get(name, 0.0) >= amount for name, amount in self._demand.items())
            if had_room:
                free |= {name: free[name] - amount for name, amount in self._demand.items()}
            self._workers[self._next] = Worker(self._create(self._next), self._clock(), had_room)
            self._next += 1

    def _create(self, number: int) -> Any:
        name = {} if self._prefix is None else {"name": f"{self._prefix}/rollout-{number}"}
        return self._remote.options(**self._options, **name).remote()

    def _submit(self, worker: Worker, task: Any, method: str, args: Sequence[Any]) -> None:
        worker.task, worker.reference = task, getattr(worker.handle, method).remote(*args)
        worker.version = self._version
        worker.since = worker.moved = self._clock()
        worker.tokens = -1

    def _mark_leaving(self) -> None:
        """Of too many actors those go that have not started, then the youngest; those that have no process at once."""
        order = sorted(self._workers.items(), key=lambda item: (item[1].loaded < 0, item[0]))
        for place, (number, worker) in enumerate(order):
            worker.leaving = place >= self.asked
            if worker.leaving and worker.loaded < 0:
                self.release([number])

    def _resolve(self, number: int) -> Event | None:
        worker = self._workers[number]
        task, worker.task = worker.task, None
        reference, worker.reference = worker.reference, None
        try:
            value = ray.get(reference, timeout=60)
        except RayTaskError as error:
            return self._failed(number, task, task_error(error))
        except RayError as error:
            self._failed_starts += worker.loaded < 0
            cause = cause_of_death(error)
            self.remove(number, cause)
            return self._current(worker, Event(number, task, died=cause))
        if task is not None:
            return self._current(worker, Event(number, task, value))
        if worker.version == self._version:
            worker.loaded, worker.facts, self._failed_starts, self.info = self._version, value, 0, value
        return None

    def _current(self, worker: Worker, event: Event) -> Event | None:
        """The event, unless its task was given for a checkpoint of before."""
        return event if worker.version == self._version else None

    def _failed(self, number: int, task: Any, cause: Exception) -> Event | None:
        worker = self._workers[number]
        if worker.version != self._version:
            return None
        if self._refused and task is None:
            return None  # as it was by another actor, which has been told
        if isinstance(cause, ProbeError) and (task is not None or not self.info):
            self._refused = task is None
            raise cause  # a replacement that cannot load what others have loaded is a failed start, no more
        if isinstance(cause, RayActorError):
            raise fitter_lost(cause) from cause
        if task is not None:
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
                self._look_at_idle(number, worker, now)
                continue
            if paused:
                worker.moved = now  # we stood still ourselves: nothing is known of the others
            self._count_tokens(worker, now)
            unheard = worker.loaded < 0 and worker.tokens < 0 and not worker.had_room
            if unheard and now - worker.since > PLACE_DEADLINE_S and self._no_room():
                worker.moved = now  # it has no process yet and gets one as soon as there is room: a node, say
            limit = self._stall_deadline_s if worker.task is not None else self._start_deadline_s
            if now - max(worker.since, worker.moved) > limit:
                cause = f"no token in {limit:.0f} s" if worker.task is not None else f"did not start in {limit:.0f} s"
                self._failed_starts += worker.task is None
                self.remove(number, cause)
                if (event := self._current(worker, Event(number, worker.task, died=cause))) is not None:
                    events.append(event)
        return events

    def _look_at_idle(self, number: int, worker: Worker, now: float) -> None:
        """Nothing tells of the death of an actor that has nothing to do, but that it does not answer."""
        if worker.heartbeat is None:
            if now - worker.moved > WATCH_EVERY_S:
                worker.moved = now
                worker.heartbeat = worker.handle.tokens_done.remote()
            return
        done, _ = ray.wait([worker.heartbeat], timeout=0)
        if done:
            reference, worker.heartbeat = worker.heartbeat, None
            try:
                worker.heard = ray.get(reference, timeout=1)
            except RayError as error:
                self.remove(number, cause_of_death(error))

    def _no_room(self) -> bool:
        """Whether no node has room for one more actor. Raises ClusterError when none works and none can be placed."""
        free = ray.available_resources()
        lacking = [name for name, amount in self._demand.items() if free.get(name, 0.0) < amount]
        if lacking and not any(worker.tokens >= 0 or worker.loaded >= 0 for worker in self._workers.values()):
            asked = ", ".join(f"{amount:g} {name}" for name, amount in self._demand.items())
            there = ", ".join(f"{free.get(name, 0.0):g} {name}" for name in self._demand)
            raise ClusterError(
                f"cluster.actors: got {self.asked}; none was placed in {PLACE_DEADLINE_S:.0f} s: each asks for {asked},"
                f" free are {there}; wait until others are done, or ask for less"
            )
        return bool(lacking)

    def _count_tokens(self, worker: Worker, now: float) -> None:
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
            worker.heard = tokens if tokens >= 0 else worker.heard
            if tokens != worker.tokens:
                worker.tokens = tokens
                worker.moved = now if worker.task is not None else worker.moved
            worker.heartbeat = None
