"""The callback for SkyRL's trainers, `RayPPOTrainer` and `SFTTrainer`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_probe.integrations.events import OtherEvents
from ray_probe.integrations.spool import SPOOL, has_weights, request, warned_only


class ProbeTrainingCallback(OtherEvents):
    """Requests the measurement of every model that SkyRL exports (`hf_save_interval`).

    SkyRL exports after its event `on_save`, which is of the sharded checkpoint. So the export of a step is handed over
    at the event that follows it: `on_log`, or `on_train_end` for the last one.
    """

    def __init__(self, spool: Path | str | None = None, tags: Mapping[str, str] | None = None) -> None:
        """Create a callback.

        Args:
            spool: directory of requests; None: `.ray_probe` in `trainer.export_path`.
            tags: labels that results show beside the step.
        """
        self._spool, self._tags = spool, tags
        self._handed_over: set[int] = set()

    def on_log(self, trainer: Any, callback_input: Any, control: Any) -> None:
        """Hand over the export of this step, if there is one."""
        with warned_only():
            exports, step = Path(trainer.cfg.trainer.export_path), callback_input.global_step
            directory = exports / f"global_step_{step}"
            if step not in self._handed_over and has_weights(model := directory / "policy"):
                self._handed_over.add(step)
                request(self._spool or exports / SPOOL, model, step, "skyrl", self._tags, source=directory)

    on_train_end = on_log
