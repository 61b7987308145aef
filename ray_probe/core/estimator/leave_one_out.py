"""The published fit, from which a shard leaves its own record out. numpy only.

A published fit describes everything through its round. `for_shard` turns it into the `mu_hat` of one shard. With
`leave_one_out` every estimate for that shard comes from records without its own. See docs/specification.md,
"Baselines".

Shape suffixes: E columns of a fit (see `ridge`), K targets.
"""

from dataclasses import dataclass, replace

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.baselines import TARGET, BaselineRule, PositionAverage, ShardBaseline
from ray_probe.core.estimator.records import Record
from ray_probe.core.estimator.ridge import RidgeFit, coefficients, fit, position_means


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
