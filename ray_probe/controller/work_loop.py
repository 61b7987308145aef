"""The working thread of a controller: measures checkpoints and tends the actors."""

import logging
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ray_probe.config.loading import config_from_dict, to_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.controller.intake import Intake
from ray_probe.controller.measurement import Job, Prepare, measure, prepared_again
from ray_probe.controller.outcome.kept_responses import drop_used_responses
from ray_probe.controller.queries import BackendQueries
from ray_probe.controller.queue import Measurement
from ray_probe.controller.replies import Scaled
from ray_probe.controller.state import ControllerState, summary
from ray_probe.errors import ProbeError
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.run.backend import LoadingBackend, StopCheck, Stopped
from ray_probe.run.directory import RunDirectory
from ray_probe.run.result import Result
from ray_probe.system.clock import utc_now

logger = logging.getLogger("ray_probe")
TICK_S = 0.5


Ended = Callable[[Measurement, Result | None], None]


class ControllerBackend(LoadingBackend, BackendQueries, Protocol):
    """A backend whose actors can be tended, counted, queried and scaled."""

    def tend(self) -> None:
        """Starts missing actors and ends superfluous ones, between measurements."""

    def close(self) -> None:
        """Ends the actors."""

    def scale(self, actors: int) -> Scaled:
        """Sets the number of rollout actors; from any thread."""


class WorkLoop:
    """Measures what the queue holds in a thread of its own.

    Attributes:
        jobs: prepared measurements of a run, by id.
        stopping: ids of running measurements that are cancelled.
        start_error: the error that keeps a service from starting.

    Args:
        state: of the controller.
        intake: of the queue.
        workers: the actors.
        prepare: checks a configuration and its files.
        config: loaded at the start; None for a run.
        ended: receives each measurement that has ended, with its result or None; returns at once.
    """

    def __init__(
        self, state: ControllerState, intake: Intake, workers: ControllerBackend, prepare: Prepare,
        config: ProbeConfig | None, ended: Ended = lambda item, result: None,
    ) -> None:  # fmt: skip
        self.jobs: dict[str, Job] = {}
        self.stopping: set[str] = set()
        self.start_error: ProbeError | None = None
        self._state = state
        self._intake = intake
        self._workers = workers
        self._prepare = prepare
        self._config = config
        self._ended = ended
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._work, name="controller", daemon=True)
        self._thread.start()

    def close(self, deadline_s: float) -> bool:
        """Stops the work and ends the actors; returns whether the thread ended in time."""
        with self._state.changed:
            self._state.closing = True
            self._state.changed.notify_all()
        if self._thread is not None:
            self._thread.join(deadline_s)
            if not self._thread.is_alive():
                return True  # the thread has closed the workers
        self._workers.close()
        return self._thread is None

    def _work(self) -> None:
        state = self._state
        if state.actors is not None:
            self._workers.scale(state.actors)  # as before this controller was restarted
        if self._config is not None:
            self._start(self._config)
        while not state.closing:
            try:
                self._turn()
            except Exception as error:  # the handling of an error can itself fail, on a full disk for example
                logger.error(traceback.format_exc())
                state.problem = f"{type(error).__name__}: {error}"
        state.state = "closing"
        self._workers.close()

    def _start(self, config: ProbeConfig) -> None:
        """Loads the service's own checkpoint on the actors; sets `start_error` on failure."""
        try:
            self._workers.load(self._prepare(config, None), lambda: self._state.closing)
        except Exception as error:
            self.start_error = _logged(error)
            self._state.problem = str(self.start_error)

    def _turn(self) -> None:
        """Measures the next checkpoint, or tends the actors."""
        state = self._state
        item = state.take(utc_now())
        if item is not None:
            self._measure(item)
            return
        with state.changed:
            state.state = "failed" if state.problem else "idle"
            state.changed.wait(TICK_S)
        if not state.problem:
            try:
                self._workers.tend()
            except Exception as error:  # `scale` and the next measurement retry
                state.problem = str(_logged(error))

    def _measure(self, item: Measurement) -> None:
        logger.info("%s: %s begins", item.id, item.checkpoint)
        try:
            self._measure_or_raise(item)
        except Exception as error:
            failure = _logged(error)
            self._end(item.id, state="failed", cause=str(failure), exit_code=failure.exit_code)

    def _measure_or_raise(self, item: Measurement) -> None:
        identity = item.id
        try:
            job = self.jobs.get(identity) or self._job(item)
            opened = self._opened(identity, job.prepared.policy_id)
            listener = lambda progress: self._state.event(identity, progress)  # noqa: E731
            result = measure(job, self._workers, listener, self._stop(identity), opened)
        except Stopped:
            if identity in self.stopping:
                self._end(identity, state="cancelled", cause="cancelled; its whole rounds are kept", exit_code=130)
            else:
                self._state.leave(identity, state="queued")
            return
        self._end(identity, state="done", exit_code=result.exit_code)

    def _job(self, item: Measurement) -> Job:
        """Prepares a queued measurement, or one that resumes after a loss."""
        assert self._config is not None, "a run's job comes with it"
        # A resumed measurement keeps its inputs and uses the cluster of the service.
        config = config_from_dict({**item.config, "cluster": to_dict(self._config)["cluster"]})
        prepare = self._intake.preparing(item, self._prepare)
        if not (Path(item.directory) / "manifest.json").exists():
            return Job(prepare(config, None), resume=False)
        prepared, notes = prepared_again(RunDirectory.open(Path(item.directory)), config, prepare)
        return Job(prepared, resume=True, notes=tuple(notes))

    def _stop(self, identity: str) -> StopCheck:
        return lambda: self._state.closing or identity in self.stopping

    def _opened(self, identity: str, policy_id: str) -> Callable[[OfflineEntropyProbe], None]:
        def on_open(probe: OfflineEntropyProbe) -> None:
            with self._state.changed:
                self._state.probe = probe
                self._state.change(identity, "measuring", begun=True, policy_id=policy_id)

        return on_open

    def _end(self, identity: str, **fields: Any) -> None:
        with self._state.changed:
            self.jobs.pop(identity, None)
            item = self._state.leave(identity, finished=utc_now(), **fields)
            items = self._state.queue.items
        self._intake.forget(item)
        drop_used_responses(item, items)
        logger.info("%s: %s%s", identity, item.state, f" ({item.cause})" if item.cause else "")
        result = None
        try:
            result = self._state.result(item)
            item = self._state.change(identity, summary=summary(result))
        except (OSError, ProbeError) as error:  # a later query reads the result again
            logger.error("%s: its result cannot be read (%s)", identity, error)
        self._ended(item, result)


def _logged(error: Exception) -> ProbeError:
    """Logs an error; returns a copy of its type and text, without traceback and cause."""
    if isinstance(error, ProbeError):
        logger.error(str(error))
        return type(error)(str(error))
    logger.error(traceback.format_exc())
    return ProbeError(f"a fault of ray_probe: {type(error).__name__}: {error}")
