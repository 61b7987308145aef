"""Writes figures to the configured sinks, which can stop or delay no measurement."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ray_probe.config.reporting import MetricsConfig
from ray_probe.metrics.json_lines import JsonLines
from ray_probe.metrics.sink import Sink, SinkRun, figures
from ray_probe.run.result import Result
from ray_probe.system.background import HANGS_S, Background

_NUMBER = re.compile(r"\d+$")


def sinks_of(config: MetricsConfig, service: Path | None) -> dict[str, Sink]:
    """Return the configured sinks by name, JSON lines first.

    Their libraries are imported when they are opened.

    Args:
        config: of the service or run.
        service: directory of the service; None for a run.
    """
    from ray_probe.metrics.tensorboard import TensorBoard
    from ray_probe.metrics.wandb import Wandb

    found: dict[str, Sink] = {"metrics.jsonl": JsonLines(service)}
    if config.tensorboard is not None:
        found["metrics.tensorboard"] = TensorBoard(config.tensorboard)
    if config.wandb is not None:
        found["metrics.wandb"] = Wandb(config.wandb)
    return found


class Recorder:
    """Hands figures to sinks, each in a thread of its own.

    Args:
        sinks: by the name that warnings begin with.
        warn: receives one line, once a sink.
        hangs_s: time of one write after which it hangs, seconds.
    """

    def __init__(self, sinks: Mapping[str, Sink], warn: Callable[[str], None], hangs_s: float = HANGS_S) -> None:
        self._sinks = [(sink, Background(name, warn, once=True, hangs_s=hangs_s)) for name, sink in sinks.items()]

    def record(self, run: SinkRun, result: Result) -> None:
        """Hand over the figures of a result; returns at once."""
        number = _NUMBER.search(run.measurement)
        step = run.step if run.step is not None else int(number[0]) if number else 0
        for sink, background in self._sinks:
            background.do(_job(sink, run, step, result))

    @property
    def idle(self) -> bool:
        """Whether every sink has written all, or hangs."""
        return all(background.idle for _, background in self._sinks)


def _job(sink: Sink, run: SinkRun, step: int, result: Result) -> Callable[[], None]:
    def write() -> None:
        sink.open(run)
        sink.write(step, figures(result))

    return write
