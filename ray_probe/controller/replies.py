"""Answers of a service or a run, the same in Python and as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ray_probe.core.estimator.modes import Mode
from ray_probe.run.comparison.change import ChangeFigure
from ray_probe.run.progress import Progress
from ray_probe.run.result import Beta, Entropy, Estimate, Gradient, PairedDifference


class Reply:
    """Base of all answers."""

    def to_json(self) -> dict[str, object]:
        """Returns plain JSON types."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]


@dataclass(frozen=True)
class Actor(Reply):
    """One rollout actor.

    Attributes:
        number: counts up as actors are started.
        state: starting, loading, idle, or its task (`collect 0/3`: round/shard); `, leaving` once it is superfluous.
        node: address of its node; None before it started.
        pid: of its process; None before it started.
        tokens: tokens sampled and scored since it started, by its last report; None before the first.
    """

    number: int
    state: str
    node: str | None
    pid: int | None
    tokens: int | None


@dataclass(frozen=True)
class MeasurementInfo(Reply):
    """A measurement, with figures of its result so far.

    Attributes:
        id: `m0001`, counting up.
        checkpoint: directory that is measured.
        adapter: directory of the adapter, or None.
        state: queued, running, done, failed or cancelled.
        directory: of the run.
        rounds: committed rounds.
        sequences: responses in them.
        entropy: `entropy` of result.json so far, nats; None before a round is committed.
        gradient: `gradient` of result.json so far; None before.
        beta_version: newest version of its fit; None before.
        submitted: UTC, ISO 8601; as are `started` and `finished`, None before.
        started: when work on it began.
        finished: when it ended.
        cause: why it failed or was cancelled.
        exit_code: exit code of a `run` of it; None while it is open.
        against: of a comparison, the checkpoint A.
        change: of a comparison, the total change so far, nats a response; None before a round is committed.
        series: name of its series, or None.
        step: of the trainer, or None.
        tags: labels by name.
    """

    id: str
    checkpoint: str
    adapter: str | None
    state: str
    directory: str
    rounds: int
    sequences: int
    entropy: Entropy | None
    gradient: Gradient | None
    beta_version: int | None
    submitted: str
    started: str | None
    finished: str | None
    cause: str | None
    exit_code: int | None
    against: str | None = None
    change: ChangeFigure | None = None
    series: str | None = None
    step: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Status(Reply):
    """The state of a service or a run.

    Attributes:
        name: of the service or run.
        kind: service or run.
        state: starting, idle, loading, measuring, closing or failed; see also `draining`.
        namespace: Ray namespace of its actors.
        directory: of its files.
        since: UTC, ISO 8601.
        draining: it refuses new measurements.
        actors_asked: rollout actors asked for.
        actors_alive: rollout actors that have loaded the current checkpoint, with leaving ones.
        actors: each rollout actor.
        last_failure: why an actor last died or did not start, or None.
        problem: why the service cannot work, or None.
        measurement: the running one, or None.
        progress: of the running measurement; None before its first shard.
        shards_retried: shards retried in the committed rounds of the running measurement.
        queued: ids of queued measurements, next first.
        ended: number of measurements that have ended.
        nodes: live nodes of the cluster.
        resources: total resources of the cluster (CPU, GPU, own).
        free: unused resources of the cluster.
        warnings: one line each.
        actors_starting: rollout actors that start or load the checkpoint, without superfluous ones.
        actors_leaving: superfluous rollout actors; they end once their shards are committed.
    """

    name: str
    kind: str
    state: str
    namespace: str
    directory: str
    since: str
    draining: bool
    actors_asked: int
    actors_alive: int
    actors: tuple[Actor, ...]
    last_failure: str | None
    problem: str | None
    measurement: MeasurementInfo | None
    progress: Progress | None
    shards_retried: int
    queued: tuple[str, ...]
    ended: int
    nodes: int
    resources: Mapping[str, float]
    free: Mapping[str, float]
    warnings: tuple[str, ...]
    actors_starting: int = 0
    actors_leaving: int = 0


@dataclass(frozen=True, kw_only=True)
class BetaReply(Beta):
    """A version of the fitted baseline, with its measurement.

    Attributes:
        measurement: id of the measurement.
        policy_id: names checkpoint and sampling policy.
    """

    measurement: str
    policy_id: str

    def to_json(self) -> dict[str, object]:
        """Plain JSON types."""
        return {"measurement": self.measurement, "policy_id": self.policy_id} | super().to_json()


@dataclass(frozen=True)
class Variance(Reply):
    """Advantage statistics of the committed rounds and of the newest fit.

    Attributes:
        measurement: id of the measurement.
        beta_version: of the last committed round; None before one is committed.
        rounds: committed rounds.
        sequences: responses in them.
        tokens: response tokens in them.
        advantage_variance: by mode, nats^2 per token, centred, under the configured fit.
        advantage_mean_square: by mode, nats^2 per token, about zero, as in the score term.
        advantage_mean_square_ratio: by mode, the ratio to `none` with its standard error (shards as clusters).
        gradient: norm_raw, norm_debiased, norm_sq_debiased, trace_cov, snr, as in result.json.
        in_sample: by mode, nats^2 per token, of the newest fit on its own records: an optimistic value, which may be
            a version ahead of the committed rounds (`in_sample_version`).
        in_sample_version: version of that fit.
        mode: baseline in use; None before a round is committed.
        advantage_paired: differences between modes on the same tokens, as in result.json.
        features: columns of the regression; empty before a round is committed.
    """

    measurement: str
    beta_version: int | None
    rounds: int
    sequences: int
    tokens: int
    advantage_variance: Mapping[Mode, float | None] | None
    advantage_mean_square: Mapping[Mode, float | None] | None
    advantage_mean_square_ratio: Mapping[Mode, Estimate | None] | None
    gradient: Gradient | None
    in_sample: Mapping[Mode, float | None]
    in_sample_version: int | None
    mode: str | None
    advantage_paired: tuple[PairedDifference, ...] | None
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scaled(Reply):
    """The answer to `scale`.

    Attributes:
        asked: rollout actors asked for now.
        alive: rollout actors that have loaded the checkpoint, with leaving ones.
        room: rollout actors that the cluster's nodes could hold if they were empty.
        messages: consequences, one line each.
    """

    asked: int
    alive: int
    room: int
    messages: tuple[str, ...]


@dataclass(frozen=True)
class Followed(Reply):
    """The events of a measurement since the last call.

    Attributes:
        cursor: pass it to the next call.
        events: progress and notes, oldest first.
        info: the measurement.
        closing: the service or run is ending, and the measurement with it.
    """

    cursor: int
    events: tuple[Progress, ...]
    info: MeasurementInfo
    closing: bool = False
