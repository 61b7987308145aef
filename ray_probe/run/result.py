"""The types of result.json, and `Beta`, which rounds.jsonl holds too.

What a file leaves out has the value of a run that has measured nothing. No import of numpy or pydantic: the fitter's
process and the tables read these types.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from ray_probe.checkpoints.tokenizer.eos import Eos
from ray_probe.core.estimator.modes import Mode
from ray_probe.errors import ShardError
from ray_probe.run.comparison.change import Change
from ray_probe.run.settings import Settings
from ray_probe.system.json_object import JsonObject, json_schema

EXIT_PARTIAL = 3
StoppedBy = Literal["rounds", "max_sequences", "max_seconds", "prompts", "target_error", "target_out_of_reach"]
FEW_SHARDS = 8
"""Errors by shard are given from this number of shards on."""


@dataclass(frozen=True)
class Beta(JsonObject):
    """A version of the fitted baseline."""

    features: tuple[str, ...] = ()
    """Names of the coefficients."""
    values: tuple[float, ...] | None = None
    """Coefficients, nats per unit of the feature; null where beta could not be fitted."""
    version: int = 0
    """Counts up by one a round; 0 before any record."""
    round: int = -1
    """The last round inside, from 0; -1 before any."""
    ridge_lambda: float | None = None
    """Added to the diagonal of Phi^T Phi."""
    tokens: int = 0
    """Response tokens behind it."""
    sequences: int = 0
    """Responses behind it."""
    r2: float | None = None
    """Centred R² on the same tokens; null without a fit."""
    condition_number: float | None = None
    """Of Phi^T Phi + lambda I; null without a fit."""
    fallback: str | None = None
    """The baseline that replaces `regression` where beta could not be fitted."""


@dataclass(frozen=True)
class Estimate(JsonObject):
    """A ratio with its standard error."""

    value: float | None = None
    """The estimate."""
    se: float | None = None
    """Standard error with shards as clusters; null below 8 shards, and where shards share a prompt."""
    interval: tuple[float, float] | None = None
    """95 % interval, by Student's t below 32 shards."""


@dataclass(frozen=True)
class PairedDifference(JsonObject):
    """The difference of two baselines' mean squared advantage on the same tokens."""

    mode: Mode
    """The baseline whose figure comes first."""
    against: Mode
    """The baseline whose figure is subtracted."""
    difference: float | None = None
    """Nats^2 per token."""
    se: float | None = None
    """Standard error with shards as clusters, nats^2 per token; null as for `Estimate`."""
    interval: tuple[float, float] | None = None
    """95 % interval, nats^2 per token, by Student's t below 32 shards."""


@dataclass(frozen=True)
class Entropy(JsonObject):
    """Entropy of responses, with standard errors clustered by prompt."""

    per_sequence: float | None = None
    """Mean over responses, nats."""
    per_sequence_se: float | None = None
    """Its standard error for prompts like these, nats; null for one prompt."""
    per_token: float | None = None
    """Mean over tokens, nats."""
    per_token_se: float | None = None
    """Its standard error for prompts like these, nats; null for one prompt."""
    per_sequence_se_within: float | None = None
    """Standard error of `per_sequence` for these very prompts, nats; null with one response a prompt."""
    per_token_se_within: float | None = None
    """Standard error of `per_token` for these very prompts, nats; null with one response a prompt."""
    per_sequence_interval: tuple[float, float] | None = None
    """95 % interval of `per_sequence` for prompts like these, nats; by Student's t below 64 prompts."""
    per_token_interval: tuple[float, float] | None = None
    """95 % interval of `per_token` for prompts like these, nats; by Student's t below 64 prompts."""
    clusters: int = 0
    """Different prompts."""


@dataclass(frozen=True)
class Gradient(JsonObject):
    """The gradient of the mean entropy over responses, and its noise."""

    norm_raw: float | None = None
    """Norm of the mean gradient, its noise included, so too large."""
    norm_debiased: float | None = None
    """Root of `norm_sq_debiased`; null where that is not above 0."""
    norm_sq_debiased: float | None = None
    """Unbiased estimate of the squared norm of the expected gradient; may be negative."""
    trace_cov: float | None = None
    """Responses times the trace of the mean gradient's covariance."""
    snr: float | None = None
    """`norm_sq_debiased / (trace_cov / responses)`."""
    why_null: str | None = None
    """Why `norm_sq_debiased`, `trace_cov` and `snr` are null; null where they are not."""


@dataclass(frozen=True)
class Parity(JsonObject):
    """The gap between log q when sampled and log q when scored, over tokens."""

    mean_gap: float | None = None
    """Mean absolute gap, nats."""
    p99_gap: float | None = None
    """99 % of the absolute gaps are below, nats."""
    max_gap: float | None = None
    """Largest absolute gap, nats."""
    outside_nucleus: float | None = None
    """Share of tokens that fell outside the recomputed nucleus."""


