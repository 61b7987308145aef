"""The run: rounds of shards through a backend, committed one by one, and the result (spec sections 7 and 9).

A backend turns the shards of a round into reports and one summed gradient; `InProcess` does it in this process,
`ray_probe.cluster.backend.RayBackend` on a Ray cluster. Both use the same plain `Rollout` and `Fitter`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ray_probe.config import ProbeConfig, to_dict
from ray_probe.core.parity import violation
from ray_probe.core.records import position_bins
from ray_probe.errors import ParityError, ShardError
from ray_probe.estimates import Totals, build_result, merged, round_summary, summed
from ray_probe.fitter import Fitter
from ray_probe.gradients import Layout
from ray_probe.plan import Plan, Shard
from ray_probe.progress import Listener
from ray_probe.rollout import Collected, Rollout, ShardSums
from ray_probe.run_directory import RunDirectory
from ray_probe.tracker import Tracker

Vector = npt.NDArray[np.float64]


@dataclass
class RoundOutcome:
    """What a backend makes of a round.

    Attributes:
        gradient: float64, summed over all responses of the shards in `sums`.
        collected: first halves, one a shard.
        sums: second halves; only these shards count.
        records: shards whose record the fit holds: those in `sums`, and any given up after its record was in.
        beta: the fitter's global fit after the round.
        given_up: ids of shards that failed too often.
        conflicts: ids of shards that came twice with different bytes on a CPU.
        regenerated: the same on CUDA, where it is no error.
        retried: shards that were done again.
        by_actor: actor -> the shards whose gradient is from it.
        fit_s: seconds from the last record to the fit.
    """

    gradient: Vector
    collected: list[Collected] = field(default_factory=list)
    sums: list[ShardSums] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    beta: dict[str, Any] = field(default_factory=dict)
    given_up: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    regenerated: int = 0
    retried: int = 0
    by_actor: dict[int, tuple[int, ...]] = field(default_factory=dict)
    fit_s: float = 0.0


class Backend(Protocol):
    """Where shards are worked on."""

    @property
    def actors(self) -> int:
        """Rollout actors asked for."""
        ...

    @property
    def layout(self) -> Layout:
        """Names and shapes of the trainable parameters."""
        ...

    def run_round(self, shards: Sequence[Shard], tracker: Tracker) -> RoundOutcome:
        """Work one round off."""
        ...

    def beta(self) -> dict[str, Any]:
        """The fitter's current global fit."""
        ...


class InProcess:
    """Everything in this process, without Ray: shards dealt in turn to the rollouts."""

    def __init__(self, rollouts: Sequence[Rollout], fitter: Fitter) -> None:
        self._rollouts = rollouts
        self._fitter = fitter

    @property
    def actors(self) -> int:
        """Number of rollouts."""
        return len(self._rollouts)

    @property
    def layout(self) -> Layout:
        """Names and shapes of the trainable parameters."""
        return self._rollouts[0].layout

    def beta(self) -> dict[str, Any]:
        """The fitter's current global fit."""
        return self._fitter.beta()

    def run_round(self, shards: Sequence[Shard], tracker: Tracker) -> RoundOutcome:
        """Work one round off, shard after shard."""
        outcome = RoundOutcome(np.zeros(self.layout.size))
        dealt = [(shard, self._rollouts[shard.index % self.actors]) for shard in shards]
        for shard, rollout in dealt:
            report = rollout.collect(shard)
            rollout.acknowledge(shard, self._fitter.accept(report.delivery))
            outcome.collected.append(report)
            tracker.collected(report.tokens)
        started = time.monotonic()
        outcome.records = [shard.index for shard in shards]
        fit = self._fitter.close_round(shards[0].round, outcome.records)
        outcome.fit_s = time.monotonic() - started
        tracker.fitted(fit.version)
        for shard, rollout in dealt:
            sums = rollout.accumulate(shard, fit)
            outcome.sums.append(sums)
            tracker.accumulated(sums)
        for rollout in self._rollouts:
            outcome.gradient += rollout.round_gradient(shards[0].round).vector
        outcome.beta = self._fitter.beta()
        outcome.by_actor = {
            number: tuple(shard.index for shard, rollout in dealt if rollout is self._rollouts[number])
            for number in range(self.actors)
        }
        return outcome


class _Committed(NamedTuple):
    """Everything of the whole rounds that are on disk: their totals, the gradient summed over them, the global fit."""

    parts: tuple[Totals, ...]
    gradient: Vector
    beta: dict[str, Any]


