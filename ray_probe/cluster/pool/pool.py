"""The rollout actors: started, watched, replaced; one task at a time each.

What `lookout` sees of them is decided on by `supervision` and carried out here. An actor that died or stands still is
never asked again: its process is killed, a new actor takes a new number, and nothing that the old one may still deliver
is read.
"""

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from ray_probe.cluster.actors import actor_names
from ray_probe.cluster.actors.rollout import RolloutActor
from ray_probe.cluster.pool.death_report import autopsy
from ray_probe.cluster.pool.failure_policy import (
    WAIT,
    Fault,
    Limits,
    Raised,
    RestartBudget,
    Situation,
    decide,
    refuses_the_checkpoint,
)
from ray_probe.cluster.pool.observe import Done, Observer
from ray_probe.cluster.pool.worker import Event, Member, Worker, demand_of, member
from ray_probe.errors import CheckpointError, ClusterError
from ray_probe.run.messages import ActorFacts


class Pool:
    """Keeps as many rollout actors going as are asked for, each with the same checkpoint loaded.

    Used by one thread; only `asked` may be set, and `members` read, by others.

    Args:
        size: actors asked for.
        options: `ray.remote` options of each (resources, environment, lifetime).
        on_note: told of deaths and replacements.
        clock: monotonic seconds.
        actor_class: the plain class that is wrapped; tests give their own.
        prefix: actors are named `PREFIX/rollout-N`; None leaves them without a name.
        first: number of the first actor.
        limits: those of `Limits` that differ from its own, by name.
    """

    def __init__(
        self,
        size: int,
        options: Mapping[str, Any],
        on_note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        actor_class: type = RolloutActor,
        prefix: str | None = None,
        first: int = 0,
        **limits: float,
    ) -> None:
        self.asked = size
        self._remote = ray.remote(actor_class)
        self._options = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": 2, **options}
        self._demand = demand_of(options)
        self._arguments: tuple[Any, ...] = ()
        self._note = on_note
        self._limits = Limits(**limits)
        self._lookout = Observer(clock, self._limits, self._demand)
        self._prefix = prefix
        self._workers: dict[int, Worker] = {}
        self._version = -1
        self._refused = False
        self._resting = False
        self._next = first
        self._starts = RestartBudget()
        self._reported_waiting = False
        self.last_failure: str | None = None
        self.info: ActorFacts | None = None

    @property
    def alive(self) -> list[int]:
        """Actors that have loaded the checkpoint at hand."""
        return [number for number, worker in self._workers.copy().items() if worker.loaded == self._version]

    @property
    def idle(self) -> list[int]:
        """Actors that wait for a task and were alive a moment ago: one that died idle costs no shard an attempt.

        The others are asked by `wait`, which returns as soon as one answers.
        """
        known = self._lookout.now() - self._limits.fresh_s
        return [n for n in self.alive if self._workers[n].waits and self._workers[n].heard_at >= known]

    @property
    def leaving(self) -> set[int]:
        """Actors too many: they take on nothing new, and go once nothing depends on them (see `release`)."""
        return {number for number, worker in self._workers.items() if worker.leaving}

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the actors that have loaded the checkpoint at hand."""
        facts = {number: self._workers[number].facts for number in self.alive}
        return {number: known.pid for number, known in facts.items() if known is not None}

    @property
    def members(self) -> list[Member]:
        """Every actor and what it does."""
        return [member(number, worker, self._version) for number, worker in sorted(self._workers.copy().items())]

    @property
    def starting(self) -> int:
        """Actors that start or load the current checkpoint, without those that no node had room for."""
        workers = self._workers.copy().values()
        at_it = [worker for worker in workers if worker.reference is not None and worker.loaded != self._version]
        return sum(worker.placed or worker.had_room for worker in at_it)

    @property
    def waiting(self) -> str | None:
        """How many actors no node has room for, in one line; None where all have room."""
        seen = [worker.no_room for worker in self._workers.copy().values() if worker.waits_for_room]
        if not seen or seen[0] is None:
            return None
        room = f"each asks for {seen[0].asked}, free are {seen[0].free}"
        return f"actors: {len(seen)} of {self.asked} wait for room: {room}; they start when other work leaves it"

    def handle(self, actor: int) -> Any:
        """The Ray handle of an actor, for calls whose results stay in the object store."""
        return self._workers[actor].handle

    def load(self, *arguments: Any) -> None:
        """Have every actor, those to come too, call `RolloutActor.start` with these arguments.

        What comes of tasks that were given before is dropped.
        """
        self._arguments = arguments
        self._version += 1
        self._refused = self._resting = False
        self.info = None
        self.try_again()

    def forgive(self) -> None:
        """Try again to start what failed to, for another reason than a refused checkpoint: that may be over."""
        self._starts.forgive()

    def try_again(self) -> None:
        """Try again to start what failed to, whatever it failed of."""
        self._starts.reset()

    def rest(self) -> None:
        """Look after the actors between two checkpoints, and end those that are too many.

        One that cannot load the checkpoint before, whose files may be gone by now, waits for the next.
        """
        self._resting = True
        self.wait(0.0)
        self.release(self.leaving)

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

        Raises ClusterError when none is left and none is started any more.
        """
        self._mark_leaving()
        if len(self._workers) < self.asked and self._starts.go_on(self.asked):
            self._start_missing()
        if not self._workers:
            raise ClusterError(f"cluster.actors: got {self.asked}, and none is left that starts; {self.last_failure}")
        for worker in self._workers.values():
            if worker.waits and worker.loaded != self._version and not self._refused:
                worker.submit(None, self._version, "start", self._arguments, self._lookout.now())

    def submit(self, actor: int, task: Any, method: str, *args: Any) -> None:
        """Give an idle actor a task."""
        self._workers[actor].submit(task, self._version, method, args, self._lookout.now())

    def wait(self, timeout_s: float) -> list[Event]:
        """What came of the tasks at hand within the time; starts missing actors and watches all.

        Raises ProbeError: a fault that concerns the whole run.
        """
        self.tend()
        answers, events = self._lookout.answers(self._workers.values(), timeout_s), list[Event | None]()
        for number, worker in list(self._workers.items()):
            seen = self._lookout.seen(worker, answers, self.asked)
            events.append(self._over(number, seen.value) if isinstance(seen, Done) else self._faced(number, seen))
        self._report_waiting()
        return [event for event in events if event is not None]

    def ask(self, actor: int, method: str, *args: Any, deadline_s: float) -> Any:
        """Call an idle actor and wait. Raises RayError when that fails, with the actor gone then."""
        try:
            return ray.get(getattr(self._workers[actor].handle, method).remote(*args), timeout=deadline_s)
        except RayError as error:
            self.remove(actor, autopsy(error).cause)
            raise

    def remove(self, actor: int, cause: str, refused: bool = False) -> None:
        """Kill an actor for good; `wait` starts another, unless the checkpoint is refused again and again."""
        worker = self._workers.pop(actor)
        ray.kill(worker.handle)
        self.last_failure = f"actor {actor}: {cause}"
        self._starts.lost(worker.doing, refused)
        more = "another is started" if self._starts.go_on(self.asked) else "no more are started in this round"
        if self._starts.refused:
            more = "no more are started for this checkpoint, unless `scale` asks for them"
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
            name = {} if self._prefix is None else {"name": actor_names.rollout(self._prefix, self._next)}
            handle = self._remote.options(**self._options, **name).remote()
            self._workers[self._next] = Worker(handle, had_room, self._lookout.now())
            self._next += 1

    def _mark_leaving(self) -> None:
        """Of too many actors those go that have not started, then the youngest; those that have no process at once."""
        order = sorted(self._workers.items(), key=lambda item: (item[1].loaded < 0, item[0]))
        for place, (number, worker) in enumerate(order):
            worker.leaving = place >= self.asked
            if worker.leaving and worker.loaded < 0:
                self.release([number])

    def _report_waiting(self) -> None:
        """Say once that actors wait for room, and again when they do after a while without."""
        waiting = self.waiting
        if waiting is not None and not self._reported_waiting:
            self._note(waiting)
        self._reported_waiting = waiting is not None

    def _stop_loading(self, number: int, cause: str) -> None:
        if not self._refused:
            self.last_failure = f"actor {number}: {cause}"
            self._note(f"actor {number} cannot load what was measured last, and waits for the next ({cause})")
        self._refused = True

    def _over(self, number: int, value: Any) -> Event | None:
        """What an actor was given is done."""
        worker = self._workers[number]
        task, worker.task, worker.doing = worker.task, None, "idle"
        if worker.version != self._version:
            return None
        if task is not None:
            return Event(number, task, value)
        worker.loaded, worker.facts, self.info = self._version, value, value
        self._starts.worked()
        return None

    def _faced(self, number: int, fault: Fault) -> Event | None:
        """Do what is decided about a fault; a task given for a checkpoint of before is nobody's any more."""
        worker, workers = self._workers[number], self._workers.values()
        if self._resting and isinstance(fault, Raised) and isinstance(fault.error, CheckpointError):
            self._stop_loading(number, fault.cause)
        placed = any(other.placed for other in workers)
        situation = Situation(worker.doing, self.info is not None, self._refused, placed)
        decision, current = decide(fault, situation, self._limits), worker.version == self._version
        over = isinstance(fault, Raised)
        if decision == WAIT and not over:
            return None
        if over and not decision.replace:
            worker.doing = "idle"
        task, worker.task = worker.task, None
        if decision.error is not None and (current or not over):
            self._refused = over and situation.doing == "starting"
            raise decision.error
        if decision.replace:
            self.remove(number, decision.cause, refuses_the_checkpoint(fault, situation))
        return Event(number, task, decision=decision) if current and decision != WAIT else None
