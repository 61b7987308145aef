"""What the fitter does, as a plain class: accept records, close rounds, hand out fits. numpy only.

Totals are formed in canonical order (rounds, then shard index), so beta has the same bits whatever the order of
arrival and the number of actors.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_probe.core.baselines import TARGET, BaselineRule, PublishedFit
from ray_probe.core.records import Record, check, total
from ray_probe.core.variance import in_sample_mean_squares
from ray_probe.errors import ConfigError, RecordError, bad_value
from ray_probe.ledger import Entry, Ledger, read_ledger, rewrite_ledger
from ray_probe.messages import Array, Delivery, Receipt, ShardKey


class Fitter:
    """Owns the summed records of one checkpoint.

    Args:
        rule: how the baseline is formed.
        policy_id: the policy whose responses the records are of.
        ledger_path: file that accepted records are written to before they are acknowledged; None keeps none.
        finished: the shards of each round that a resumed run keeps; those rounds are rebuilt from the ledger, all
            other records in it are dropped.
    """

    def __init__(
        self,
        rule: BaselineRule,
        policy_id: str,
        ledger_path: Path | None = None,
        finished: Sequence[Sequence[int]] = (),
    ) -> None:
        self._rule = rule
        self._policy_id = policy_id
        self._previous = self._current = PublishedFit.empty(rule, policy_id)
        self._betas = [self._report(self._current)]
        self._open: dict[int, Record] = {}
        self._packed: dict[ShardKey, Array] = {}
        if ledger_path is not None:
            self._restore(ledger_path, finished)
        self._ledger = None if ledger_path is None else Ledger(ledger_path)

    @property
    def current(self) -> PublishedFit:
        """The newest fit: everything through the last closed round."""
        return self._current

    def accept(self, delivery: Delivery) -> Receipt:
        """Take in a shard's record, once.

        Raises RecordError for one that does not fit the run or cannot be written to the ledger; it is not merged.
        """
        self._check_origin(delivery)
        key = (delivery.round, delivery.shard)
        if key in self._packed:
            kept = self._packed[key]
            if kept.tobytes() == delivery.packed.tobytes():
                return Receipt("duplicate")
            return Receipt("different", kept)
        if delivery.round != self._current.round + 1:
            raise RecordError(f"round: got {delivery.round}; round {self._current.round + 1} is open")
        record = Record.unpack(delivery.packed)
        check(record, self._rule.shape)
        if self._ledger is not None:
            self._ledger.append(Entry(delivery.round, delivery.shard, delivery.packed))
        self._open[delivery.shard] = record
        self._packed[key] = delivery.packed.copy()
        return Receipt("accepted")

    def close_round(self, round_number: int, shards: Sequence[int], since: int | None = None) -> PublishedFit:
        """Fold the records of these shards, fit, and return the fit that this round's gradients use.

        With `lagged` that is the fit of the rounds before, with the others the new one. Closing a round again
        returns the same fit. Records of shards that are not listed (they were given up) are dropped.

        Args:
            round_number: the open round.
            shards: the shards whose record counts.
            since: first of the rounds whose shards may still be done again, and are known then; None: this one.

        Raises:
            RecordError: another round is open, or a listed shard's record is missing.
        """
        if round_number == self._current.round:
            return self._fit_in_use()
        if round_number != self._current.round + 1:
            raise RecordError(f"round {round_number}: cannot be closed; round {self._current.round + 1} is open")
        missing = sorted(set(shards) - set(self._open))
        if missing:
            raise RecordError(f"round {round_number}: cannot be closed; no record of shards {missing} is in")
        self._close(shards, round_number if since is None else since)
        return self._fit_in_use()

    def beta(self, version: int | None = None) -> dict[str, Any]:
        """A global fit by feature name, as result.json holds it (spec section 9): the current one, or an earlier one.

        Raises:
            ConfigError: there is no such version.
        """
        betas = self._betas
        if version is None:
            return betas[-1]
        if not 0 <= version < len(betas):
            raise ConfigError(bad_value("version", version, f"there are versions 0 to {len(betas) - 1}"))
        return betas[version]

    def variance(self) -> dict[str, Any]:
        """How well the current fit explains its own rows, from sums alone: flattering, so it is labelled `in_sample`.

        Mean squared residual of the baseline's target by mode, nats^2 per token.
        """
        fit = self._current
        beta_DK = None if fit.ridge is None else fit.ridge.beta_DK
        squares = in_sample_mean_squares(fit.total, fit.position_average().mean_B, beta_DK)
        counts = {"version": fit.version, "tokens": fit.total.tokens, "sequences": fit.total.sequences}
        return counts | {"in_sample": squares}

    def close(self) -> None:
        """Let go of the ledger."""
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def _report(self, fit: PublishedFit) -> dict[str, Any]:
        ridge = fit.ridge
        return {
            "features": list(self._rule.features),
            "values": None if ridge is None else ridge.beta_DK[:, TARGET].tolist(),
            "version": fit.version,
            "round": fit.round,
            "ridge_lambda": self._rule.ridge_lambda,
            "tokens": fit.total.tokens,
            "sequences": fit.total.sequences,
            "r2": None if ridge is None else ridge.r2_K[TARGET],
            "condition_number": None if ridge is None else ridge.condition_number,
            "fallback": "residual_mu" if ridge is None else None,
        }

    def _fit_in_use(self) -> PublishedFit:
        return self._previous if self._rule.fit == "lagged" else self._current

    def _close(self, shards: Sequence[int], since: int) -> None:
        latest = total((self._open[shard] for shard in sorted(set(shards))), self._rule.shape)
        self._previous, self._current = self._current, self._current.after_round(latest)
        self._open = {}
        self._packed = {key: packed for key, packed in self._packed.items() if key[0] >= since}
        self._betas.append(self._report(self._current))

    def _check_origin(self, delivery: Delivery) -> None:
        if delivery.policy_id != self._policy_id:
            raise RecordError(f"policy_id: got {delivery.policy_id!r}; the run has {self._policy_id!r}")
        if delivery.features != self._rule.features:
            raise RecordError(f"features: got {delivery.features!r}; the run has {self._rule.features!r}")

    def _restore(self, path: Path, finished: Sequence[Sequence[int]]) -> None:
        wanted = {(number, shard) for number, shards in enumerate(finished) for shard in shards}
        kept = [entry for entry in read_ledger(path) if (entry.round, entry.shard) in wanted]
        for number, shards in enumerate(finished):
            self._open = {entry.shard: Record.unpack(entry.packed) for entry in kept if entry.round == number}
            self.close_round(number, shards)
        rewrite_ledger(path, kept)
