"""Tells sinks and the notified program and address of ended measurements."""

from collections.abc import Callable
from pathlib import Path

from ray_probe.config.schema import ProbeConfig
from ray_probe.controller.replies import MeasurementInfo
from ray_probe.metrics.recorder import Recorder, sinks_of
from ray_probe.metrics.sink import SinkRun
from ray_probe.notify.notifier import Ending, Notifier
from ray_probe.run.result import Result
from ray_probe.system.clock import wait_until


class Reporter:
    """Reports the end of measurements; nothing waits for it.

    Args:
        config: of the service or run.
        name: of the service or run.
        directory: of the service; None for a run.
        warn: receives one line where a sink or a notification fails.
    """

    def __init__(self, config: ProbeConfig, name: str, directory: Path | None, warn: Callable[[str], None]) -> None:
        self._name = name
        self._recorder = Recorder(sinks_of(config.metrics, directory), warn)
        self._notifier = Notifier(config.notify, warn)

    def ended(self, info: MeasurementInfo, result: Result | None) -> None:
        """Report a measurement that has ended; returns at once.

        Args:
            info: the measurement.
            result: what it found; None without a whole round.
        """
        directory = Path(info.directory)
        if result is not None and info.state == "done":
            run = SinkRun(self._name, info.id, info.checkpoint, directory, info.series, info.step, info.tags)
            self._recorder.record(run, result)

        def ending() -> Ending:
            return Ending(info.state, directory, info.to_json(), None if result is None else result.to_json())

        self._notifier.notify(ending)

    def close(self, deadline_s: float, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Wait for what is being reported; returns whether all was.

        Args:
            deadline_s: how long at most.
            interrupted: ends the wait once it is true.
        """
        wait_until(lambda: self._idle or interrupted(), deadline_s, 0.05)
        return self._idle

    @property
    def _idle(self) -> bool:
        return self._recorder.idle and self._notifier.idle
