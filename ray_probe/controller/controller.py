"""The controller of a service or a run, a plain class without Ray.

One thread works (see `work_loop`); every method here may be called from any thread.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_probe.config.loading import to_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.controller.intake import Intake, Taken
from ray_probe.controller.measurement import Job, Prepare
from ray_probe.controller.outcome.reporter import Reporter
from ray_probe.controller.queries import Queries
from ray_probe.controller.queue import Measurement
from ray_probe.controller.replies import MeasurementInfo, Scaled
from ray_probe.controller.state import ControllerState
from ray_probe.controller.work_loop import ControllerBackend, WorkLoop
from ray_probe.errors import ConfigError, ProbeError, bad_value
from ray_probe.run.result import Result
from ray_probe.system.clock import utc_now

logger = logging.getLogger("ray_probe")
NOTHING_TAKEN = Taken()
REPORTS_S = 5.0
"""Time for what is being reported when a service ends."""


class Controller:
    """Measures the checkpoints of a queue and answers queries meanwhile.

    Args:
        name: of the service or run.
        kind: service or run.
        directory: of the service, which holds the queue; None for a run.
        workers: the actors.
        prepare: checks a configuration and its files; called in the working thread.
        config: default configuration of a service's measurements, which its actors load at the start; None for a run.
    """

    def __init__(
        self, name: str, kind: str, directory: Path | None, workers: ControllerBackend, prepare: Prepare,
        config: ProbeConfig | None = None,
    ) -> None:  # fmt: skip
        self.state = ControllerState(directory)
        self.intake = Intake(self.state)
        self.answers = Queries(name, kind, self.state, workers)
        self._workers = workers
        # A run's driver reports its measurement itself, from the user's own environment.
        self._reporter = None if config is None else Reporter(config, name, directory, logger.warning)
        self._loop = WorkLoop(self.state, self.intake, workers, prepare, config, self._ended)

    @property
    def start_error(self) -> ProbeError | None:
        """The error that keeps the service from starting."""
        return self._loop.start_error

    def begin(self) -> None:
        """Starts the threads."""
        self._loop.begin()
        self.intake.begin()

    def close(self, deadline_s: float) -> bool:
        """Stops the work and ends the actors; returns whether it stopped in time.

        The committed rounds are kept.
        """
        self.intake.close()
        in_time = self._loop.close(deadline_s)
        if self._reporter is not None:
            self._reporter.close(min(REPORTS_S, deadline_s))
        return in_time

    def probe(self, config: ProbeConfig) -> Measurement:
        """Queues the measurement of a checkpoint after checking and pinning it.

        Raises:
            InputError: the checkpoint is unusable, or the service drains (ConfigError).
            OutputError: the checkpoint cannot be pinned.
        """
        from ray_probe.checkpoints.inspection import inspect_checkpoint  # brings transformers along
        from ray_probe.run.comparison.same_tokens import inspect_against

        self.state.queue.refuse_draining(config.model.path)  # before steps that may take long
        checkpoint = inspect_checkpoint(config.model, hashed=False)
        other = inspect_against(config, hashed=False)
        against = None if other is None else (other.directory, other.adapter)
        taken = self.intake.take(config, checkpoint.directory, checkpoint.adapter, against)
        try:
            return self.submit(to_dict(config), taken=taken)
        except BaseException:
            self.intake.forget(taken)
            raise

    def submit(self, config: Mapping[str, Any], job: Job | None = None, taken: Taken = NOTHING_TAKEN) -> Measurement:
        """Queues a measurement. Raises StateError while the service drains.

        Args:
            config: resolved configuration; a service replaces `output` by its own.
            job: the prepared measurement of a run.
            taken: stamps and pin of the files that it reads.
        """
        state = self.state
        with state.changed:
            identity, raw = state.queue.next_id(), dict(config)
            if state.directory is not None:
                raw["output"] = dict(raw["output"]) | {"dir": str(state.directory), "name": identity}
            directory = Path(raw["output"]["dir"]) / raw["output"]["name"]
            item = Measurement(identity, raw, str(directory), utc_now(), sources=taken.sources, pin=taken.pin)
            state.submit(item)
            if job is not None:  # the working thread takes the measurement once `changed` is free
                self._loop.jobs[identity] = job
        logger.info("%s: %s is queued", identity, item.checkpoint)
        return item

    def cancel(self, identity: str) -> MeasurementInfo:
        """Cancels a queued measurement, or stops a running one.

        The committed rounds are kept. Raises StateError when it has ended.
        """
        with self.state.changed:
            item = self.state.queue.cancel(identity, utc_now())
            if item.state == "running":
                self._loop.stopping.add(identity)
            self.state.save()
        if item.state == "cancelled":
            self.intake.forget(item)
            self._ended(item, None)
        return self.answers.info(item)

    def _ended(self, item: Measurement, result: Result | None) -> None:
        if self._reporter is not None:
            self._reporter.ended(self.answers.info(item), result)

    def drain(self, on: bool) -> None:
        """Refuses new measurements from now on, or accepts them again."""
        with self.state.changed:
            self.state.queue.draining = on
            self.state.save()

    def scale(self, actors: int) -> Scaled:
        """Sets the number of rollout actors. Raises ConfigError below 1."""
        if actors < 1:
            raise ConfigError(bad_value("N", actors, "need an integer >= 1; `down` ends the service"))
        with self.state.changed:
            self.state.problem = None
            self.state.actors = actors
            self.state.save()
        return self._workers.scale(actors)
