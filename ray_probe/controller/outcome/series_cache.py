"""The series of a service, from the run directories of its ended measurements."""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from ray_probe.controller.queue import OPEN, Measurement
from ray_probe.errors import ProbeError
from ray_probe.run.comparison.measured import Measured, read_measured
from ray_probe.run.comparison.series_builder import build_series
from ray_probe.run.directory import RunDirectory
from ray_probe.run.series import Series

logger = logging.getLogger("ray_probe")


class SeriesCache:
    """Builds series; reads the directory of an ended measurement once.

    It works in the thread that asks, never in the one that measures.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read: dict[str, Measured | None] = {}
        self._built: dict[str, tuple[tuple[str, ...], Series]] = {}

    def series(self, items: Sequence[Measurement]) -> tuple[Series, ...]:
        """Return the series of these measurements, by name.

        Args:
            items: all measurements, in the order of submission.
        """
        names = sorted({str(item.series["name"]) for item in items if item.series.get("name")})
        with self._lock:
            return tuple(self._one(name, [item for item in items if item.series.get("name") == name]) for name in names)

    def _one(self, name: str, items: Sequence[Measurement]) -> Series:
        key = tuple(f"{item.id} {item.state}" for item in items)
        built = self._built.get(name)
        if built is None or built[0] != key:
            read = [self._measured(item) for item in items if item.state == "done"]
            known = [one for one in read if one is not None]
            still_open = sum(item.state in OPEN for item in items)
            series = build_series(name, known, still_open, len(items) - len(known) - still_open)
            built = self._built[name] = (key, series)
        return built[1]

    def _measured(self, item: Measurement) -> Measured | None:
        """Return what a measurement gives.

        None where its files cannot be read; it counts as failed.
        """
        if item.id not in self._read:
            try:
                self._read[item.id] = read_measured(RunDirectory(Path(item.directory), "ID"), item.id, item.series)
            except ProbeError as error:
                logger.warning("%s: is left out of its series (%s)", item.id, error)
                self._read[item.id] = None
        return self._read[item.id]
