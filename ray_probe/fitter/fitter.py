"""The fitter as a plain class: accepts records, closes rounds, publishes fits.

Totals are summed in canonical order (round, then shard), so beta has the same bits for any order of arrival and any
number of actors. With a ledger, all state is on disk: a fitter restored from it has the same versions, to the bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.baselines import TARGET, BaselineRule
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.record_checks import check, check_packed
from ray_probe.core.estimator.records import SCHEMA_VERSION, Record, total
from ray_probe.core.estimator.variance import in_sample_mean_squares
from ray_probe.errors import MissingError, RecordError, bad_value
from ray_probe.fitter.ledger import kept_rounds
from ray_probe.fitter.ledger_format import Accepted, Closed, Different, Entry, digest_of
from ray_probe.fitter.ledger_writer import LedgerFile
from ray_probe.run.messages import Delivery, InSample, Receipt, ShardKey, shard_label
from ray_probe.run.result import Beta

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Counts:
    """Counts of a fitter's deliveries.

    Attributes:
        records: shards with an accepted record.
        duplicates: deliveries with the same bytes as the accepted record, since this process started.
        conflicts: shards delivered with other bytes from the same kind of CPU, ascending.
        regenerated: shards delivered with other bytes from CUDA or another kind of CPU, ascending.
        torn_bytes: bytes of unfinished entries that were cut off the ledger.
        openings: how often the ledger was opened, this time included; 0 without a ledger.
    """

    records: int
    duplicates: int
    conflicts: tuple[ShardKey, ...]
    regenerated: tuple[ShardKey, ...]
    torn_bytes: int
    openings: int


class Fitter:
    """Sums the records of one checkpoint.

    Args:
        rule: how the baseline is formed.
        policy_id: the policy of the records.
        ledger_path: file that records are written to before they are acknowledged; None: no ledger.
        finished: the shards of each round that a resumed run keeps. Later rounds are reopened, with their records.
            None: every round that the ledger closes stays closed.
        run: names the prompts and the plan, for example. A ledger of another run is refused.

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
        """Lines for the run's log."""
        self._ledger: LedgerFile | None = None
        if ledger_path is not None:
            self._ledger = LedgerFile(ledger_path, self._origin(run))
            try:
                self._restore(self._ledger, finished, ledger_path)
            except BaseException:
                self.close()
                raise

    @property
    def current(self) -> PublishedFit:
        """The newest fit, of all closed rounds."""
        return self._current

    @property
    def counts(self) -> Counts:
        """Counts of the deliveries so far."""
        conflicts = {(d.round, d.shard) for d in self._different if self._is_conflict(d)}
        regenerated = {(d.round, d.shard) for d in self._different} - conflicts
        return Counts(
            len(self._accepted), self._duplicates, tuple(sorted(conflicts)), tuple(sorted(regenerated)),
            self._torn_bytes, self._openings,
        )  # fmt: skip

    def accept(self, delivery: Delivery) -> Receipt:
        """Accept a shard's record, once.

        Raises:
            RecordError: the record does not fit the run; it is not merged.
            OutputError: the ledger cannot be written; the record is not merged.
        """
        (answer,) = self.accept_all([delivery])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def accept_all(self, deliveries: Sequence[Delivery]) -> list[Receipt | Exception]:
        """Accept records, each once, with one write to the ledger.

        Returns:
            for each delivery what `accept` returns or raises.

        Raises:
            OutputError: the ledger cannot be written; no record is merged.
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
        """Sum the records of these shards; returns the fit for this round's gradients.

        With `lagged` that is the fit of the rounds before, otherwise the new one. A retry returns the same fit.

        Args:
            round_number: the open round.
            shards: the shards whose records count; those given up are left out.
            since: first round whose shards may still be retried; their records are kept. None: this round.

        Raises:
            RecordError: another round is open, a record is missing, or the round was closed with other shards.
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
        """Returns a version of the global fit; None: the current one.

        Raises:
            MissingError: there is no such version.
        """
        betas = self._betas
        if version is None:
            return betas[-1]
        if not 0 <= version < len(betas):
            raise MissingError(bad_value("version", version, f"there are versions 0 to {len(betas) - 1}"))
        return betas[version]

    def variance(self) -> InSample:
        """Returns the baseline's mean squared residual by mode, nats^2 per token.

        Its rows are those of the fit, which flatters the fit, so it is labelled `in_sample`.
        """
        fit = self._current
        beta_EK = None if fit.ridge is None else fit.ridge.beta_EK
        squares = in_sample_mean_squares(fit.total, fit.position_average().mean_B, beta_EK)
        return InSample(fit.version, fit.total.tokens, fit.total.sequences, squares)

    def close(self) -> None:
        """Close the ledger."""
        if self._ledger is not None:
            self._ledger.close()

    def _report(self, fit: PublishedFit) -> Beta:
        ridge = fit.ridge
        return Beta(
            features=self._rule.fitted,
            values=None if ridge is None else tuple(ridge.beta_EK[:, TARGET].tolist()),
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
        """Returns the answer to a delivery, or its error."""
        try:
            return take(*args)
        except Exception as error:  # a bad record must not affect the others
            return error

    def _look_at(self, delivery: Delivery, fresh: dict[ShardKey, Accepted]) -> Receipt | None:
        """Checks a record and adds it to `fresh`; None: the shard has one already."""
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
        """Returns whether only a fault can have caused the other bytes."""
        return other.made_on.startswith("cpu") and other.made_on == self._accepted[other.round, other.shard][1]

    def _again(self, delivery: Delivery) -> Receipt:
        """Returns the answer to a delivery for a shard that has a record."""
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
        """Returns the ledger's header."""
        rule = asdict(self._rule) | {"features": list(self._rule.features)}
        if self._rule.targets == 1:
            del rule["targets"]  # as headers were before comparisons, so that those runs resume
        return {"run": run, "policy_id": self._policy_id, **rule, "record_version": SCHEMA_VERSION}

    def _restore(self, ledger: LedgerFile, finished: Sequence[Sequence[int]] | None, path: Path) -> None:
        """Repeats what the ledger says, and starts to write to it."""
        contents = ledger.read()
        closed = contents.closed if finished is None else kept_rounds(contents, finished, path)
        for accepted in contents.records.values():
            self._keep(accepted)
        for entry in closed:
            self._fold(entry)
        self._different = contents.different
        self._torn_bytes, self._openings = contents.torn_bytes, contents.openings + 1
        if ledger.torn_bytes:
            cut = f"{ledger.torn_bytes} bytes of an unfinished entry were cut off"
            self.notes.append(f"{path.name}: {cut}; it had not been acknowledged")
        ledger.begin(len(closed))
