"""Metrics of a service for Prometheus, through Ray's own exporter.

Ray puts `ray_` before each name and `_total` behind that of a counter. It drops names with a slash without an error.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from ray.util.metrics import Counter, Gauge

from ray_probe.controller.replies import MeasurementInfo, Status
from ray_probe.errors import first_line
from ray_probe.run.comparison.change import ChangeFigure
from ray_probe.run.result import Entropy, Gradient

logger = logging.getLogger("ray_probe")
EVERY_S = 10.0
OF_SERVICE: dict[str, tuple[str, Callable[[Status], int]]] = {
    "probe_actors_asked": ("Rollout actors asked for.", lambda status: status.actors_asked),
    "probe_actors_alive": ("Rollout actors that have loaded the checkpoint.", lambda status: status.actors_alive),
    "probe_queued": ("Measurements that wait.", lambda status: len(status.queued)),
    "probe_shards_retried": ("Shards repeated in the running measurement.", lambda status: status.shards_retried),
}
"""Name, description and value of the gauges of a service."""


def _figures(info: MeasurementInfo) -> dict[str, float | None]:
    # The entropy of a comparison is that of both checkpoints' responses together.
    entropy = Entropy() if info.entropy is None or info.against is not None else info.entropy
    change, gradient = info.change or ChangeFigure(), info.gradient or Gradient()
    return {
        "probe_entropy_nats": entropy.per_sequence, "probe_entropy_se_nats": entropy.per_sequence_se,
        "probe_token_entropy_nats": entropy.per_token, "probe_token_entropy_se_nats": entropy.per_token_se,
        "probe_change_nats": change.value, "probe_change_se_nats": change.se, "probe_snr": gradient.snr,
        "probe_step": info.step,
    }  # fmt: skip


OF_SERIES = {
    "probe_entropy_nats": "Entropy of a response.",
    "probe_entropy_se_nats": "Standard error of the entropy of a response.",
    "probe_token_entropy_nats": "Entropy of a token.",
    "probe_token_entropy_se_nats": "Standard error of the entropy of a token.",
    "probe_change_nats": "Change of the entropy of a response.",
    "probe_change_se_nats": "Standard error of the change.",
    "probe_snr": "Signal over noise of the gradient.",
    "probe_step": "Step of the trainer of the newest measurement.",
}
"""Name and description of the gauges of a series: of its newest measurement that is done and has the figure."""
COUNTED: dict[str, tuple[str, Callable[[MeasurementInfo], int]]] = {
    "probe_rounds": ("Whole rounds.", lambda info: info.rounds),
    "probe_responses": ("Responses in whole rounds.", lambda info: info.sequences),
}
"""Name, description and value of the counters of a series."""


class Answers(Protocol):
    """The queries that metrics come from."""

    def status(self) -> Status:
        """Returns the state of the service."""

    def results(self) -> tuple[MeasurementInfo, ...]:
        """Returns all measurements, oldest first."""


class PrometheusMetrics:
    """Sets the metrics of a service twice a minute or more, in a thread of its own.

    Args:
        service: its name.
        answers: its queries.
    """

    def __init__(self, service: str, answers: Answers) -> None:
        self._service, self._answers = service, answers
        self._closing = threading.Event()
        self._warned = False
        self._gauges = {
            name: Gauge(name, text, tag_keys=("service",)) for name, (text, _) in OF_SERVICE.items()
        } | {name: Gauge(name, text, tag_keys=("service", "series")) for name, text in OF_SERIES.items()}
        self._counters = {
            name: Counter(name, text, tag_keys=("service", "series")) for name, (text, _) in COUNTED.items()
        }
        self._counted: dict[tuple[str, str], int] = {}

    def begin(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._work, name="prometheus", daemon=True).start()

    def close(self) -> None:
        """End the thread, without waiting."""
        self._closing.set()

    def update(self) -> None:
        """Set all metrics to the present state."""
        status, items = self._answers.status(), self._answers.results()
        for name, (_, value_of) in OF_SERVICE.items():
            self._gauges[name].set(float(value_of(status)), {"service": self._service})
        for series in sorted({item.series or "" for item in items}):
            tags = {"service": self._service, "series": series}
            own = [item for item in items if (item.series or "") == series]
            for name, figure in _newest(own).items():
                self._gauges[name].set(figure, tags)
            for name, (_, amount_of) in COUNTED.items():
                total = sum(map(amount_of, own))
                more = total - self._counted.get((name, series), 0)
                if more > 0:
                    self._counted[name, series] = total
                    self._counters[name].inc(more, tags)

    def _work(self) -> None:
        while not self._closing.wait(EVERY_S):
            try:
                self.update()
            except Exception as error:  # measurements go on without metrics
                if not self._warned:
                    logger.warning("metrics for Prometheus are not set: %s", first_line(error))
                self._warned = True


def _newest(items: Iterable[MeasurementInfo]) -> dict[str, float]:
    """Return each figure of the newest measurement that is done and has it."""
    ended = sorted((item for item in items if item.state == "done"), key=lambda item: item.finished or "")
    found: dict[str, float] = {}
    for item in ended:
        found |= {name: float(value) for name, value in _figures(item).items() if value is not None}
    return found
