"""Token statistics from hidden states, without a table of all logits.

The head's logits exist for a few rows, or a few columns, at a time.

Shape suffixes: T tokens, V vocabulary, D hidden size.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ray_probe.core.policy.differentiable_scores import score_tokens
from ray_probe.core.policy.head_products import Products
from ray_probe.core.policy.lm_head import Head
from ray_probe.core.policy.logits import SamplingRule
from ray_probe.core.policy.token_scores import ScoredTokens, ScoringSpec, search
from ray_probe.core.policy.token_statistics import TokenStatistics


def fused_token_statistics(
    hidden_TD: Tensor,
    head: Head,
    tokens_T: Tensor,
    position_T: Tensor,
    rule: SamplingRule,
    cap: int,
    features: Sequence[str] = (),
    cached: ScoredTokens | None = None,
) -> TokenStatistics:
    """Score tokens under the sampling policy, from the head's hidden states.

    Args:
        hidden_TD: hidden states [T, D] of the positions that predict the tokens, with or without graph, in the
            weight's dtype.
        head: weight, bias, scaling and adapter.
        tokens_T: int64 [T], the sampled tokens Y.
        position_T: int64 [T], position j of each token in its response, from 0.
        rule: temperature and top_p.
        cap: max_new_tokens, the denominator of `pos_frac`.
        features: names from `ray_probe.core.policy.features.REGISTRY`.
        cached: the result of `score_and_keep` for the same arguments, which saves the forward half; None: compute.

    Returns:
        The statistics that `token_statistics` gives for the head's logits.
    """
    tensors, spec = Products.of(hidden_TD, head).tensors, ScoringSpec(rule, tuple(features), cap)
    return TokenStatistics.of(score_tokens(partial(Products, head), tensors, tokens_T, position_T, spec, cached))


@torch.no_grad()
def score_and_keep(
    hidden_TD: Tensor,
    head: Head,
    tokens_T: Tensor,
    position_T: Tensor,
    rule: SamplingRule,
    cap: int,
    features: Sequence[str] = (),
) -> tuple[TokenStatistics, ScoredTokens]:
    """Score tokens without graph, and return the result to cache as well.

    The arguments are those of `fused_token_statistics`. The pass with graph must have the same hidden states.

    Returns:
        The statistics, and the result to cache: a few numbers a token, 12 bytes a token of a narrow nucleus, a bit a
        token of the vocabulary for a wide one.
    """
    spec = ScoringSpec(rule, tuple(features), cap)
    scored = search(Products.of(hidden_TD, head), tokens_T, position_T, spec, collect=True)
    return TokenStatistics.of(scored.outputs), scored
