"""The sink of TensorBoard, written with tensorboardX."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_probe.metrics.sink import SinkRun, installed

SUFFIX = ".ray_probe"


class TensorBoard:
    """Writes event files of its own beside those of the trainer.

    Args:
        directory: of TensorBoard; may name `{series}`.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._writers: dict[str, Any] = {}
        self._place = ""

    def open(self, run: SinkRun) -> None:
        """Open the event file of a measurement's series."""
        with installed("tensorboard"):
            from tensorboardX import event_file_writer

        self._place = run.placed(self._directory)
        if self._place not in self._writers:
            Path(self._place).mkdir(parents=True, exist_ok=True)
            # Another suffix keeps two writers of one second out of the same file.
            suffix = f"{SUFFIX}.{os.getpid()}"
            self._writers[self._place] = event_file_writer.EventsWriter(str(Path(self._place) / "events"), suffix)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write a scalar a figure, on disk on return."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        # Not by a SummaryWriter: its flush leaves out what its thread has not taken from a queue yet.
        writer = self._writers[self._place]
        for name, value in values.items():
            writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        writer.flush()
