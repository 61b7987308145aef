"""Answers of a service or a run, the same in Python and as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ray_probe.core.estimator.modes import Mode
from ray_probe.run.comparison.change import ChangeFigure
from ray_probe.run.progress import Progress
from ray_probe.run.result import Beta, Entropy, Estimate, Gradient, PairedDifference
from ray_probe.system.json_object import JsonObject


@dataclass(frozen=True)
class Actor(JsonObject):
    """One rollout actor."""

    number: int
    """Counts up as actors are started."""
    state: str
    """One of starting, loading and idle, or its task (`collect 0/3`: round/shard); `, leaving` once superfluous."""
    node: str | None
    """Address of its node; null before it started."""
    pid: int | None
    """Id of its process; null before it started."""
    tokens: int | None
    """Tokens sampled and scored since it started, by its last report; null before the first."""


@dataclass(frozen=True)
class MeasurementInfo(JsonObject):
    """A measurement, with figures of its result so far."""

    id: str
    """`m0001`, counting up."""
    checkpoint: str
    """Directory that is measured."""
    adapter: str | None
    """Directory of the adapter, or null."""
    state: str
    """One of queued, running, done, failed and cancelled."""
    directory: str
    """The run directory."""
    rounds: int
    """Committed rounds."""
    sequences: int
    """Responses in them."""
    entropy: Entropy | None
    """`entropy` of result.json so far, nats; null before a round is committed."""
    gradient: Gradient | None
    """`gradient` of result.json so far; null before."""
    beta_version: int | None
    """Newest version of its fit; null before."""
    submitted: str
    """UTC, ISO 8601; as are `started` and `finished`, null before."""
    started: str | None
    """When work on it began."""
    finished: str | None
    """When it ended."""
    cause: str | None
    """Why it failed or was cancelled."""
    exit_code: int | None
    """Exit code of a `run` of it; null while it is open."""
    against: str | None = None
    """Of a comparison, the checkpoint A."""
    change: ChangeFigure | None = None
    """Of a comparison, the total change so far, nats a response; null before a round is committed."""
    series: str | None = None
    """Name of its series, or null."""
    step: int | None = None
    """Step of the trainer, or null."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Labels by name."""


@dataclass(frozen=True)
class Status(JsonObject):
    """The state of a service or a run."""

    name: str
    """Name of the service or run."""
    kind: str
    """One of service and run."""
    state: str
    """One of starting, idle, loading, measuring, closing and failed; see also `draining`."""
    namespace: str
    """Ray namespace of its actors."""
    directory: str
    """Directory of its files."""
    since: str
    """UTC, ISO 8601."""
    draining: bool
    """It refuses new measurements."""
    actors_asked: int
    """Rollout actors asked for."""
    actors_alive: int
    """Rollout actors that have loaded the current checkpoint, with leaving ones."""
    actors: tuple[Actor, ...]
    """Each rollout actor."""
    last_failure: str | None
    """Why an actor last died or did not start, or null."""
    problem: str | None
    """Why the service cannot work, or null."""
    measurement: MeasurementInfo | None
    """The running one, or null."""
    progress: Progress | None
    """Of the running measurement; null before its first shard."""
    shards_retried: int
    """Shards retried in the committed rounds of the running measurement."""
    queued: tuple[str, ...]
    """Ids of queued measurements, next first."""
    ended: int
    """Number of measurements that have ended."""
    nodes: int
    """Live nodes of the cluster."""
    resources: Mapping[str, float]
    """Total resources of the cluster (CPU, GPU, own)."""
    free: Mapping[str, float]
    """Unused resources of the cluster."""
    warnings: tuple[str, ...]
    """One line each."""
    actors_starting: int = 0
    """Rollout actors that start or load the checkpoint, without superfluous ones."""
    actors_leaving: int = 0
    """Superfluous rollout actors; they end once their shards are committed."""


@dataclass(frozen=True, kw_only=True)
class BetaReply(Beta):
    """A version of the fitted baseline, with its measurement."""

    measurement: str
    """Id of the measurement."""
    policy_id: str
    """Names checkpoint and sampling policy."""

    def to_json(self) -> dict[str, object]:
        """Plain JSON types."""
        return {"measurement": self.measurement, "policy_id": self.policy_id} | super().to_json()


@dataclass(frozen=True)
class Variance(JsonObject):
    """Advantage statistics of the committed rounds and of the newest fit."""

    measurement: str
    """Id of the measurement."""
    beta_version: int | None
    """Of the last committed round; null before one is committed."""
    rounds: int
    """Committed rounds."""
    sequences: int
    """Responses in them."""
    tokens: int
    """Response tokens in them."""
    advantage_variance: Mapping[Mode, float | None] | None
    """By mode, nats^2 per token, centred, under the configured fit."""
    advantage_mean_square: Mapping[Mode, float | None] | None
    """By mode, nats^2 per token, about zero, as in the score term."""
    advantage_mean_square_ratio: Mapping[Mode, Estimate | None] | None
    """By mode, the ratio to `none` with its standard error (shards as clusters)."""
    gradient: Gradient | None
    """`norm_raw`, `norm_debiased`, `norm_sq_debiased`, `trace_cov` and `snr`, as in result.json."""
    in_sample: Mapping[Mode, float | None]
    """By mode, nats^2 per token, of the newest fit on its own records: an optimistic value, which may be a version
    ahead of the committed rounds (`in_sample_version`)."""
    in_sample_version: int | None
    """Version of that fit."""
    mode: str | None
    """Baseline in use; null before a round is committed."""
    advantage_paired: tuple[PairedDifference, ...] | None
    """Differences between modes on the same tokens, as in result.json."""
    features: tuple[str, ...] = ()
    """Columns of the regression; empty before a round is committed."""


@dataclass(frozen=True)
class Scaled(JsonObject):
    """The answer to `scale`."""

    asked: int
    """Rollout actors asked for now."""
    alive: int
    """Rollout actors that have loaded the checkpoint, with leaving ones."""
    room: int
    """Rollout actors that the cluster's nodes could hold if they were empty."""
    messages: tuple[str, ...]
    """Consequences, one line each."""


@dataclass(frozen=True)
class Followed(JsonObject):
    """The events of a measurement since the last call."""

    cursor: int
    """Pass it to the next call."""
    events: tuple[Progress, ...]
    """Progress and notes, oldest first."""
    info: MeasurementInfo
    """The measurement."""
    closing: bool = False
    """The service or run is ending, and the measurement with it."""
