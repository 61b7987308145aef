"""What a service and a run in progress answer: frozen, plain types, the same in Python and as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ray_probe.core.estimator.modes import Mode
from ray_probe.run.progress import Progress
from ray_probe.run.result import Beta, Entropy, Estimate, Gradient, PairedDifference


class Reply:
    """Base of all answers."""

    def to_json(self) -> dict[str, object]:
        """Plain JSON types."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]


@dataclass(frozen=True)
class Actor(Reply):
    """One rollout actor.

    Attributes:
        number: counts up as actors are started.
        state: starting, loading, idle, or what it does (`collect 0/3`: round/shard); `, leaving` when it goes soon.
        node: address of its node, or None before it started.
        pid: of its process, or None before it started.
        tokens: tokens sampled and scored since it started, as last heard; None before any answer.
    """

    number: int
    state: str
    node: str | None
    pid: int | None
    tokens: int | None


@dataclass(frozen=True)
class MeasurementInfo(Reply):
    """A measurement and how far it is.

    Attributes:
        id: `m0001`, counting up.
        checkpoint: directory that is measured.
        adapter: directory of the adapter, or None.
        state: queued, running, done, failed or cancelled.
        directory: of the run.
        rounds: whole rounds that are committed.
        sequences: responses in them.
        entropy: `entropy` of result.json so far, nats; None before a round is committed.
        gradient: `gradient` of result.json so far; None before.
        beta_version: newest version that was published for it; None before.
        submitted: UTC, ISO 8601; as are `started` and `finished`, None before.
        started: when work on it began.
        finished: when it ended.
        cause: why it failed or was cancelled.
        exit_code: what a `run` of it would have ended with; None while it is open.
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


@dataclass(frozen=True)
class Status(Reply):
    """How a service or a run is doing.

    Attributes:
        name: of the service or run.
        kind: service or run.
        state: starting, idle, loading, measuring, closing or failed; `draining` is told apart.
        namespace: Ray namespace of its actors.
        directory: where its files are.
        since: UTC, ISO 8601.
        draining: nothing new is taken.
        actors_asked: rollout actors asked for.
        actors_alive: rollout actors that have loaded the checkpoint at hand, those that leave included.
        actors: each of them.
        last_failure: why an actor died or did not start, the last time; None when none did.
        problem: why the service cannot work, or None.
        measurement: the one at work, or None.
        progress: of the one at work, or None before its first shard.
        shards_retried: shards done again in the committed rounds of the one at work.
        queued: ids that wait, next first.
        ended: number of measurements that have ended.
        nodes: live nodes of the cluster.
        resources: total resources of the cluster (CPU, GPU, own).
        free: what of them is free.
        warnings: worth reading.
        actors_starting: rollout actors that start or load the checkpoint, of those that are to stay.
        actors_leaving: rollout actors more than asked for; they leave when nothing depends on them.
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
    """Advantage statistics of the committed rounds, and the newest fit on its own data.

    Attributes:
        measurement: id of the measurement.
        beta_version: of the last committed round; None before one is committed.
        rounds: whole rounds inside.
        sequences: responses inside.
        tokens: response tokens inside.
        advantage_variance: by mode, nats^2 per token, centred, under the configured fit.
        advantage_mean_square: by mode, nats^2 per token, about zero: what the score term sees.
        advantage_mean_square_ratio: by mode, the ratio to `none` with its standard error (shards as clusters).
        gradient: norm_raw, norm_debiased, norm_sq_debiased, trace_cov, snr, as in result.json.
        in_sample: by mode, nats^2 per token: the newest fit on the very records it was fitted on, which flatters;
            it may be a version ahead of the committed rounds (`in_sample_version`).
        in_sample_version: version of that fit.
        mode: baseline in use; None before a round is committed.
        advantage_paired: differences between modes on the same tokens, as in result.json.
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


@dataclass(frozen=True)
class Scaled(Reply):
    """Answer to `scale`.

    Attributes:
        asked: rollout actors asked for now.
        alive: rollout actors that have loaded the checkpoint, those that leave included.
        room: actors that the cluster's nodes can hold in all, whatever else runs there.
        messages: what will happen, one line each.
    """

    asked: int
    alive: int
    room: int
    messages: tuple[str, ...]


@dataclass(frozen=True)
class Followed(Reply):
    """What has happened to a measurement since it was last asked.

    Attributes:
        cursor: pass it to the next call.
        events: progress and notes, oldest first.
        info: the measurement.
        closing: the service or run is being ended; the measurement goes no further.
    """

    cursor: int
    events: tuple[Progress, ...]
    info: MeasurementInfo
    closing: bool = False
