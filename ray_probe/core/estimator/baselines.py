"""The four baselines and what a published fit holds. numpy only.

A published fit describes everything through its round. `for_shard` turns it into the `mu_hat` of one shard. With
`leave_one_out` every estimate for that shard comes from records without its own. See docs/specification.md,
"Baselines".

Shape suffixes: T tokens, D features of a record, E columns of a fit (see `ridge`), B position bins, C coarse position
bins, K targets.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ray_probe.core.arrays import Array, IntArray
from ray_probe.core.estimator.modes import MODES, Fit, Mode
from ray_probe.core.estimator.records import Record, Shape, bin_of, column_bin_of, position_bins
from ray_probe.core.estimator.ridge import RidgeFit, coefficients, fit, position_means
from ray_probe.errors import ConfigError

TARGET = 0
POSITION_MEAN = "position_mean"


@dataclass(frozen=True)
class BaselineRule:
    """The configured baseline: mode, source of its data, and constants.

    `features` are names of `ray_probe.core.columns.COLUMNS`. A gradient has one target, the comparison of two policies
    has two (see `ray_probe.core.estimator.change`).
    """

    mode: Mode
    fit: Fit
    ridge_lambda: float
    ema_decay: float
    features: tuple[str, ...]
    cap: int
    targets: int = 1

    @property
    def recorded(self) -> tuple[str, ...]:
        """Names of the columns of a record: all but position_mean."""
        return tuple(name for name in self.features if name != POSITION_MEAN)

    @property
    def fitted(self) -> tuple[str, ...]:
        """Names of the columns of a fit: position_mean comes last."""
        return self.recorded + ((POSITION_MEAN,) if self.with_position_mean else ())

    @property
    def with_position_mean(self) -> bool:
        """Whether the fit appends the column position_mean."""
        return POSITION_MEAN in self.features

    @property
    def shape(self) -> Shape:
        """Sizes of this run's records."""
        return Shape(len(self.recorded), self.targets, position_bins(self.cap))


@dataclass(frozen=True, eq=False)
class PositionAverage:
    """Averages each target by position bin over rounds, exponentially.

    `mean_BK` are its values, in the targets' unit; `seen_B` marks the bins that a token has reached.
    """

    mean_BK: Array
    seen_B: npt.NDArray[np.bool_]

    @property
    def mean_B(self) -> Array:
        """The average of the first target, nats."""
        return self.mean_BK[:, TARGET]

    @classmethod
    def empty(cls, shape: Shape) -> "PositionAverage":
        """The average of nothing: 0 everywhere, no bin seen."""
        return cls(np.zeros((shape.bins, shape.targets)), np.zeros(shape.bins, bool))

    def updated(self, sum_BK: Array, weight_B: Array, decay: float) -> "PositionAverage":
        """Return the average one round further.

        `decay` is the share of the old value. A bin starts at its first mean.
        """
        present_B1, weight_B1 = (weight_B > 0)[:, None], weight_B[:, None]
        round_BK = np.divide(sum_BK, weight_B1, out=np.zeros_like(sum_BK), where=present_B1)
        blended_BK = np.where(self.seen_B[:, None], decay * self.mean_BK + (1.0 - decay) * round_BK, round_BK)
        return PositionAverage(np.where(present_B1, blended_BK, self.mean_BK), self.seen_B | present_B1[:, 0])


@dataclass(frozen=True, eq=False)
class ShardBaseline:
    """`mu_hat` of every mode for one shard, detached numbers only.

    Attributes:
        mode: the configured mode.
        constant: mean target, nats.
        position_mean_B: mean target by position bin, nats.
        beta_E: ridge coefficients, or None where beta could not be fitted: `regression` is then `residual_mu`.
        cap: max_new_tokens.
        fitted: some record was left to fit on.
        column_C: the column position_mean by coarse position bin, nats; None where the fit has none.
    """

    mode: Mode
    constant: float
    position_mean_B: Array
    beta_E: Array | None
    cap: int
    fitted: bool
    column_C: Array | None = None

    def mu_hat(self, mode: Mode, position_T: IntArray, phi_TD: Array | None) -> Array:
        """Return `mu_hat_j` of one mode [T], nats.

        `phi_TD` are the columns of a record. Raises ConfigError for regression without features.
        """
        if mode == "none":
            return np.zeros(len(position_T))
        if mode == "constant":
            return np.full(len(position_T), self.constant)
        if mode == "residual_mu" or self.beta_E is None:
            return self.position_mean_B[bin_of(position_T, self.cap)]
        if phi_TD is None:
            raise ConfigError(
                "estimator.baseline.mode: got 'regression' for results without features; "
                "teacher-force with return_baseline_features=True"
            )
        product_T: Array = phi_TD @ self.beta_E[: phi_TD.shape[1]]
        if self.column_C is not None:
            bins_T = column_bin_of(bin_of(position_T, self.cap), position_bins(self.cap))
            product_T += self.column_C[bins_T] * self.beta_E[-1]
        return product_T


