"""Builds the loss and accumulates its gradient, micro-batch by micro-batch.

See docs/specification.md, "Score and pathwise terms" and "Baselines".

Shape suffix: T tokens of one response.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.baselines import ShardBaseline, mu_hat_by_mode
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.loss import response_loss
from ray_probe.core.estimator.modes import Mode
from ray_probe.core.estimator.targets import Estimator, advantages, baseline_target
from ray_probe.core.policy.token_scores import ScoredTokens
from ray_probe.errors import ConfigError
from ray_probe.model.feature_columns import Entropies
from ray_probe.model.micro_batches import ScoredMicroBatch, results_of, to_float64
from ray_probe.model.sequences import BatchedSequences, LogprobResults
from ray_probe.model.trainable import accumulate_wide
from ray_probe.run.messages import SumsX
from ray_probe.sequence_processor import SequenceProcessor

Baseline = PublishedFit | ShardBaseline | None


@dataclass(frozen=True)
class ResponseTerms:
    """The terms of one response's loss, all detached, float64.

    Attributes:
        baseline_T: `b_j = H_j + mu_hat_j`, nats, a tensor without gradient.
        advantage_T: `A_j` of the configured mode, nats.
        target_T: `r_j`, nats.
        advantage_by_mode: `A_j` of every mode that the baseline allows, nats.
    """

    baseline_T: Tensor
    advantage_T: Array
    target_T: Array
    advantage_by_mode: dict[Mode, Array]


class ProbeComponents:
    """Builds `loss_X` and accumulates its gradient, in float32 or wider.

    Args:
        processor: the policy.
        estimator: `rb_residual`, or `naive` as the noisy reference.
        pathwise: include the pathwise term; False to study the score term alone.
    """

    def __init__(
        self, processor: SequenceProcessor, estimator: Estimator = "rb_residual", pathwise: bool = True
    ) -> None:
        accumulate_wide(processor.model.parameters())
        self.processor = processor
        self.estimator: Estimator = estimator
        self.pathwise = pathwise and estimator == "rb_residual"

    def accumulate_sum_X(
        self,
        sequences: BatchedSequences,
        baseline: Baseline,
        cached: Sequence[ScoredTokens | None] = (),
        entropies: Entropies | None = None,
    ) -> SumsX:
        """Add the gradient of `loss_X`, summed over all responses, to `.grad`.

        It is the estimate of +grad J (of the sum, not the mean), an ascent direction of entropy.

        Args:
            sequences: the responses; all count, also those of EOS alone and those cut at the cap.
            baseline: a published fit, a fit without the shard's own record (`PublishedFit.for_shard`), or None for
                mode `none`. `leave_one_out` needs a fit without the shard's own record.
            cached: from an earlier scoring of the same responses (see `SequenceProcessor.score_parts`).
            entropies: H of all responses as the record was made from, which the columns of siblings need; None: score
                the responses once more for them.

        Raises:
            ConfigError: a whole `leave_one_out` fit was passed.
        """
        with_features = _shard_baseline(baseline) is not None
        parts = self.processor.score_parts(
            sequences, with_grad=True, with_features=with_features, accumulate_into_grad=True, cached=cached
        )
        return self.accumulate_parts(sequences, parts, baseline, entropies)

    def accumulate_parts(
        self,
        sequences: BatchedSequences,
        parts: Iterable[ScoredMicroBatch],
        baseline: Baseline,
        entropies: Entropies | None = None,
    ) -> SumsX:
        """Do as `accumulate_sum_X`, from micro-batches scored with graph.

        The graph of each micro-batch is released before the next one is taken.
        """
        shard_baseline = _shard_baseline(baseline)
        # A micro-batch may hold some siblings and not others, so the columns of siblings are made for the whole shard.
        columns = [] if shard_baseline is None else self._entropy_columns(sequences, entropies)
        sums = SumsX.empty(sequences.shape[0], self.processor.generation.max_new_tokens)
        group = sequences.shape[1]
        for part in parts:
            results = results_of([part], 1, with_grad=True, compute_rb=True)
            if shard_baseline is not None:
                results = self.processor.columns.complete(results, [columns[place] for place in part.places])
            terms = [self.response_terms(results, row, 0, shard_baseline) for row in range(len(part.places))]
            self._loss(results, iter(terms)).backward()  # type: ignore[no-untyped-call]
            for row, (place, term) in enumerate(zip(part.places, terms, strict=True)):
                response = sequences.tokens(*divmod(place, group))[1].tolist()
                self._add_response(sums, place // group, response, results, row, term)
        return sums

    def _build_X_loss_rb_residual(self, results: LogprobResults, baseline: Baseline) -> Tensor:
        """Return the scalar `loss_X`, summed over the responses of `results`, with graph."""
        shard_baseline = _shard_baseline(baseline)
        groups, group = results.shape
        terms = (self.response_terms(results, b, g, shard_baseline) for b in range(groups) for g in range(group))
        return self._loss(results, terms)

    def response_terms(self, results: LogprobResults, b: int, g: int, baseline: ShardBaseline | None) -> ResponseTerms:
        """Return the baseline, target and advantages of one response."""
        assert results.rb_entropies is not None, "score with compute_rb=True"
        entropy_T, surprisal_T = results.rb_entropies[b][g], results.entropies[b][g]
        position_T = np.arange(len(entropy_T))
        features = results.baseline_feats_torch
        if features is not None:
            assert not features[b][g].requires_grad, "features are detached"
        phi_TD = None if features is None else to_float64(features[b][g])
        if baseline is None:
            mu_hats: dict[Mode, Array] = {"none": np.zeros(len(entropy_T))}
            mu_hat_T = mu_hats["none"]
        else:
            mu_hat_T = baseline.mu_hat(baseline.mode, position_T, phi_TD)
            mu_hats = dict(mu_hat_by_mode(baseline, position_T, phi_TD))
        by_mode = {mode: advantages(entropy_T, surprisal_T, mu, self.estimator) for mode, mu in mu_hats.items()}
        return ResponseTerms(
            torch.from_numpy(entropy_T + mu_hat_T),
            advantages(entropy_T, surprisal_T, mu_hat_T, self.estimator),
            baseline_target(entropy_T, surprisal_T, self.estimator),
            by_mode,
        )

    def _entropy_columns(self, sequences: BatchedSequences, entropies: Entropies | None) -> list[Array]:
        """Return the columns made from entropies, of each response [T, D] by place."""
        if not self.processor.columns.of_entropies:
            return [np.zeros((length, 0)) for row in sequences.gen_lens for length in row]
        return self.processor.columns.from_entropies(entropies or self.processor.entropies(sequences))

    def _loss(self, results: LogprobResults, terms: Iterator[ResponseTerms]) -> Tensor:
        pathwise = results.rb_entropies_torch
        groups, group = results.shape
        losses = [
            response_loss(
                results.logprobs[b][g],
                pathwise[b][g] if self.pathwise and pathwise is not None else None,
                next(terms).advantage_T,
            )
            for b in range(groups)
            for g in range(group)
        ]
        return torch.stack(losses).sum()

    def _add_response(
        self, sums: SumsX, prompt: int, response: list[int], results: LogprobResults, b: int, term: ResponseTerms
    ) -> None:
        assert results.rb_entropies is not None
        entropy_T = results.rb_entropies[b][0]
        sums.add_response(
            prompt, entropy_T.sum(), self.processor.ended(response), term.target_T, term.baseline_T.numpy() - entropy_T,
            term.advantage_by_mode, self.processor.generation.max_new_tokens,
        )  # fmt: skip


def _shard_baseline(baseline: Baseline) -> ShardBaseline | None:
    if not isinstance(baseline, PublishedFit):
        return baseline
    if baseline.rule.fit == "leave_one_out":
        raise ConfigError(
            "estimator.baseline.fit: got a whole 'leave_one_out' fit; pass fit.for_shard(record) of these sequences"
        )
    return baseline.for_shard(None)
