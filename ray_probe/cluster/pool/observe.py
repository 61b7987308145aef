"""Polls rollout actors; returns finished tasks or faults (see `failure_policy`)."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from ray_probe.cluster.connection.ray_errors import first_line, task_error
from ray_probe.cluster.pool.clock import LookClock
from ray_probe.cluster.pool.death_report import autopsy
from ray_probe.cluster.pool.failure_policy import AnswersAgain, Fault, Limits, NoRoom, Quiet, Raised, Unreachable
from ray_probe.cluster.pool.worker import Worker

PAUSE_S = 0.05
FETCH_S = 60.0
FREE_EVERY_S = 1.0


@dataclass(frozen=True)
class Done:
    """The result of a finished task."""

    value: Any


@dataclass(frozen=True)
class Answers:
    """References that are ready; the actors behind them lived at `as_of` or later."""

    references: Collection[Any]
    as_of: float


class Observer:
    """Polls actors, with the seconds of a `LookClock`.

    Args:
        clock: seconds of `time.monotonic`.
        limits: timeouts.
        demand: resources of one actor under Ray's names.
    """

    def __init__(self, clock: Callable[[], float], limits: Limits, demand: Mapping[str, float]) -> None:
        self._clock = clock
        self._look_clock = LookClock(clock())
        self._looked = 0.0
        self._free: Mapping[str, float] = {}
        self._free_at = -FREE_EVERY_S
        self._limits = limits
        self._demand = demand

    def now(self) -> float:
        """Return the seconds of the `LookClock`."""
        return self._look_clock.look(self._clock())

    def answers(self, workers: Collection[Worker], timeout_s: float) -> Answers:
        """Ask actors without a recent answer, and wait for any answer or result."""
        for worker in workers:
            worker.ask(self.now(), self._limits)
        open_ = [ref for worker in workers for ref in (worker.reference, worker.heartbeat) if ref is not None]
        if not open_:
            time.sleep(min(timeout_s, PAUSE_S))
            return Answers((), self.now())
        done, _ = ray.wait(open_, num_returns=len(open_), timeout=0)
        as_of = self._looked
        if not done:
            done, _ = ray.wait(open_, num_returns=1, timeout=timeout_s)
            as_of = self.now()
        self._looked = self.now()
        return Answers(set(done), as_of)

    def seen(self, worker: Worker, answers: Answers, actors: int) -> Done | Fault:
        """Return what became of an actor's task, or a fault.

        Args:
            worker: the actor.
            answers: the references that are ready.
            actors: actors asked for.
        """
        try:
            if worker.reference in answers.references:
                reference, worker.reference = worker.reference, None
                value = ray.get(reference, timeout=FETCH_S)
                worker.heard_at = answers.as_of
                return Done(value)
            if worker.heartbeat in answers.references:
                reference, worker.heartbeat = worker.heartbeat, None
                worker.answered(ray.get(reference, timeout=FETCH_S), answers.as_of, self.now())
                if worker.unreachable is not None:
                    (_, cause), worker.unreachable = worker.unreachable, None
                    return AnswersAgain(cause)
        except RayTaskError as error:
            raised, worker.heard_at = task_error(error), answers.as_of
            return Raised(raised, first_line(raised))
        except RayError as error:
            if worker.reference is None:  # else only a heartbeat failed, and the task's error will tell more
                if not isinstance(error, ActorUnavailableError):
                    return autopsy(error)
                worker.unreachable = worker.unreachable or (self.now(), first_line(error))
        return self._quiet(worker, actors)

    def _quiet(self, worker: Worker, actors: int) -> Fault:
        now = self.now()
        if worker.unreachable is not None:
            since, cause = worker.unreachable
            return Unreachable(cause, now - since)
        seconds = worker.quiet_s(now)
        if (
            worker.doing == "starting"
            and not worker.placed
            and not worker.had_room
            and seconds > min(self._limits.report_room_s, self._limits.place_deadline_s)
        ):
            free = self._free_resources(now)
            if any(free.get(name, 0.0) < amount for name, amount in self._demand.items()):
                if seconds > self._limits.place_deadline_s:
                    worker.moved = now  # waiting for room does not make its start slow
                asked = ", ".join(f"{amount:g} {name}" for name, amount in self._demand.items())
                there = ", ".join(f"{free.get(name, 0.0):g} {name}" for name in self._demand)
                worker.no_room = NoRoom(seconds, actors, asked, there)
                return worker.no_room
        return Quiet(seconds)

    def _free_resources(self, now: float) -> Mapping[str, float]:
        """Return the free resources of the cluster, refreshed once a second at most."""
        if now - self._free_at >= FREE_EVERY_S:
            self._free, self._free_at = dict(ray.available_resources()), now
        return self._free
