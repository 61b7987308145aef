"""Starts, observes and replaces rollout actors, with one task at a time each.

The observer reports results and faults, `failure_policy` decides about faults, and the pool carries the decision out.
An actor that died or hangs is killed and replaced by one with a new number; late results of the old one are not read.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from ray_probe.cluster.actors import actor_names
from ray_probe.cluster.actors.rollout import RolloutActor, RolloutHandle
from ray_probe.cluster.pool.census import Census, census, waiting
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
from ray_probe.cluster.pool.worker import Event, Worker, demand_of
from ray_probe.errors import CheckpointError, ClusterError
from ray_probe.rollout.loader import LoadRequest
from ray_probe.run.messages import ActorFacts, GradientReport


class Pool:
    """Keeps a number of rollout actors going, each with the same checkpoint loaded.

    One thread owns a pool; others may call `scale` and `census` alone.

    Args:
        size: actors asked for.
        options: `ray.remote` options of each (resources, environment, lifetime).
        on_note: called with a line for each death and replacement.
        clock, actor_class: monotonic seconds, and the actor's class, for tests.
        prefix: actors are named `PREFIX/rollout-N`; None leaves them without a name.
        limits: fields of `Limits` that differ from the defaults, by name.

    Attributes:
        started: actors started so far.
        info: facts of the last actor that loaded the current checkpoint; None before.
    """

    def __init__(
        self,
        size: int,
        options: Mapping[str, Any],
        on_note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        actor_class: type = RolloutActor,
        prefix: str | None = None,
        **limits: float,
    ) -> None:
        # Guards what `scale` and `census` share with the working thread: `asked`, the workers and their tasks, the
        # restart budget. No note is written and Ray is not called under it.
        self._lock = threading.RLock()
        self.asked = size
        self.started = 0
        self.limits = Limits(**limits)
        self.last_failure: str | None = None
        self.info: ActorFacts | None = None
        self._remote = ray.remote(actor_class)
        self._options = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": 2, **options}
        self._demand = demand_of(options)
        self._request: LoadRequest | None = None
        self._note = on_note
        self._observer = Observer(clock, self.limits, self._demand)
        self._prefix = prefix
        self._workers: dict[int, Worker] = {}
        self._version = -1
        self._refused = False
        self._resting = False
        self._budget = RestartBudget()
        self._reported_waiting = False

    def scale(self, actors: int) -> None:
        """Ask for this many actors from now on, and retry failed starts."""
        with self._lock:
            self.asked = actors
            self._budget.reset()

    def census(self) -> Census:
        """Return a snapshot of the actors."""
        with self._lock:
            return census(self.asked, self._workers, self._version, self.last_failure)

    @property
    def alive(self) -> list[int]:
        """Actors that have loaded the current checkpoint."""
        return [number for number, worker in self._workers.items() if worker.loaded == self._version]

    @property
    def idle(self) -> list[int]:
        """Actors without a task that answered a moment ago; `wait` asks the others."""
        # The answer keeps a shard from being charged with an actor that died idle.
        known = self._observer.now() - self.limits.fresh_s
        return [n for n in self.alive if self._workers[n].waits and self._workers[n].heard_at >= known]

    @property
    def leaving(self) -> set[int]:
        """Actors that are too many: they take no new task, and end with `release`."""
        return {number for number, worker in self._workers.items() if worker.leaving}

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the actors that have loaded the current checkpoint."""
        facts = {number: self._workers[number].facts for number in self.alive}
        return {number: known.pid for number, known in facts.items() if known is not None}

    def handle(self, actor: int) -> RolloutHandle:
        """Return the handle of an actor."""
        return self._workers[actor].handle

    def load(self, request: LoadRequest) -> None:
        """Have every actor load a checkpoint; results of earlier tasks are dropped."""
        with self._lock:
            self._request = request
            self._version += 1
            self._refused = self._resting = False
            self.info = None
            self._budget.reset()

    def forgive(self) -> None:
        """Retry failed starts, except after a refused checkpoint."""
        with self._lock:
            self._budget.forgive()

    def rest(self) -> None:
        """Replace dead actors between two checkpoints, and end those that are too many."""
        self._resting = True  # the last checkpoint may be gone by now: an actor that cannot load it waits for the next
        self.wait(0.0)
        self.release(self.leaving)

    def start(self, wait_for: int = 1, stop: Callable[[], bool] = lambda: False) -> None:
        """Return once `wait_for` actors have loaded the checkpoint, or `stop` is true.

        Raises:
            ProbeError: an actor refuses the checkpoint or its device.
            ClusterError: no actor started in time.
        """
        self.tend()
        while len(self.alive) < min(wait_for, self.asked) and not stop():
            self.wait(0.5)

    def tend(self) -> None:
        """Start missing actors, mark superfluous ones and have the checkpoint loaded.

        Raises ClusterError when no actor is left.
        """
        self._mark_leaving()
        self._start_missing()
        if not self._workers:
            raise ClusterError(f"cluster.actors: got {self.asked}, and none is left that starts; {self.last_failure}")
        for worker in self._workers.values():
            if worker.waits and worker.loaded != self._version and not self._refused:
                assert self._request is not None, "`load` comes first"
                self._submit(worker, None, worker.handle.start(self._request))

    def submit(self, actor: int, task: Any, reference: Any) -> None:
        """Watch a task of an idle actor by the reference that its handle returned."""
        self._submit(self._workers[actor], task, reference)

    def wait(self, timeout_s: float) -> list[Event]:
        """Observe the actors for a while; returns finished tasks and faults.

        Raises ProbeError on a fault that concerns the whole run.
        """
        self.tend()
        answers, events = self._observer.answers(self._workers.values(), timeout_s), list[Event | None]()
        for number, worker in list(self._workers.items()):
            seen = self._observer.seen(worker, answers, self.asked)
            events.append(self._over(number, seen.value) if isinstance(seen, Done) else self._faced(number, seen))
        self._report_waiting()
        return [event for event in events if event is not None]

    def gradient_report(self, actor: int, group: str, deadline_s: float) -> GradientReport:
        """Return what an idle actor's sum holds; removes the actor on a RayError."""
        try:
            report: GradientReport = ray.get(self.handle(actor).gradient_report(group), timeout=deadline_s)
        except RayError as error:
            self.remove(actor, autopsy(error).cause)
            raise
        return report

    def remove(self, actor: int, cause: str, refused: bool = False) -> None:
        """Kill an actor; `wait` starts another within the restart budget."""
        with self._lock:
            worker = self._workers.pop(actor)
            self.last_failure = f"actor {actor}: {cause}"
            self._budget.lost(worker.doing, refused)
            if len(self._workers) >= self.asked:
                more = "it was leaving"
            elif self._budget.refused:
                more = "no more are started for this checkpoint, unless `scale` asks for them"
            else:
                goes_on = self._budget.go_on(self.asked)
                more = "another is started" if goes_on else "no more are started in this round"
            left = f"{len(self._workers)} of {self.asked} left"
        worker.handle.kill()
        self._note(f"actor {actor} is gone ({cause}); {left}, {more}")

    def release(self, actors: Collection[int]) -> None:
        """End those of the actors that are leaving."""
        for number in sorted(self.leaving & set(actors)):
            with self._lock:
                worker = self._workers.pop(number)
            worker.handle.kill()
            self._note(f"actor {number} left; {len(self._workers)} of {self.asked} are there")

    def close(self) -> None:
        """Kill all actors."""
        with self._lock:
            workers, self._workers = self._workers, {}
        for worker in workers.values():
            worker.handle.kill()

    def _submit(self, worker: Worker, task: Any, reference: Any) -> None:
        now = self._observer.now()
        with self._lock:
            worker.submit(task, self._version, reference, now)

    def _start_missing(self) -> None:
        """Start missing actors, and note for each whether the cluster had room."""
        with self._lock:
            missing = self.asked - len(self._workers) if self._budget.go_on(self.asked) else 0
        free = dict(ray.available_resources()) if missing > 0 else {}
        for number in range(self.started, self.started + missing):
            had_room = all(free.get(name, 0.0) >= amount for name, amount in self._demand.items())
            if had_room:
                free |= {name: free[name] - amount for name, amount in self._demand.items()}
            name = {} if self._prefix is None else {"name": actor_names.rollout(self._prefix, number)}
            handle = RolloutHandle(self._remote.options(**self._options, **name).remote())
            with self._lock:
                self._workers[number] = Worker(handle, had_room, self._observer.now())
                self.started += 1

    def _mark_leaving(self) -> None:
        """Mark superfluous actors: unstarted ones, which end now, then the youngest."""
        with self._lock:
            order = sorted(self._workers.items(), key=lambda item: (item[1].loaded < 0, item[0]))
            for place, (_, worker) in enumerate(order):
                worker.leaving = place >= self.asked
        self.release([number for number, worker in order if worker.leaving and worker.loaded < 0])

    def _report_waiting(self) -> None:
        """Report once that actors wait for room, and again after a while without."""
        line = waiting(self.asked, self._workers)
        if line is not None and not self._reported_waiting:
            self._note(line)
        self._reported_waiting = line is not None

    def _stop_loading(self, number: int, cause: str) -> None:
        if not self._refused:
            self.last_failure = f"actor {number}: {cause}"
            self._note(f"actor {number} cannot load what was measured last, and waits for the next ({cause})")
        self._refused = True

    def _over(self, number: int, value: Any) -> Event | None:
        """Take in the result of an actor's task or start."""
        worker = self._workers[number]
        with self._lock:
            task, worker.task, worker.doing = worker.task, None, "idle"
            if worker.version != self._version:
                return None
            if task is None:
                worker.loaded, worker.facts, self.info = self._version, value, value
                self._budget.worked()
        return None if task is None else Event(number, task, value)

    def _faced(self, number: int, fault: Fault) -> Event | None:
        """Carry out the decision about a fault; earlier checkpoints give no event."""
        worker, workers = self._workers[number], self._workers.values()
        if self._resting and isinstance(fault, Raised) and isinstance(fault.error, CheckpointError):
            self._stop_loading(number, fault.cause)
        loaded, placed = self.info is not None, any(other.placed for other in workers)
        situation = Situation(worker.doing, loaded, self._refused, placed)
        decision, current = decide(fault, situation, self.limits), worker.version == self._version
        over = isinstance(fault, Raised)
        if decision == WAIT and not over:
            return None
        with self._lock:
            if over and not decision.replace:
                worker.doing = "idle"
            task, worker.task = worker.task, None
        if decision.error is not None and (current or not over):
            self._refused = over and situation.doing == "starting"
            raise decision.error
        if decision.replace:
            self.remove(number, decision.cause, refuses_the_checkpoint(fault, situation))
        return Event(number, task, decision=decision) if current and decision != WAIT else None
