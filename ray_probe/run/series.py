"""The types of a series: entropy along the checkpoints of a training run."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ray_probe.run.comparison.change import ChangeFigure, Figure, PartChange
from ray_probe.system.json_object import JsonObject


@dataclass(frozen=True)
class SeriesPoint(JsonObject):
    """One checkpoint of a series."""

    step: int | None = None
    """Step of the trainer; null: unknown."""
    checkpoint: str = ""
    """Directory of the checkpoint."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Labels by name."""
    measurements: tuple[str, ...] = ()
    """Ids of the measurements, or names of the run directories, that its figures come from."""
    responses: int = 0
    """Responses of the checkpoint behind the entropy."""
    entropy: Figure = field(default_factory=Figure)
    """Entropy of a response, nats: its gradient measurement's, else a comparison's."""
    per_token: Figure = field(default_factory=Figure)
    """Entropy of a token, E[sum of H] / E[T], nats."""
    length: Figure = field(default_factory=Figure)
    """Length of a response, tokens; the error is null where only a gradient was measured."""
    truncated: float | None = None
    """Share of the responses that were cut at `generation.max_new_tokens`."""
    snr: float | None = None
    """Signal over noise of the gradient vector; null where it was not measured."""
    parity_gap: float | None = None
    """Mean absolute gap between log q when sampled and when scored, nats."""


@dataclass(frozen=True)
class SeriesChange(JsonObject):
    """The change of entropy from one checkpoint of a series to the next one."""

    first_step: int | None = None
    """Step of the checkpoint before."""
    last_step: int | None = None
    """Step of the checkpoint after."""
    first_checkpoint: str = ""
    """Directory of the checkpoint before."""
    last_checkpoint: str = ""
    """Directory of the checkpoint after."""
    measurement: str = ""
    """Id of the comparison, or the name of its run directory."""
    responses: int = 0
    """Responses of both checkpoints."""
    total: ChangeFigure = field(default_factory=ChangeFigure)
    """Change of the entropy of a response, nats."""
    pathwise: ChangeFigure = field(default_factory=ChangeFigure)
    """Its part at the states visited."""
    visitation: ChangeFigure = field(default_factory=ChangeFigure)
    """Its part through which states are visited."""
    per_token: Figure = field(default_factory=Figure)
    """Change of the entropy of a token, nats."""
    length: Figure = field(default_factory=Figure)
    """Change of the length of a response, tokens."""
    since_first: Figure = field(default_factory=Figure)
    """Change of the entropy of a response since the first checkpoint, nats, with the error of the sum from each
    prompt's own sum over the steps; null after a step that was not compared."""
    js: float | None = None
    """Jensen-Shannon divergence of the responses, nats."""
    effective_sample_share: float | None = None
    """Effective sample size of the first checkpoint's responses for the other one, as a share."""
    parts: tuple[PartChange, ...] = ()
    """By group of parameters, where `compare.parts` is set."""


@dataclass(frozen=True)
class Series(JsonObject):
    """The entropy along the checkpoints of one training run, by step."""

    name: str = ""
    """Name of the series."""
    points: tuple[SeriesPoint, ...] = ()
    """The checkpoints measured, by step."""
    changes: tuple[SeriesChange, ...] = ()
    """The changes from checkpoint to checkpoint, by step."""
    open: int = 0
    """Measurements of the series that are queued or running."""
    failed: int = 0
    """Measurements of the series that failed or were cancelled."""
