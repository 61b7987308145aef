"""The sink of Weights & Biases: a second writer into the trainer's own run."""

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ray_probe.config.reporting import WandbConfig
from ray_probe.metrics.sink import SinkRun, installed

LABEL = "ray_probe"
TRIES = 4
PAUSE_S = 2.0


class Wandb:
    """Logs into a run that another process writes too.

    The trainer stays the primary writer: this one neither ends the run nor sets its state. Offline nothing can be
    shared, so a run of its own is written.

    Args:
        config: of the run.
    """

    def __init__(self, config: WandbConfig) -> None:
        self._config = config
        self._runs: dict[str, Any] = {}
        self._id = ""

    def open(self, run: SinkRun) -> None:
        """Attach to the run of a measurement's series."""
        self._id = run.placed(self._config.run)
        if self._id not in self._runs:
            self._runs[self._id] = self._attached(self._id, run)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the figures with their step as a figure too.

        W&B's own step must grow, and the trainer moves it; so it is never passed.
        """
        axis = {} if self._config.axis is None else {self._config.axis: step}
        self._runs[self._id].log({**axis, "probe/step": step, **values})

    def _attached(self, identity: str, run: SinkRun) -> Any:
        with installed("wandb"):
            import wandb

        attach = partial(
            wandb.init, project=self._config.project, entity=self._config.entity, dir=str(run.directory)
        )
        if os.environ.get("WANDB_MODE") == "offline":
            settings = wandb.Settings(mode="offline", console="off", silent=True)
            found = attach(name=f"{identity}-{LABEL}", settings=settings)
        else:
            settings = wandb.Settings(
                mode="shared", x_primary=False, x_update_finish_state=False, x_label=LABEL, console="off", silent=True,
            )  # fmt: skip
            found = _when_there(partial(attach, id=identity, resume="allow", settings=settings))
        found.define_metric("probe/step", hidden=True)
        found.define_metric("probe/*", step_metric="probe/step")
        return found


def _when_there(attach: Callable[[], Any]) -> Any:
    """Attach to a run, which its trainer may not have created yet."""
    for attempt in range(TRIES):
        try:
            return attach()
        except Exception:
            if attempt == TRIES - 1:
                raise
            time.sleep(PAUSE_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")