@dataclass(frozen=True, eq=False)
class PublishedFit:
    """A numbered, immutable fit from which an actor can leave its own shard out.

    Attributes:
        rule: how the baseline is formed.
        policy_id: the policy (checkpoint and sampling rule) whose responses these are.
        version: 0 before any record, then one more a round.
        round: the last round inside, or -1.
        total: every record through `round`.
        latest: the records of `round` alone.
        before: the position average through the round before.
        ridge: the global fit on `total`, or None.
    """

    rule: BaselineRule
    policy_id: str
    version: int
    round: int
    total: Record
    latest: Record
    before: PositionAverage
    ridge: RidgeFit | None

    @classmethod
    def empty(cls, rule: BaselineRule, policy_id: str) -> "PublishedFit":
        """The fit before any record."""
        zero = Record.zero(rule.shape)
        return cls(rule, policy_id, 0, -1, zero, zero, PositionAverage.empty(rule.shape), None)

    def after_round(self, latest: Record) -> "PublishedFit":
        """The next fit: one more round's summed record."""
        everything = self.total + latest
        return PublishedFit(
            self.rule, self.policy_id, self.version + 1, self.round + 1, everything, latest, self.position_average(),
            fit(everything, self.rule.ridge_lambda, self.rule.with_position_mean),
        )  # fmt: skip

    def for_broadcast(self) -> "PublishedFit":
        """Return the fit without its tables of prompts.

        No baseline reads them, and they grow with the prompts used.
        """
        return replace(self, total=self.total.without_prompts(), latest=self.latest.without_prompts())

    def position_average(self, own: Record | None = None) -> PositionAverage:
        """The position average through this round, without the shard `own` of this round."""
        latest = self.latest if own is None else self.latest - own
        return self.before.updated(latest.bin_sum_BK, latest.bin_weight_B, self.rule.ema_decay)

    def for_shard(self, own: Record | None, target: int = TARGET) -> ShardBaseline:
        """The baseline of one shard.

        Args:
            own: the shard's record exactly as it was sent, when it is inside this fit; it is left out with
                `leave_one_out`. None with `lagged`, whose fit ends before the shard's round.
            target: number of the target.
        """
        if self.rule.fit != "leave_one_out":
            own = None
        rest = self.total if own is None else self.total - own
        beta_EK = self._beta(rest, own)
        beta_E = None if beta_EK is None else beta_EK[:, target]
        constant = float(rest.target_sum_K[target] / rest.weight) if rest.tokens else 0.0
        mean_B = self.position_average(own).mean_BK[:, target]
        column_C = position_means(rest)[:, target] if self.rule.with_position_mean else None
        return ShardBaseline(self.rule.mode, constant, mean_B, beta_E, self.rule.cap, rest.tokens > 0, column_C)

    def _beta(self, rest: Record, own: Record | None) -> Array | None:
        if own is None:
            return None if self.ridge is None else self.ridge.beta_EK
        if rest.tokens == 0:
            return None
        return coefficients(rest, self.rule.ridge_lambda, self.rule.with_position_mean)


def mu_hat_by_mode(baseline: ShardBaseline, position_T: IntArray, phi_TD: Array | None) -> Mapping[Mode, Array]:
    """Return `mu_hat` of every possible mode: without features, all but regression."""
    possible = MODES if phi_TD is not None or baseline.beta_E is None else MODES[:-1]
    return {mode: baseline.mu_hat(mode, position_T, phi_TD) for mode in possible}
