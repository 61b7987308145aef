"""What the controller of a service or a run does, as a plain class: one thread works, any number ask. No Ray.

The working thread takes measurements from the queue, one after the other, and looks after the actors in between.
"""

import logging
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ray_probe.config import ProbeConfig, config_from_dict
from ray_probe.errors import ConfigError, ProbeError, bad_value
from ray_probe.measurement import Job, Loading, Stop, measure
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.prepared import Prepared
from ray_probe.service.answers import Answers, Sources
from ray_probe.service.board import Board, summary, utc_now
from ray_probe.service.queue import Measurement
from ray_probe.service.replies import MeasurementInfo, Scaled
from ray_probe.work import Stopped

logger = logging.getLogger("ray_probe")
TICK_S = 0.5


class Workers(Loading, Sources, Protocol):
    """A backend whose actors can be looked after, counted, asked and scaled."""

    def tend(self) -> None:
        """Start what is missing and end what is too many, between measurements."""
        ...

    def close(self) -> None:
        """End the actors."""
        ...

    def scale(self, actors: int) -> Scaled:
        """Ask for so many rollout actors from now on; from any thread."""
        ...


class Controller:
    """Works off a queue of measurements.

    Args:
        name: of the service or run.
        kind: service or run.
        directory: where the queue is kept; None for a run, whose run directory says all.
        workers: the actors.
        prepare: checks a configuration and its files; called in the working thread.
    """

    def __init__(
        self, name: str, kind: str, directory: Path | None, workers: Workers, prepare: Callable[[ProbeConfig], Prepared]
    ) -> None:
        self._workers = workers
        self._prepare = prepare
        self._board = Board(directory)
        self.answers = Answers(name, kind, self._board, workers)
        self._jobs: dict[str, Job] = {}
        self._errors: dict[str | None, ProbeError] = {}
        self._stopping: set[str] = set()
        self._closing = False
        self._thread: threading.Thread | None = None

    def begin(self, first: Prepared | None = None) -> None:
        """Start the working thread, with this checkpoint on the actors where one is given."""
        self._thread = threading.Thread(target=self._work, args=(first,), name="controller", daemon=True)
        self._thread.start()

    def close(self, deadline_s: float) -> bool:
        """Stop what is at work, with its whole rounds kept, and end the actors; returns whether that was in time."""
        with self._board.changed:
            self._closing = True
            self._board.changed.notify_all()
        if self._thread is not None:
            self._thread.join(deadline_s)
        in_time = self._thread is None or not self._thread.is_alive()
        self._workers.close()
        return in_time

    def submit(self, config: Mapping[str, Any], job: Job | None = None) -> Measurement:
        """Queue a measurement.

        Args:
            config: its resolved configuration; a service says itself where the run directory is.
            job: what is to be done, where that has been prepared.

        Raises ConfigError while the service drains.
        """
        board = self._board
        with board.changed:
            identity, raw = board.queue.next_id(), dict(config)
            if board.directory is not None:
                raw["output"] = dict(raw["output"]) | {"dir": str(board.directory), "name": identity}
            directory = Path(raw["output"]["dir"]) / raw["output"]["name"]
            item = Measurement(identity, raw, str(directory), utc_now())
            if job is not None:
                self._jobs[identity] = job
            board.queue.submit(item)
            board.save()
            board.changed.notify_all()
        logger.info("%s: %s is queued", identity, item.checkpoint)
        return item

    def cancel(self, identity: str) -> MeasurementInfo:
        """Take a measurement back, or stop it with its whole rounds kept. Raises ConfigError when it has ended."""
        board = self._board
        with board.changed:
            item = board.queue.cancel(identity, utc_now())
            if item.state == "running":
                self._stopping.add(identity)
            board.save()
        return self.answers.info(item)

    def drain(self, on: bool) -> None:
        """Take nothing new from now on, and work off what waits; or take on again."""
        with self._board.changed:
            self._board.queue.draining = on
            self._board.save()

    def scale(self, actors: int) -> Scaled:
        """Ask for so many rollout actors from now on. Raises ConfigError below 1."""
        if actors < 1:
            raise ConfigError(bad_value("N", actors, "need an integer >= 1; `down` ends the service"))
        with self._board.changed:
            self._board.problem = None
        return self._workers.scale(actors)

    def error(self, identity: str | None) -> ProbeError | None:
        """What a measurement failed of, or with None the start, in its own type."""
        return self._errors.get(identity)

    def _work(self, first: Prepared | None) -> None:
        board = self._board
        if first is not None:
            self._guarded(None, lambda: self._workers.load(first, lambda: self._closing))
        while not self._closing:
            with board.changed:
                item = next(iter(board.queue.waiting), None)
                if item is None:
                    board.state = "failed" if board.problem else "idle"
                    board.changed.wait(TICK_S)
            if item is not None:
                self._measure(item)
            elif not board.problem:
                self._guarded(None, self._workers.tend)
        board.state = "closing"

    def _guarded(self, identity: str | None, work: Callable[[], None]) -> None:
        """Do something; what goes wrong is told in `status` and kept, and the service lives on."""
        try:
            work()
        except Exception as error:
            known = isinstance(error, ProbeError)
            logger.error(str(error) if known else traceback.format_exc())
            told = error if isinstance(error, ProbeError) else ProbeError(f"{type(error).__name__}: {error}")
            self._errors[identity] = told
            if identity is None:
                self._board.problem = str(told)
            else:
                self._ended(identity, state="failed", cause=str(told), exit_code=told.exit_code)

    def _measure(self, item: Measurement) -> None:
        identity = item.id
        self._board.change(identity, "loading", state="running", started=item.started or utc_now(), cause=None)
        logger.info("%s: %s begins", identity, item.checkpoint)
        self._guarded(identity, lambda: self._measured(item))

    def _measured(self, item: Measurement) -> None:
        identity = item.id
        try:
            job = self._jobs.get(identity) or self._job(item)
            opened = self._opened(identity, job.prepared.policy_id)
            listener = lambda progress: self._board.event(identity, progress)  # noqa: E731
            result = measure(job, self._workers, listener, self._stop(identity), opened)
        except Stopped:
            if identity in self._stopping:
                self._ended(identity, state="cancelled", cause="cancelled; its whole rounds are kept", exit_code=130)
            else:
                self._board.leave(identity, state="queued")
            return
        self._ended(identity, state="done", exit_code=1 if result["conflicts"] else 3 if result["partial"] else 0)

    def _job(self, item: Measurement) -> Job:
        prepared = self._prepare(config_from_dict(dict(item.config)))
        return Job(prepared, resume=(Path(item.directory) / "manifest.json").exists())

    def _stop(self, identity: str) -> Stop:
        return lambda: self._closing or identity in self._stopping

    def _opened(self, identity: str, policy_id: str) -> Callable[[OfflineEntropyProbe], None]:
        def on_open(probe: OfflineEntropyProbe) -> None:
            with self._board.changed:
                self._board.probe = probe
                self._board.change(identity, "measuring", begun=True, policy_id=policy_id)

        return on_open

    def _ended(self, identity: str, **fields: Any) -> None:
        with self._board.changed:
            self._jobs.pop(identity, None)
            item = self._board.leave(identity, finished=utc_now(), **fields)
            self._board.change(identity, summary=summary(self._board.result(item)))
        logger.info("%s: %s%s", identity, item.state, f" ({item.cause})" if item.cause else "")
