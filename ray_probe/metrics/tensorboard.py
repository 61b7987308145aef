"""The sink of TensorBoard, written with tensorboardX."""

from collections.abc import Mapping
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
            from tensorboardX import SummaryWriter

        self._place = run.placed(self._directory)
        if self._place not in self._writers:
            # Another suffix keeps two writers of one second out of the same file.
            self._writers[self._place] = SummaryWriter(self._place, filename_suffix=SUFFIX)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write a scalar a figure, on disk on return."""
        writer = self._writers[self._place]
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()
