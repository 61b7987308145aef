"""The section `series`: the place of a measurement in a series of checkpoints."""

from ray_probe.config.field_types import OptionalStep, RunName, Tags
from ray_probe.config.section import Section


class SeriesConfig(Section):
    """The place of a measurement in the series of checkpoints of a training run.

    It changes no figure.
    """

    name: RunName = None
    """Name of the series; null: none."""
    step: OptionalStep = None
    """Step of the trainer at which the checkpoint was written; null: unknown."""
    tags: Tags = {}
    """Labels that results show beside the step, name to text."""