@dataclass(frozen=True)
class Positions(JsonObject):
    """What the baseline explains, by bin of the token position."""

    edges: tuple[float, ...] = ()
    """Edges of the bins, tokens; one more than bins."""
    tokens: tuple[float, ...] = ()
    """Tokens in each bin."""
    target_mean: tuple[float | None, ...] = ()
    """Mean target in each bin, nats; null without a token."""
    mu_hat_mean: tuple[float | None, ...] = ()
    """Mean of the configured `mu_hat` in each bin, nats; null without a token."""


@dataclass(frozen=True)
class Counts(JsonObject):
    """What is inside the figures."""

    rounds: int = 0
    """Whole rounds."""
    shards: int = 0
    """Shards whose record and gradient count."""
    sequences: int = 0
    """Responses."""
    tokens: int = 0
    """Response tokens."""
    eos_only: int = 0
    """Responses that ended at their first token."""
    truncated: int = 0
    """Responses cut at `generation.max_new_tokens`."""
    unfitted_shards: int = 0
    """Shards without a fit to use: `mu_hat` was 0."""
    shards_retried: int = 0
    """Shards that were computed more than once."""
    regenerated: int = 0
    """Shards whose second record had other bytes where that is no error."""
    repeated_prompts: int = 0
    """Prompts that were used more than once."""
    actors: int = 0
    """Rollout actors that the run requested."""


@dataclass(frozen=True)
class Timing(JsonObject):
    """Where the time went, seconds."""

    seconds: float | None = None
    """All rounds, on the clock."""
    generate_s: float | None = None
    """Sampling, summed over actors."""
    teacher_force_s: float | None = None
    """Scoring without gradient, summed over actors."""
    backward_s: float | None = None
    """Scoring with gradient and backward, summed over actors."""
    fit_s: float | None = None
    """From the last record of a round to its fit."""
    wait_s: float | None = None
    """Idle, summed over actors."""
    tokens_per_second: float | None = None
    """Response tokens per second of `seconds`."""


@dataclass(frozen=True)
class Result(JsonObject):
    """The estimates of the committed rounds of a run: result.json."""

    OMITTED: ClassVar[frozenset[str]] = frozenset({"eos", "change"})

    schema_version: int = 1
    """Version of this format."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration."""
    beta: Beta = field(default_factory=Beta)
    """The fitter's newest global fit."""
    advantage_variance: Mapping[Mode, float | None] = field(default_factory=dict)
    """By baseline, centred variance of the advantage, nats^2 per token."""
    advantage_mean_square: Mapping[Mode, float | None] = field(default_factory=dict)
    """By baseline, mean squared advantage, nats^2 per token: the noise of the score term."""
    advantage_mean_square_se: Mapping[Mode, float | None] = field(default_factory=dict)
    """By baseline, its standard error with shards as clusters, nats^2 per token."""
    advantage_mean_square_ratio: Mapping[Mode, Estimate | None] = field(default_factory=dict)
    """By baseline, the ratio of its mean squared advantage to that of `none`."""
    advantage_paired: tuple[PairedDifference, ...] = ()
    """Differences of the mean squared advantage between baselines."""
    entropy: Entropy = field(default_factory=Entropy)
    """Entropy of responses."""
    gradient: Gradient = field(default_factory=Gradient)
    """The gradient and its noise."""
    parity: Parity = field(default_factory=Parity)
    """Whether the scored policy is the one that sampled."""
    positions: Positions = field(default_factory=Positions)
    """What the baseline explains, by position."""
    counts: Counts = field(default_factory=Counts)
    """Counts of what the figures hold."""
    stopped_by: StoppedBy | None = None
    """The limit that ended the run, or `target_error`: its own error was small enough; null: the run is unfinished."""
    partial: Literal[False] | tuple[str, ...] = False
    """Ids of shards that were given up, `round/shard` from 0; false where no shard was."""
    conflicts: tuple[str, ...] = ()
    """Ids of shards that came twice with different bytes."""
    timing: Timing = field(default_factory=Timing)
    """Where the time went."""
    eos: Eos | None = None
    """The token ids that end a response; absent in a result that was written without its checkpoint."""
    change: Change | None = None
    """Of a comparison, the change of entropy between two checkpoints; absent for a gradient."""

    @classmethod
    def from_json(cls, raw: object) -> Self:
        """Read the object of result.json; a section that is null counts as absent.

        Raises:
            ValueError: one line that names the first key that has another type.
        """
        present = {key: item for key, item in raw.items() if item is not None} if isinstance(raw, Mapping) else raw
        return super().from_json(present)

    @property
    def settings(self) -> Settings:
        """The settings that reports read."""
        return Settings.of(self.config)

    @property
    def exit_code(self) -> int:
        """Exit code of a command: 1 for conflicts, 3 for a partial result, else 0."""
        return ShardError.exit_code if self.conflicts else EXIT_PARTIAL if self.partial else 0


if __name__ == "__main__":
    print(json.dumps(json_schema(Result), indent=1))