class OfflineEntropyProbe:
    """Measures the gradient of response entropy at one checkpoint.

    Args:
        config: the run's configuration.
        plan: its shards.
        backend: where they are worked on.
        directory: where the results go.
        listener: told of progress.
    """

    def __init__(
        self,
        config: ProbeConfig,
        plan: Plan,
        backend: Backend,
        directory: RunDirectory,
        listener: Listener = lambda progress: None,
    ) -> None:
        self._config = config
        self._plan = plan
        self._backend = backend
        self._directory = directory
        self._tracker = Tracker(listener, plan.round_count, config.estimator.baseline.mode, backend.actors)
        finished = len(directory.finished_rounds())
        parts, gradient = directory.restore(finished)
        start = np.zeros(backend.layout.size) if gradient is None else gradient
        self._committed = _Committed(tuple(parts), start, backend.beta())

    @property
    def finished_rounds(self) -> int:
        """Whole rounds that are committed."""
        return len(self._committed.parts)

    def run(self) -> dict[str, Any]:
        """Work off the rounds that are not finished yet and return the result, which is on disk then.

        Raises:
            ParityError: the scored policy is not the policy that sampled; the round is committed, then the run stops.
        """
        if self.finished_rounds:
            self._check_parity()
        while self._goes_on():
            self._run_round(self.finished_rounds)
            self._check_parity()
        return self.finish()

    def finish(self) -> dict[str, Any]:
        """Write result.json (and gradient.safetensors when configured) from the rounds that are finished."""
        parts, gradient, beta = self._committed
        totals = merged(parts)
        norm_sq = float(gradient @ gradient)
        result = build_result(to_dict(self._config), beta, totals, norm_sq, self._backend.actors)
        self._directory.write_json("result.json", result)
        if self._config.output.save_gradient:
            self._directory.save_gradient(self._backend.layout.unflatten(gradient / totals.sequences))
        return result

    def _goes_on(self) -> bool:
        """Whether plan and budget (whole rounds) allow another round; the first one always starts."""
        parts, rounds, limit_s = self._committed.parts, self._plan.round_count, self._config.batch.max_seconds
        in_plan = rounds is None or len(parts) < rounds
        in_time = limit_s is None or not parts or sum(part.seconds["seconds"] for part in parts) < limit_s
        return in_plan and in_time

    def _run_round(self, number: int) -> None:
        shards = self._plan.round(number)
        self._tracker.start_round(number, len(shards))
        started = time.monotonic()
        outcome = self._backend.run_round(shards, self._tracker)
        if not outcome.sums:
            raise ShardError(f"round {number}: every shard was given up; see log.txt for the causes")
        bins = position_bins(self._config.generation.max_new_tokens)
        totals = summed(outcome.sums, outcome.collected, bins)
        totals.given_up = outcome.given_up
        totals.conflicts = outcome.conflicts
        totals.counts |= {"shards_retried": outcome.retried, "regenerated": outcome.regenerated}
        self._add_times(totals, outcome, time.monotonic() - started)
        parts, before, _ = self._committed
        gradient = before + outcome.gradient
        summary = round_summary(number, totals, outcome.beta, outcome.records, outcome.by_actor)
        self._directory.commit_round(number, totals, gradient, summary)
        self._committed = _Committed((*parts, totals), gradient, outcome.beta)  # at once: Ctrl-C can come anywhere
        self._warn(number, totals)

    def _warn(self, number: int, totals: Totals) -> None:
        """Say where a shard had no fit, or beta fell back: neither biases the gradient, both leave noise in it."""
        mode, unfitted = self._config.estimator.baseline.mode, totals.counts["unfitted_shards"]
        fallback = self._committed.beta["fallback"]
        if mode != "none" and unfitted:
            self._tracker.note(f"round {number}: {unfitted} shards had no record to fit on; mu_hat was 0 for them")
        if mode == "regression" and fallback is not None:
            self._tracker.note(f"round {number}: beta could not be fitted; {fallback} stands in for it")

    def _add_times(self, totals: Totals, outcome: RoundOutcome, wall_s: float) -> None:
        seconds = totals.seconds
        busy_s = sum(seconds[name] for name in ("generate_s", "teacher_force_s", "backward_s"))
        seconds["seconds"] = wall_s
        seconds["fit_s"] = outcome.fit_s
        seconds["wait_s"] = max(0.0, wall_s * self._backend.actors - busy_s)

    def _check_parity(self) -> None:
        parity = merged(self._committed.parts).parity
        problem = violation(parity, self._config.model.dtype, self._config.generation.parity_tolerance)
        if problem is not None:
            self.finish()
            raise ParityError(
                f"{problem}. The scored policy is not the one that sampled: look at model.dtype, at the padding and "
                f"position ids of this architecture, and for a sampler that is not ours; "
                f"{self.finished_rounds} rounds are kept in {self._directory.path}"
            )
