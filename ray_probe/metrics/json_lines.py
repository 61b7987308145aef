"""The sink that is always there: a line of JSON a measurement."""

import json
from collections.abc import Mapping
from pathlib import Path

from ray_probe.metrics.sink import SinkRun
from ray_probe.system.clock import utc_now

FILE = "metrics.jsonl"


class JsonLines:
    """Appends to `metrics.jsonl` (0600) in the directories of run and service.

    Args:
        service: directory of the service; None for a run.
    """

    def __init__(self, service: Path | None) -> None:
        self._service = service
        self._run: SinkRun | None = None

    def open(self, run: SinkRun) -> None:
        """Take the names of a measurement."""
        self._run = run

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line to each file."""
        run = self._run
        assert run is not None, "a measurement is open"
        line = {
            "time": utc_now(), "service": run.service, "measurement": run.measurement, "checkpoint": run.checkpoint,
            "series": run.series, "step": run.step, "tags": dict(run.tags), **values,
        }  # fmt: skip
        for directory in (run.directory, self._service):
            if directory is not None:
                path = directory / FILE
                path.touch(mode=0o600)
                with path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(line, allow_nan=False) + "\n")
