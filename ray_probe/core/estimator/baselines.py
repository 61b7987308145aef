"""The four baselines of one shard, and the rule that they follow. numpy only.

See `leave_one_out` for the fit that they come from, and docs/specification.md, "Baselines".

Shape suffixes: T tokens, D features of a record, E columns of a fit (see `ridge`), B position bins, C coarse position
bins, K targets.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_probe.core.arrays import Array, IntArray
from ray_probe.core.estimator.modes import MODES, Fit, Mode
from ray_probe.core.estimator.records import Shape, bin_of, column_bin_of, position_bins
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


def mu_hat_by_mode(baseline: ShardBaseline, position_T: IntArray, phi_TD: Array | None) -> Mapping[Mode, Array]:
    """Return `mu_hat` of every possible mode: without features, all but regression."""
    possible = MODES if phi_TD is not None or baseline.beta_E is None else MODES[:-1]
    return {mode: baseline.mu_hat(mode, position_T, phi_TD) for mode in possible}
