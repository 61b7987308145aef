"""What the controller of a service or a run does, as a plain class: one thread works, any number ask. No Ray.

The working thread takes measurements from the queue, one after the other, and looks after the actors in between.
"""

import logging
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ray_probe.config.loading import config_from_dict, to_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.controller.intake import Intake, Taken
from ray_probe.controller.measurement import Job, Prepare, measure, prepared_again
from ray_probe.controller.queries import Queries, Sources
from ray_probe.controller.queue import Measurement
from ray_probe.controller.replies import MeasurementInfo, Scaled
from ray_probe.controller.state import ControllerState, summary
from ray_probe.errors import ConfigError, ProbeError, bad_value
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.run.backend import LoadingBackend, StopCheck, Stopped
from ray_probe.run.directory import RunDirectory
from ray_probe.system.clock import utc_now

logger = logging.getLogger("ray_probe")
TICK_S = 0.5
NOTHING_TAKEN = Taken()


class ControllerBackend(LoadingBackend, Sources, Protocol):
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
        config: what a service's measurements start from, and what its actors load at the start; None for a run.
    """

    def __init__(
        self, name: str, kind: str, directory: Path | None, workers: ControllerBackend, prepare: Prepare,
        config: ProbeConfig | None = None,
    ) -> None:  # fmt: skip
        self._config = config
        self._workers = workers
        self._prepare = prepare
        self._board = ControllerState(directory)
        self._intake = Intake(self._board)
        self.answers = Queries(name, kind, self._board, workers)
        self._jobs: dict[str, Job] = {}
        self.start_error: ProbeError | None = None
        self._stopping: set[str] = set()
        self._closing = False
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Start the working thread."""
        self._thread = threading.Thread(target=self._work, name="controller", daemon=True)
        self._thread.start()
        self._intake.begin()

    def close(self, deadline_s: float) -> bool:
        """Stop what is at work, with its whole rounds kept, and end the actors; returns whether that was in time."""
        self._intake.close()
        with self._board.changed:
            self._closing = self._board.closing = True
            self._board.changed.notify_all()
        if self._thread is not None:
            self._thread.join(deadline_s)
        in_time = self._thread is None or not self._thread.is_alive()
        if not in_time or self._thread is None:
            self._workers.close()  # else the working thread has done so
        return in_time

    def probe(self, config: ProbeConfig) -> Measurement:
        """Queue a measurement of a checkpoint as it is now: checked, and pinned where the configuration says so.

        Raises:
            InputError: what is wrong with the checkpoint, or ConfigError while the service drains.
            OutputError: it cannot be pinned. Nothing is queued then.
        """
        from ray_probe.checkpoints.load import inspect_checkpoint  # brings transformers along

        self._board.queue.refuse_draining(config.model.path)  # before what may take long
        checkpoint = inspect_checkpoint(config.model, hashed=False)
        taken = self._intake.take(config, checkpoint.directory, checkpoint.adapter)
        try:
            return self.submit(to_dict(config), taken=taken)
        except BaseException:
            self._intake.forget(taken)
            raise

    def submit(self, config: Mapping[str, Any], job: Job | None = None, taken: Taken = NOTHING_TAKEN) -> Measurement:
        """Queue a measurement.

        Args:
            config: its resolved configuration; a service says itself where the run directory is.
            job: what is to be done, where that has been prepared.
            taken: what is kept of the files that it reads.

        Raises ConfigError while the service drains.
        """
        board = self._board
        with board.changed:
            identity, raw = board.queue.next_id(), dict(config)
            if board.directory is not None:
                raw["output"] = dict(raw["output"]) | {"dir": str(board.directory), "name": identity}
            directory = Path(raw["output"]["dir"]) / raw["output"]["name"]
            item = Measurement(identity, raw, str(directory), utc_now(), sources=taken.sources, pin=taken.pin)
            if job is not None:
                self._jobs[identity] = job
            try:
                board.submit(item)
            except ProbeError:
                self._jobs.pop(identity, None)
                raise
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
        if item.state == "cancelled":
            self._intake.forget(item)
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
            self._board.actors = actors
            self._board.save()
        return self._workers.scale(actors)

    def _work(self) -> None:
        board = self._board
        if board.actors is not None:
            self._workers.scale(board.actors)  # as it was before this controller was made again
        if self._config is not None:
            self._start(self._config)
        while not self._closing:
            try:
                self._turn()
            except Exception as error:  # a full disk under the error's own handling, say: told, and tried again
                logger.error(traceback.format_exc())
                board.problem = f"{type(error).__name__}: {error}"
        board.state = "closing"
        self._workers.close()

    def _start(self, config: ProbeConfig) -> None:
        """Have the actors load the service's own checkpoint. What keeps it from starting is `start_error`."""
        try:
            self._workers.load(self._prepare(config, None), lambda: self._closing)
        except Exception as error:
            self.start_error = _told(error)
            self._board.problem = str(self.start_error)

    def _turn(self) -> None:
        """Measure what is next, or look after the actors."""
        board = self._board
        item = board.take(utc_now())
        if item is not None:
            self._measure(item)
            return
        with board.changed:
            board.state = "failed" if board.problem else "idle"
            board.changed.wait(TICK_S)
        if not board.problem:
            try:
                self._workers.tend()
            except Exception as error:  # `scale` and the next measurement try again
                board.problem = str(_told(error))

    def _measure(self, item: Measurement) -> None:
        logger.info("%s: %s begins", item.id, item.checkpoint)
        try:
            self._measured(item)
        except Exception as error:
            told = _told(error)
            self._ended(item.id, state="failed", cause=str(told), exit_code=told.exit_code)

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
        self._ended(identity, state="done", exit_code=result.exit_code)

    def _job(self, item: Measurement) -> Job:
        """What was queued, or goes on after a loss: with the same inputs then, and with the actors that are there."""
        assert self._config is not None, "a run's job comes with it"
        config = config_from_dict({**item.config, "cluster": to_dict(self._config)["cluster"]})
        prepare = self._intake.preparing(item, self._prepare)
        if not (Path(item.directory) / "manifest.json").exists():
            return Job(prepare(config, None), resume=False)
        prepared, notes = prepared_again(RunDirectory.open(Path(item.directory)), config, prepare)
        return Job(prepared, resume=True, notes=tuple(notes))

    def _stop(self, identity: str) -> StopCheck:
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
        self._intake.forget(item)
        logger.info("%s: %s%s", identity, item.state, f" ({item.cause})" if item.cause else "")
        try:
            self._board.change(identity, summary=summary(self._board.result(item)))
        except (OSError, ProbeError) as error:  # it has ended all the same; the summary is read again when asked for
            logger.error("%s: its result cannot be read (%s)", identity, error)


def _told(error: Exception) -> ProbeError:
    """An error as it is kept and told: its own type and text where it is one of ours, nothing else of it."""
    if isinstance(error, ProbeError):
        logger.error(str(error))
        return type(error)(str(error))
    logger.error(traceback.format_exc())
    return ProbeError(f"a fault of ray_probe: {type(error).__name__}: {error}")
