"""The callback for transformers' Trainer, TRL, Unsloth and LLaMA-Factory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_probe.integrations.events import OtherEvents
from ray_probe.integrations.spool import SPOOL, request, warned_only


class ProbeCallback(OtherEvents):
    """Requests the measurement of every checkpoint that a trainer saves.

    It costs a save milliseconds, and never raises: what goes wrong is a warning in the log.
    """

    def __init__(self, spool: Path | str | None = None, tags: Mapping[str, str] | None = None) -> None:
        """Create a callback.

        Args:
            spool: directory of requests; None: `.ray_probe` in the trainer's output directory.
            tags: labels that results show beside the step.
        """
        self._spool, self._tags = spool, tags

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand over the checkpoint of this step, from one process of the job."""
        with warned_only():
            if state.is_world_process_zero:
                output, step = Path(args.output_dir), state.global_step
                trainer = type(args).__module__.partition(".")[0]  # trl or transformers
                request(self._spool or output / SPOOL, output / f"checkpoint-{step}", step, trainer, self._tags)
