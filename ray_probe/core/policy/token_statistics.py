"""Scores of tokens from a table of logits, forward and backward.

Shape suffixes: R rows of the logits, T rows that are scored, V vocabulary, D features, N some rows, W columns of a
tile, M kept tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_probe.core.policy.differentiable_scores import score_tokens
from ray_probe.core.policy.logits import SamplingRule, widened
from ray_probe.core.policy.nucleus.kept import NARROW_SHARE, NucleusCollector
from ray_probe.core.policy.sampling import row_chunks, sample_rows
from ray_probe.core.policy.summarize import SummaryScratch
from ray_probe.core.policy.token_scores import Rows, ScoringSpec, scores_from

NARROW = 512  # a narrow nucleus keeps about 512 tokens for backward, and at most 1/16 of the vocabulary


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of T scored tokens, float32 or wider.

    Attributes:
        log_q_T: log q of the tokens, nats, with graph when the logits have one.
        entropy_T: entropy H of q at each prefix, nats, with graph when the logits have one. It is taken in S, so it
            does not depend on Y.
        outside_T: bool, the token lay outside the recomputed nucleus; its log q is taken in S + {Y}.
        features_TD: detached features; None: not requested.
    """

    log_q_T: Tensor
    entropy_T: Tensor
    outside_T: Tensor
    features_TD: Tensor | None

    @classmethod
    def of(cls, outputs: Sequence[Tensor]) -> "TokenStatistics":
        """Return the statistics from the outputs of `score_tokens`."""
        log_q_T, entropy_T, outside_T, features_TD = outputs
        return cls(log_q_T, entropy_T, outside_T, features_TD if features_TD.shape[-1] else None)


class LogitTable:
    """A table of raw logits as a `LogitSource`.

    Args:
        logits_RV: raw logits.
        rows_T: int64, the row of each scored token; a row may occur more than once.
    """

    def __init__(self, logits_RV: Tensor, rows_T: Tensor) -> None:
        self.logits_RV, self.rows_T = logits_RV, rows_T
        self.shape = len(rows_T), logits_RV.shape[-1]
        self.dtype, self.multiple = logits_RV.dtype, 1

    def blocks(self, picked_N: Tensor | None, whole: bool) -> Iterator[tuple[slice, Rows]]:
        """Yield chunks of the scored rows and their rows of the table."""
        rows_N = self.rows_T if picked_N is None else self.rows_T[picked_N]
        numbers = rows_N.tolist()
        for chunk in row_chunks(len(numbers), self.shape[1], self.logits_RV.device):
            run = slice(numbers[chunk.start], numbers[chunk.start] + chunk.stop - chunk.start)
            # Consecutive rows become a slice, which costs no copy.
            yield chunk, run if numbers[chunk] == list(range(run.start, run.stop)) else rows_N[chunk]

    def logits(self, rows: Rows, columns: slice) -> Tensor:
        """Return some rows and columns of the table [N, W]."""
        return self.logits_RV[:, columns][rows]

    def collector(self) -> NucleusCollector:
        """Return a collector of the tokens of narrow nuclei."""
        # The table still has the logits of the wide ones.
        vocabulary, device = self.shape[1], self.logits_RV.device
        return NucleusCollector(vocabulary, device, max(NARROW_SHARE, vocabulary // NARROW), has_bits=False)

    def sink(self, needed: Sequence[bool]) -> "_TableGradient":
        """Return the sink of the gradient by the table."""
        return _TableGradient(self)


class _TableGradient:
    """The gradient by a table of logits, in its dtype."""

    def __init__(self, table: LogitTable) -> None:
        self._rows_T = table.rows_T
        self._grad_RV = torch.zeros_like(table.logits_RV, memory_format=torch.contiguous_format)

    def add_kept(self, row_M: Tensor, column_M: Tensor, grad_M: Tensor, logit_M: Tensor) -> None:
        """Add the gradient of single tokens."""
        self._grad_RV.index_put_((self._rows_T[row_M], column_M), grad_M.to(self._grad_RV.dtype), accumulate=True)

    def add_tile(self, rows: Rows, columns: slice, grad_NW: Tensor, logits_NW: Tensor) -> None:
        """Add the gradient of some rows and columns."""
        grad_RW, grad_NW = self._grad_RV[:, columns], grad_NW.to(self._grad_RV.dtype)
        if isinstance(rows, slice):
            grad_RW[rows].add_(grad_NW)
        else:
            grad_RW.index_add_(0, rows, grad_NW)

    def results(self) -> tuple[Tensor | None, ...]:
        """Return the gradient by the table, and None for its row numbers."""
        return self._grad_RV, None


def token_statistics(
    logits_RV: Tensor,
    rows_T: Tensor,
    tokens_T: Tensor,
    position_T: Tensor,
    rule: SamplingRule,
    cap: int,
    features: Sequence[str] = (),
) -> TokenStatistics:
    """Score tokens under the sampling policy.

    Args:
        logits_RV: raw logits [R, V], with or without graph.
        rows_T: int64 [T], the row of `logits_RV` that predicts each token.
        tokens_T: int64 [T], the sampled tokens Y.
        position_T: int64 [T], position j of each token in its response, from 0.
        rule: temperature and top_p.
        cap: max_new_tokens, the denominator of `pos_frac`.
        features: names from `ray_probe.core.policy.features.REGISTRY`.

    Returns:
        log q(Y), H, the marks of tokens outside, and the features.
    """
    spec = ScoringSpec(rule, tuple(features), cap)
    return TokenStatistics.of(score_tokens(LogitTable, (logits_RV, rows_T), tokens_T, position_T, spec))


@torch.no_grad()
def sample_statistics(
    logits_TV: Tensor,
    uniform_T: Tensor,
    position_T: Tensor,
    rule: SamplingRule,
    cap: int,
    features: Sequence[str] = (),
    scratch: SummaryScratch | None = None,
) -> tuple[Tensor, TokenStatistics]:
    """Sample a token for each row and score it with the same nucleus.

    Args:
        logits_TV: raw logits [T, V].
        uniform_T: float64 [T] in [0, 1), a random number for each row.
        position_T: int64 [T], position j of each token in its response, from 0.
        rule: temperature and top_p.
        cap: max_new_tokens, the denominator of `pos_frac`.
        features: names from `ray_probe.core.policy.features.REGISTRY`.
        scratch: memory for tables, to reuse in later calls; None: new memory.

    Returns:
        Tokens [T] int64, as `sample_rows` draws them, and statistics equal to the bit to those of `token_statistics`.
    """
    tokens_T, _, summary = sample_rows(logits_TV, rule, uniform_T, scratch)
    logit_T = widened(logits_TV.gather(-1, tokens_T.unsqueeze(-1)).squeeze(-1))
    scores = scores_from(summary, logit_T, position_T, ScoringSpec(rule, tuple(features), cap))
    return tokens_T, TokenStatistics.of(scores.outputs)
