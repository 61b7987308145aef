"""The naive reference of the benchmarks: the definitions, with no care for cost.

It uses whole [T, V] float tables, a full descending sort of the probabilities, a cumulative sum, a scatter of the keep
mask, a masked softmax, two more full sorts for the two largest logits, and autograd through the entropy.

Shape suffixes: T tokens, V vocabulary, D hidden size.
"""

import torch
from torch import Tensor


def statistics(
    logits_TV: Tensor, tokens_T: Tensor, position_T: Tensor, temperature: float, top_p: float, cap: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log q(Y) and H [T] with graph, and the seven features [T, 7] detached."""
    scaled_TV = logits_TV.float() / temperature
    p_TV = torch.softmax(scaled_TV, dim=-1)
    sorted_TV, order_TV = torch.sort(p_TV, dim=-1, descending=True)
    kept_TV = torch.cumsum(sorted_TV, dim=-1) - sorted_TV <= top_p
    keep_TV = torch.zeros_like(kept_TV).scatter_(-1, order_TV, kept_TV)
    masked_TV = scaled_TV.masked_fill(~keep_TV, -torch.inf)
    log_q_TV = torch.log_softmax(masked_TV, dim=-1)
    q_TV = log_q_TV.exp()
    weighted_TV = q_TV * scaled_TV.masked_fill(~keep_TV, 0.0)
    entropy_T = torch.logsumexp(masked_TV, dim=-1) - weighted_TV.sum(dim=-1)
    log_q_T = log_q_TV.gather(-1, tokens_T.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        features_TD = _features(p_TV, keep_TV, masked_TV, q_TV, entropy_T, position_T, cap)
    return log_q_T, entropy_T, features_TD


def _features(
    p_TV: Tensor, keep_TV: Tensor, masked_TV: Tensor, q_TV: Tensor, entropy_T: Tensor, position_T: Tensor, cap: int
) -> Tensor:
    top1_T = torch.sort(q_TV, dim=-1, descending=True).values[:, 0]
    two_T2 = torch.sort(masked_TV, dim=-1, descending=True).values[:, :2]
    margin_T = (two_T2[:, 0] - two_T2[:, 1]).nan_to_num(posinf=0.0)
    head_T = (p_TV * keep_TV).sum(dim=-1).clamp(max=1.0)
    two_point_T = torch.special.entr(head_T) + torch.special.entr(1.0 - head_T)
    level_TV = masked_TV.masked_fill(~keep_TV, 0.0)
    mean_T1 = (q_TV * level_TV).sum(dim=-1, keepdim=True)
    variance_T = (q_TV * (level_TV - mean_T1).square()).sum(dim=-1)
    return torch.stack([entropy_T, top1_T, margin_T, head_T, two_point_T, variance_T, position_T / cap], dim=-1)
