"""The sections `metrics` and `notify`: where figures go when a measurement ends."""

import os
import shlex
from pathlib import Path
from typing import Self

from ray_probe.config.field_types import Command, OptionalText, Text, WebAddress
from ray_probe.config.section import Section


class WandbConfig(Section):
    """A run of Weights & Biases, the trainer's own for example."""

    run: Text
    """Id of the run; `{series}` stands for the name of the series."""
    project: Text
    """Its project."""
    entity: OptionalText = None
    """Its team or user; null: the default of the account."""
    axis: OptionalText = "train/global_step"
    """Name under which the trainer logs its step, logged with the figures too; null: `probe/step` alone."""


class MetricsConfig(Section):
    """Where figures go besides `metrics.jsonl`, when a measurement ends with a result."""

    tensorboard: OptionalText = None
    """Directory of TensorBoard, the trainer's own for example; `{series}` stands for the name of the series."""
    wandb: WandbConfig | None = None
    """Weights & Biases: run and project; null: not."""

    def resolved(self) -> Self:
        """Returns the section with absolute paths.

        A service works in another directory than its user.
        """
        board = self.tensorboard
        return self.model_copy(update={"tensorboard": None if board is None else str(Path(board).resolve())})


class NotifyConfig(Section):
    """What is called when a measurement ends, with a result or without one."""

    command: Command = None
    """Program with arguments, without a shell; gets the result as JSON on stdin, and at most 60 s; null: none."""
    webhook: WebAddress = None
    """Address (http or https) that gets a POST of the measurement and its result as JSON; null: none."""

    def resolved(self) -> Self:
        """Returns the section with an absolute path of a program named by a path."""
        program, *arguments = shlex.split(self.command or "") or [""]
        if os.sep not in program or Path(program).is_absolute():
            return self
        return self.model_copy(update={"command": shlex.join([str(Path(program).absolute()), *arguments])})
