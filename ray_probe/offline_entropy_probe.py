"""The run: rounds through a backend, committed in groups, and the result."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ray_probe.checkpoints.tokenizer.eos import Eos
from ray_probe.config.loading import without_secrets
from ray_probe.config.schema import ProbeConfig
from ray_probe.core.estimator.parity import ParityStats, violation
from ray_probe.core.estimator.records import position_bins
from ray_probe.errors import ParityError
from ray_probe.run.backend import Backend, RoundOutcome, StopCheck
from ray_probe.run.directory import RunDirectory
from ray_probe.run.estimates import build_result, round_summary
from ray_probe.run.gradient_products import GradientProducts, window_of
from ray_probe.run.preparation.plan import Plan
from ray_probe.run.progress import Listener, Summed
from ray_probe.run.progress_tracker import ProgressTracker
from ray_probe.run.result import Beta, Result, StoppedBy
from ray_probe.run.rounds_file import FinishedRound
from ray_probe.run.stopping import Look, StopRule
from ray_probe.run.totals import Totals, merged, summed


class _Committed(NamedTuple):
    """The committed rounds: their lines, totals, products of gradients, global fit."""

    lines: tuple[FinishedRound, ...]
    totals: Totals | None
    products: GradientProducts
    beta: Beta


class _OpenRound(NamedTuple):
    """A round that is computed and not committed."""

    totals: Totals
    wall_s: float


class OfflineEntropyProbe:
    """Measures the gradient of response entropy at one checkpoint.

    Args:
        config: the run's configuration.
        plan: its shards.
        backend: computes them; it continues from what `directory` holds.
        directory: of the run.
        listener: called with progress.
        stop: called at least once a second; true ends the run.
        eos: the ids that end a response, for the result; None: the result leaves them out.
        moved_share: of a comparison, for the result.
    """

    def __init__(
        self,
        config: ProbeConfig,
        plan: Plan,
        backend: Backend,
        directory: RunDirectory,
        listener: Listener = lambda progress: None,
        stop: StopCheck = lambda: False,
        eos: Eos | None = None,
        moved_share: float | None = None,
    ) -> None:
        self._config = config
        self._plan = plan
        self._backend = backend
        self._directory = directory
        self._stop = stop
        self._eos = eos
        self._moved_share = moved_share
        summed: Summed = "gradients" if config.compare.against is None else "changes"
        mode = config.estimator.baseline.mode
        self._tracker = ProgressTracker(listener, plan.round_count, mode, backend.actors, summed)
        lines = tuple(directory.finished_rounds())
        totals = merged(directory.restore(len(lines))) if lines else None
        self._committed = _Committed(lines, totals, GradientProducts.of(lines), backend.beta())
        self._kept: tuple[_Committed, int, Result] | None = None  # the last result, with what it is made of
        self._open: list[_OpenRound] = []
        self._rule = StopRule(config.batch, plan)

    @property
    def finished_rounds(self) -> int:
        """Whole rounds that are committed."""
        totals = self._committed.totals
        return 0 if totals is None else totals.rounds

    def run(self) -> Result:
        """Compute the unfinished rounds; returns the result, which is on disk then.

        Raises:
            ParityError: the scored policy is not the policy that sampled; the open rounds are committed first.
            Stopped: `stop` was true; committed rounds are kept, open ones are lost.
        """
        self._check_parity()
        while self._goes_on():
            self._run_round(self.finished_rounds + len(self._open))
            looked_at = self._rule.is_look(self.finished_rounds + len(self._open))
            if len(self._open) == self._config.output.commit_rounds or looked_at or not self._goes_on():
                self._commit()
            self._check_parity()
            if looked_at:
                self._tell(self._look())
        return self.finish()

    def result(self) -> Result | None:
        """Return the result of the committed rounds, None before any.

        Any thread may call it during the run.
        """
        committed = self._committed  # replaced as a whole, never changed
        if committed.totals is None:
            return None
        return replace(self._built(committed), stopped_by=self._stopped_by([committed.totals]))

    def _built(self, committed: _Committed) -> Result:
        assert committed.totals is not None, "a round is committed"
        actors, kept = self._backend.actors, self._kept
        # Every status shows it, and it takes milliseconds of the thread that the work needs too.
        if kept is not None and kept[0] is committed and kept[1] == actors:
            return kept[2]
        found = committed.beta, committed.totals, committed.products, actors, self._eos, self._moved_share
        result = build_result(without_secrets(self._config), *found)
        self._kept = committed, actors, result
        return result

    def finish(self) -> Result:
        """Write result.json, and gradient.safetensors when configured."""
        result, totals = self.result(), self._committed.totals
        assert result is not None and totals is not None, "a round is finished"
        self._directory.write_result(result)
        if self._config.output.save_gradient:
            self._backend.save_gradient(self._directory.gradient, totals.rounds, totals.sequences)
        return result

    def _goes_on(self) -> bool:
        """Return whether nothing ends the run after the rounds so far."""
        return self._stopped_by(self._worked()) is None

    def _stopped_by(self, worked: Sequence[Totals]) -> StoppedBy | None:
        """Return what ends the run after these rounds; an error only after a commit."""
        rounds = sum(part.rounds for part in worked)
        ended = self._rule.ended_by(rounds, sum(part.seconds["seconds"] for part in worked))
        reached = self._look().verdict if rounds == self.finished_rounds and self._rule.is_look(rounds) else None
        return reached or ended

    def _look(self) -> Look:
        committed = self._committed
        return self._rule.look(self._built(committed), committed.lines)

    def _tell(self, look: Look) -> None:
        """Report a look at the error, and why the run ends where it does."""
        found = "not known yet" if look.error is None else f"{look.error:.3g}"
        ends = {"target_error": ": reached", "target_out_of_reach": ": more passes over these prompts cannot reach it"}
        said = "" if look.verdict is None else ends[look.verdict]
        rounds = self.finished_rounds
        self._tracker.note(f"error of the {look.of} after {rounds} rounds: {found}, target {look.target:g}{said}")

    def _worked(self) -> list[Totals]:
        """Return the totals of all rounds so far, committed or not."""
        committed = self._committed.totals
        return [*([] if committed is None else [committed]), *(part.totals for part in self._open)]

    def _run_round(self, number: int) -> None:
        shards = self._plan.round(number)
        self._tracker.start_round(number, len(shards))
        started = time.monotonic()
        outcome = self._backend.run_round(shards, self._tracker, self._stop)
        wall_s = time.monotonic() - started
        self._open.append(_OpenRound(self._totals(outcome, wall_s), wall_s))
        self._warn(outcome)

    def _commit(self) -> None:
        """Write the gradient of the open rounds, then make them count."""
        started, done = time.monotonic(), self._committed.lines
        window = (done[-1].gradient_window or 0) if done else 0
        window = window_of(self._plan, window, len(done), len(done) + len(self._open))
        commit = self._backend.commit(window)
        walls_s = [part.wall_s for part in self._open]
        walls_s[-1] += time.monotonic() - started
        parts = [self._totals(outcome, wall_s) for outcome, wall_s in zip(commit.outcomes, walls_s, strict=True)]
        lines = [
            round_summary(outcome.round, totals, outcome.beta, outcome.records, outcome.by_actor)
            for outcome, totals in zip(commit.outcomes, parts, strict=True)
        ]
        lines[-1] = replace(
            lines[-1], gradient_norm_sq=commit.norm_sq, gradient_cross=commit.cross, gradient_window=window,
            actors=self._backend.actors,
        )  # fmt: skip
        lines = self._directory.commit(parts, lines, commit.sha256)
        before = [] if self._committed.totals is None else [self._committed.totals]
        done, beta = (*done, *lines), commit.outcomes[-1].beta
        # at once, because Ctrl-C can come anywhere
        self._committed = _Committed(done, merged([*before, *parts]), GradientProducts.of(done), beta)
        self._open = []
        self._backend.settle()

    def _totals(self, outcome: RoundOutcome, wall_s: float) -> Totals:
        outcome.refuse_without_sums()
        totals = summed(outcome.sums, outcome.collected, position_bins(self._config.generation.max_new_tokens))
        totals.given_up = outcome.given_up
        totals.conflicts = outcome.conflicts
        totals.counts |= {"shards_retried": outcome.retried, "regenerated": outcome.regenerated}
        seconds = totals.seconds
        busy_s = sum(seconds[name] for name in ("generate_s", "teacher_force_s", "backward_s"))
        seconds["seconds"] = wall_s
        seconds["fit_s"] = outcome.fit_s
        seconds["wait_s"] = max(0.0, wall_s * self._backend.actors - busy_s)
        return totals

    def _warn(self, outcome: RoundOutcome) -> None:
        # Neither biases the gradient, both leave noise in it.
        mode, unfitted = self._config.estimator.baseline.mode, sum(not report.fitted for report in outcome.sums)
        fallback = outcome.beta.fallback
        if mode != "none" and unfitted:
            self._tracker.note(
                f"round {outcome.round + 1}: {unfitted} shards had no record to fit on; mu_hat was 0 for them"
            )
        if mode == "regression" and fallback is not None:
            self._tracker.note(f"round {outcome.round + 1}: beta could not be fitted; {fallback} replaces it")

    def _parities(self) -> list[ParityStats]:
        """Return the parity of each policy; a comparison has two and their midpoint."""
        worked = self._worked()
        if self._config.compare.against is None:
            return [sum((part.parity for part in worked), start=ParityStats.zero())]
        changes = [part.change for part in worked if part.change is not None]
        by_policy = zip(*((*one.parity, one.parts.parity) for one in changes), strict=True)
        return [sum(parities, start=ParityStats.zero()) for parities in by_policy]

    def _check_parity(self) -> None:
        dtype, tolerance = self._config.model.dtype, self._config.generation.parity_tolerance
        for parity in self._parities():
            problem = violation(parity, dtype, tolerance)
            if problem is None:
                continue
            if self._open:
                self._commit()
            self.finish()
            raise ParityError(
                f"{problem}. The scored policy is not the one that sampled: look at model.dtype, at the padding, "
                f"position ids and cache of this architecture (log.txt has the findings of its trial), and for a "
                f"foreign sampler; {self.finished_rounds} rounds are kept in {self._directory.path}"
            )
