"""What the fitter does, as a plain class: accept records, close rounds, hand out fits. numpy only.

Totals are formed in canonical order (rounds, then shard index), so beta has the same bits whatever the order of
arrival and the number of actors. With a ledger nothing is known that is not on disk: a fitter that is made again from
it has the same versions, to the bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.baselines import TARGET, BaselineRule, PublishedFit
from ray_probe.core.estimator.record_checks import check, check_packed
from ray_probe.core.estimator.records import SCHEMA_VERSION, Record, total
from ray_probe.core.estimator.variance import in_sample_mean_squares
from ray_probe.errors import ConfigError, RecordError, bad_value
from ray_probe.fitter.ledger import Ledger, kept_rounds
from ray_probe.fitter.ledger_format import Accepted, Closed, Different, Entry, digest_of
from ray_probe.run.messages import Delivery, InSample, Receipt, ShardKey, shard_label
from ray_probe.run.result import Beta

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Counts:
    """What came to a fitter.

    Attributes:
        records: shards whose record was accepted, in every round so far.
        duplicates: deliveries of a record that was in already, since this fitter was made.
        conflicts: shards that came again with other bytes though made on the same kind of CPU, in order.
        regenerated: shards that came again with other bytes, where that may be: on CUDA, or on another kind of CPU.
        torn_bytes: bytes of unfinished entries that were cut off the ledger so far.
        openings: how often the ledger was opened, this time included; 0 without a ledger.
    """

    records: int
    duplicates: int
    conflicts: tuple[ShardKey, ...]
    regenerated: tuple[ShardKey, ...]
    torn_bytes: int
    openings: int


class Fitter:
    """Owns the summed records of one checkpoint.

    Args:
        rule: how the baseline is formed.
        policy_id: the policy whose responses the records are of.
        ledger_path: file that accepted records are written to before they are acknowledged; None keeps none.
        finished: the shards of each round that a resumed run keeps. Rounds beyond those are open again, with the
            records that are in. None: every round that the ledger closes stays closed.
        run: names what else records must agree on: the prompts and their plan, say.

    Raises:
        LedgerError: the ledger is damaged, another run's, or lacks a finished round.
        OutputError: it cannot be opened or written.
    """

    def __init__(
        self, rule: BaselineRule, policy_id: str, ledger_path: Path | None = None,
        finished: Sequence[Sequence[int]] | None = None, run: str = "",
    ) -> None:  # fmt: skip
        self._rule = rule
        self._policy_id = policy_id
        self._previous = self._current = PublishedFit.empty(rule, policy_id)
        self._betas = [self._report(self._current)]
        self._closed: Closed | None = None
        self._packed: dict[int, dict[int, Array]] = {}
        self._accepted: dict[ShardKey, tuple[str, str]] = {}
        self._different: set[Different] = set()
        self._duplicates = self._torn_bytes = self._openings = 0
        self.notes: list[str] = []
        """What the run's log should say: of a torn ledger, of shards that came again with other bytes."""
        self._ledger: Ledger | None = None
        if ledger_path is not None:
            self._ledger = Ledger(ledger_path, self._origin(run))
            try:
                self._restore(self._ledger, finished, ledger_path)
            except BaseException:
                self.close()
                raise

    @property
    def current(self) -> PublishedFit:
        """The newest fit: everything through the last closed round."""
        return self._current

    @property
    def sync_s(self) -> float:
        """Seconds that the last write took to be on disk; 0 without a ledger."""
        return 0.0 if self._ledger is None else self._ledger.sync_s

    @property
    def counts(self) -> Counts:
        """What came so far."""
        conflicts = {(d.round, d.shard) for d in self._different if self._is_conflict(d)}
        regenerated = {(d.round, d.shard) for d in self._different} - conflicts
        return Counts(
            len(self._accepted), self._duplicates, tuple(sorted(conflicts)), tuple(sorted(regenerated)),
            self._torn_bytes, self._openings,
        )  # fmt: skip

    def accept(self, delivery: Delivery) -> Receipt:
        """Take in a shard's record, once.

        Raises:
            RecordError: it does not fit the run; it is not merged.
            OutputError: it cannot be written to the ledger; it is not merged.
        """
        (answer,) = self.accept_all([delivery])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def accept_all(self, deliveries: Sequence[Delivery]) -> list[Receipt | Exception]:
        """Take in records that came together, each once, with one write to the ledger.

        Returns:
            for each what `accept` would return, or what it would raise.

        Raises:
            OutputError: the ledger cannot be written; none of them is merged.
        """
        fresh: dict[ShardKey, Accepted] = {}
        answers = [self._answered(self._look_at, delivery, fresh) for delivery in deliveries]
        if fresh:
            self._write(*fresh.values())
        for entry in fresh.values():
            self._keep(entry)
        return [
            self._answered(self._again, delivery) if answer is None else answer
            for delivery, answer in zip(deliveries, answers, strict=True)
        ]

    def close_round(self, round_number: int, shards: Sequence[int], since: int | None = None) -> PublishedFit:
        """Fold the records of these shards, fit, and return the fit that this round's gradients use.

        With `lagged` that is the fit of the rounds before, with the others the new one. Closing a round again
        returns the same fit. Records of shards that are not listed (they were given up) are left out.

        Args:
            round_number: the open round.
            shards: the shards whose record counts.
            since: first of the rounds whose shards may still be done again, and are known then; None: this one.

        Raises:
            RecordError: another round is open, a listed shard's record is missing, or others were listed before.
            OutputError: the ledger cannot be written; the round stays open.
        """
        listed = tuple(sorted({int(shard) for shard in shards}))
        if self._closed is not None and round_number == self._closed.round:
            if listed != self._closed.shards:
                raise RecordError(f"round {round_number + 1}: was closed with shards {list(self._closed.shards)}")
            return self._fit_in_use()
        if round_number != self._current.round + 1:
            raise RecordError(f"round {round_number + 1}: cannot be closed; round {self._current.round + 2} is open")
        missing = sorted(set(listed) - set(self._packed.get(round_number, ())))
        if missing:
            raise RecordError(f"round {round_number + 1}: cannot be closed; no record of shards {missing} is in")
        entry = Closed(round_number, listed, round_number if since is None else since)
        self._write(entry)
        self._fold(entry)
        return self._fit_in_use()

    def beta(self, version: int | None = None) -> Beta:
        """Return a version of the global fit; None: the current one.

        Raises:
            ConfigError: there is no such version.
        """
        betas = self._betas
        if version is None:
            return betas[-1]
        if not 0 <= version < len(betas):
            raise ConfigError(bad_value("version", version, f"there are versions 0 to {len(betas) - 1}"))
        return betas[version]

    def variance(self) -> InSample:
        """How well the current fit explains its own rows, from sums alone: flattering, so it is labelled `in_sample`.

        Mean squared residual of the baseline's target by mode, nats^2 per token.
        """
        fit = self._current
        beta_DK = None if fit.ridge is None else fit.ridge.beta_DK
        squares = in_sample_mean_squares(fit.total, fit.position_average().mean_B, beta_DK)
        return InSample(fit.version, fit.total.tokens, fit.total.sequences, squares)

    def close(self) -> None:
        """Let go of the ledger."""
        if self._ledger is not None:
            self._ledger.close()

    def _report(self, fit: PublishedFit) -> Beta:
        ridge = fit.ridge
        return Beta(
            features=self._rule.features,
            values=None if ridge is None else tuple(ridge.beta_DK[:, TARGET].tolist()),
            version=fit.version,
            round=fit.round,
            ridge_lambda=self._rule.ridge_lambda,
            tokens=fit.total.tokens,
            sequences=fit.total.sequences,
            r2=None if ridge is None else ridge.r2_K[TARGET],
            condition_number=None if ridge is None else ridge.condition_number,
            fallback="residual_mu" if ridge is None else None,
        )

    def _fit_in_use(self) -> PublishedFit:
        return self._previous if self._rule.fit == "lagged" else self._current

    def _write(self, *entries: Entry) -> None:
        if self._ledger is not None:
            self._ledger.append(*entries)

    @staticmethod
    def _answered(take: Callable[..., Answer], *args: Any) -> Answer | Exception:
        """The answer to a delivery, or what its sender is to be told: a bad record is no other's concern."""
        try:
            return take(*args)
        except Exception as error:
            return error

    def _look_at(self, delivery: Delivery, fresh: dict[ShardKey, Accepted]) -> Receipt | None:
        """Check a record, and put it among the fresh ones; None: its shard is in already, or will be."""
        self._check_origin(delivery)
        check_packed(delivery.packed, self._rule.shape)
        key = delivery.round, delivery.shard
        if key in self._accepted or key in fresh:
            return None
        if delivery.round != self._current.round + 1:
            raise RecordError(f"round: got {delivery.round + 1}; round {self._current.round + 2} is open")
        check(Record.unpack(delivery.packed), self._rule.shape)
        fresh[key] = Accepted(*key, digest_of(delivery.packed), delivery.made_on, delivery.packed.copy())
        return Receipt("accepted")

    def _keep(self, entry: Accepted) -> None:
        self._packed.setdefault(entry.round, {})[entry.shard] = entry.packed
        self._accepted[entry.round, entry.shard] = entry.sha256, entry.made_on

    def _is_conflict(self, other: Different) -> bool:
        """Whether the other bytes can only come from a fault."""
        return other.made_on.startswith("cpu") and other.made_on == self._accepted[other.round, other.shard][1]

    def _again(self, delivery: Delivery) -> Receipt:
        """The answer to a shard that is in already."""
        key, digest, made_on = (delivery.round, delivery.shard), digest_of(delivery.packed), delivery.made_on
        if digest == self._accepted[key][0]:
            self._duplicates += 1
            return Receipt("duplicate")
        entry = Different(*key, digest, made_on)
        if entry not in self._different:
            self._write(entry)
            self._different.add(entry)
            self.notes.append(f"{shard_label(*key)} came again with other bytes; the first record stays")
        kept = self._packed.get(key[0], {}).get(key[1])
        if kept is None:
            raise RecordError(f"record: {shard_label(*key)} was committed with other bytes; this one is not merged")
        return Receipt("different", kept)

    def _fold(self, entry: Closed) -> None:
        records = self._packed.get(entry.round, {})
        latest = total((Record.unpack(records[shard]) for shard in entry.shards), self._rule.shape)
        self._previous, self._current = self._current, self._current.after_round(latest)
        self._closed = entry
        self._packed = {number: known for number, known in self._packed.items() if number >= entry.since}
        self._betas.append(self._report(self._current))

    def _check_origin(self, delivery: Delivery) -> None:
        if delivery.policy_id != self._policy_id:
            raise RecordError(f"policy_id: got {delivery.policy_id!r}; the run has {self._policy_id!r}")
        if delivery.features != self._rule.features:
            raise RecordError(f"features: got {delivery.features!r}; the run has {self._rule.features!r}")
        if any(type(place) is not int or place < 0 for place in (delivery.round, delivery.shard)):
            raise RecordError(f"shard: got {delivery.round!r}/{delivery.shard!r}; need two integers >= 0")

    def _origin(self, run: str) -> dict[str, object]:
        """What the ledger must belong to."""
        rule = asdict(self._rule) | {"features": list(self._rule.features)}
        return {"run": run, "policy_id": self._policy_id, **rule, "record_version": SCHEMA_VERSION}

    def _restore(self, ledger: Ledger, finished: Sequence[Sequence[int]] | None, path: Path) -> None:
        """Do again what the ledger says, and start to write to it."""
        contents = ledger.read()
        closed = contents.closed if finished is None else kept_rounds(contents, finished, path)
        for accepted in contents.records.values():
            self._keep(accepted)
        for entry in closed:
            self._fold(entry)
        self._different = contents.different
        self._torn_bytes, self._openings = contents.torn_bytes, contents.openings + 1
        if ledger.torn_bytes:
            cut = f"{ledger.torn_bytes} bytes of an entry that was never finished were cut off"
            self.notes.append(f"{path.name}: {cut}; it had not been acknowledged")
        ledger.begin(len(closed))
