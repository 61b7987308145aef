"""log q(Y), entropy and features of a block of tokens, forward and backward, in row chunks.

Beyond the logits themselves (and, backward, their gradient) no [T, V] table is held: each chunk of rows is turned into
its statistics and dropped, and backward computes q again from the saved nucleus threshold.

Closed form with the nucleus S held fixed (spec section 2), a = logits / temperature:
`d log q(Y) / d a_i = 1[i = Y] - q_i` and `d H / d a_i = -q_i (log q_i + H)` for i in S, 0 outside.

Shape suffixes: R rows of the logits, T rows that are scored, V vocabulary, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_probe.core.features import PrefixView, compute_features
from ray_probe.core.policy import Policy, SamplingRule, entropy, row_chunks, sampling_policy


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of T scored tokens.

    Attributes:
        log_q_T: log q of the tokens, nats, with graph when the logits have one.
        entropy_T: entropy H of q at each prefix, nats, with graph likewise. Of S alone, so it knows nothing of Y.
        outside_T: bool, the token lay outside the recomputed nucleus; its log q is taken in S + {Y}.
        features_TD: detached features, or None when none were asked for.
    """

    log_q_T: Tensor
    entropy_T: Tensor
    outside_T: Tensor
    features_TD: Tensor | None


def _token_log_norm(policy: Policy, token_scaled_T: Tensor, outside_T: Tensor) -> Tensor:
    """Log normaliser of S + {Y} [T], nats: that of S wherever Y is in S already."""
    return torch.where(outside_T, torch.logaddexp(policy.log_norm_T, token_scaled_T), policy.log_norm_T)


class _Statistics(torch.autograd.Function):
    """(logits, rows, tokens) -> (log q(Y), H, outside, features, threshold); gradients through the first two."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_RV: Tensor,
        rows_T: Tensor,
        tokens_T: Tensor,
        position_T: Tensor,
        rule: SamplingRule,
        features: tuple[str, ...],
        cap: int,
    ) -> tuple[Tensor, ...]:
        parts = []
        for chunk in row_chunks(rows_T.shape[0], logits_RV.shape[-1]):
            policy = sampling_policy(logits_RV.index_select(0, rows_T[chunk]), rule)
            token_T1 = tokens_T[chunk].unsqueeze(-1)
            scaled_T = policy.scaled_TV.gather(-1, token_T1).squeeze(-1)
            outside_T = ~policy.keep_TV.gather(-1, token_T1).squeeze(-1)
            log_q_T = scaled_T - _token_log_norm(policy, scaled_T, outside_T)
            entropy_T = entropy(policy)
            view = PrefixView(policy, entropy_T, position_T[chunk], cap)
            features_TD = compute_features(features, view) if features else entropy_T.new_empty((len(entropy_T), 0))
            parts.append((log_q_T, entropy_T, outside_T, features_TD, policy.threshold_T))
        outputs = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        ctx.rule = rule
        ctx.save_for_backward(logits_RV, rows_T, tokens_T, outputs[1], outputs[2], outputs[4])
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("token statistics have no second derivative: call backward without create_graph")
        logits_RV, rows_T, tokens_T, entropy_T, outside_T, threshold_T = ctx.saved_tensors
        grad_RV = torch.zeros_like(logits_RV)
        for chunk in row_chunks(rows_T.shape[0], logits_RV.shape[-1]):
            policy = sampling_policy(logits_RV.index_select(0, rows_T[chunk]), ctx.rule, threshold_T[chunk])
            token_T1 = tokens_T[chunk].unsqueeze(-1)
            grad_log_q_T1, grad_entropy_T1 = (g[chunk].unsqueeze(-1) for g in gradients[:2])
            log_q_TV = (policy.scaled_TV - policy.log_norm_T.unsqueeze(-1)).masked_fill(~policy.keep_TV, 0.0)
            grad_TV = -grad_entropy_T1 * policy.q_TV * (log_q_TV + entropy_T[chunk].unsqueeze(-1))
            token_scaled_T = policy.scaled_TV.gather(-1, token_T1).squeeze(-1)
            log_norm_T = _token_log_norm(policy, token_scaled_T, outside_T[chunk])
            shrink_T1 = torch.exp(policy.log_norm_T - log_norm_T).unsqueeze(-1)
            grad_TV -= grad_log_q_T1 * shrink_T1 * policy.q_TV
            q_token_T1 = torch.exp(token_scaled_T - log_norm_T).unsqueeze(-1)
            own_T1 = torch.where(outside_T[chunk].unsqueeze(-1), 1.0 - q_token_T1, torch.ones_like(q_token_T1))
            grad_TV.scatter_add_(-1, token_T1, grad_log_q_T1 * own_T1)
            grad_RV.index_add_(0, rows_T[chunk], (grad_TV / ctx.rule.temperature).to(grad_RV.dtype))
        return grad_RV, None, None, None, None, None, None


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
        rows_T: int64 [T]: the row of `logits_RV` that predicts each token.
        tokens_T: int64 [T], the sampled tokens Y.
        position_T: int64 [T], position j of each token in its response, from 0.
        rule: temperature and top_p.
        cap: max_new_tokens, the denominator of `pos_frac`.
        features: names from `ray_probe.core.features.REGISTRY`.

    Returns:
        float32 (or wider) statistics; source: spec sections 2 to 4.
    """
    log_q_T, entropy_T, outside_T, features_TD, _ = _Statistics.apply(  # type: ignore[no-untyped-call]
        logits_RV, rows_T, tokens_T, position_T, rule, tuple(features), cap
    )
    return TokenStatistics(log_q_T, entropy_T, outside_T, features_TD if features else None)
