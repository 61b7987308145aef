"""What the fitter does, as a plain class: accept records, close rounds, hand out fits. numpy only.

Totals are formed in canonical order (rounds, then shard index), so beta has the same bits whatever the order of
arrival and the number of actors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ray_probe.core.baselines import TARGET, BaselineRule, PublishedFit
from ray_probe.core.records import Record, check, total
from ray_probe.core.variance import in_sample_mean_square
from ray_probe.errors import RecordError
from ray_probe.ledger import Entry, Ledger, read_ledger, rewrite_ledger


@dataclass(frozen=True, eq=False)
class Delivery:
    """A shard's record on its way to the fitter: what it was made under, its place in the plan, and its bytes."""

    policy_id: str
    features: tuple[str, ...]
    round: int
    shard: int
    packed: npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Receipt:
    """The fitter's answer to a delivery.

    Attributes:
        status: accepted, or a duplicate with equal bytes, or different bytes for a shard that is in already (a
            conflict on a CPU; `regenerated` on CUDA, where a redone shard may differ in its last bits).
        kept: the record that counts, where it is not the one delivered; it is what must be left out of the fit.
    """

    status: Literal["accepted", "duplicate", "different"]
    kept: npt.NDArray[np.float64] | None = None


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
        self._open: dict[int, Record] = {}
        self._packed: dict[tuple[int, int], npt.NDArray[np.float64]] = {}
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

    def close_round(self, round_number: int, shards: Sequence[int]) -> PublishedFit:
        """Fold the records of these shards, fit, and return the fit that this round's gradients use.

        With `lagged` that is the fit of the rounds before, with the others the new one. Closing a round again
        returns the same fit. Records of shards that are not listed (they were given up) are dropped.

        Raises RecordError when another round is open or a listed shard's record is missing.
        """
        if round_number == self._current.round:
            return self._fit_in_use()
        if round_number != self._current.round + 1:
            raise RecordError(f"round {round_number}: cannot be closed; round {self._current.round + 1} is open")
        missing = sorted(set(shards) - set(self._open))
        if missing:
            raise RecordError(f"round {round_number}: cannot be closed; no record of shards {missing} is in")
        self._close(shards)
        return self._fit_in_use()

    def beta(self) -> dict[str, Any]:
        """The current global fit by feature name, as result.json holds it (spec section 9)."""
        fit, rule = self._current, self._rule
        ridge = fit.ridge
        return {
            "features": list(rule.features),
            "values": None if ridge is None else ridge.beta_DK[:, TARGET].tolist(),
            "version": fit.version,
            "round": fit.round,
            "ridge_lambda": rule.ridge_lambda,
            "tokens": fit.total.tokens,
            "sequences": fit.total.sequences,
            "r2": None if ridge is None else ridge.r2_K[TARGET],
            "condition_number": None if ridge is None else ridge.condition_number,
            "fallback": "residual_mu" if ridge is None else None,
        }

    def in_sample_mean_square(self) -> float | None:
        """Mean squared residual of the current fit on its own rows, nats^2 per token: flattering, see `variance`."""
        ridge = self._current.ridge
        return None if ridge is None else in_sample_mean_square(self._current.total, ridge.beta_DK)

    def _fit_in_use(self) -> PublishedFit:
        return self._previous if self._rule.fit == "lagged" else self._current

    def _close(self, shards: Sequence[int]) -> None:
        latest = total((self._open[shard] for shard in sorted(set(shards))), self._rule.shape)
        self._previous, self._current = self._current, self._current.after_round(latest)
        self._open = {}
        self._packed = {key: packed for key, packed in self._packed.items() if key[0] == self._current.round}

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
