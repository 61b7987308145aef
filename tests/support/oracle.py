"""Statistics of a row of logits by their definitions, in float64, without core."""

import numpy as np
import torch
from torch import Tensor


def scaled_row(logits_V: Tensor, temperature: float) -> np.ndarray:
    """Return the logits scaled in float32 or wider, which define the policy."""
    wide_V = logits_V if logits_V.dtype == torch.float64 else logits_V.float()
    return ((wide_V - wide_V.max()) / temperature).double().numpy()


def nucleus(scaled_V: np.ndarray, top_p: float) -> tuple[np.ndarray, float]:
    """The nucleus, and how near to top_p the mass above any token comes."""
    possible = scaled_V > -np.inf
    if top_p == 1.0:
        return possible, np.inf
    levels, index, counts = np.unique(scaled_V, return_inverse=True, return_counts=True)
    mass = counts * np.exp(levels)
    above = np.append(np.cumsum((mass / mass.sum())[::-1])[::-1][1:], 0.0)
    distance = np.abs(above[:-1] - top_p).min(initial=np.inf)
    return possible & (above <= top_p)[index], float(distance)


def row_statistics(logits_V: Tensor, token: int, temperature: float, top_p: float) -> dict[str, float]:
    """Everything that is said of a token and its prefix, but pos_frac."""
    scaled_V = scaled_row(logits_V, temperature)
    keep_V, _ = nucleus(scaled_V, top_p)
    p_V = np.exp(scaled_V) / np.exp(scaled_V).sum()
    kept = scaled_V[keep_V]
    norm = np.exp(kept).sum()
    q = np.exp(kept) / norm
    level = np.maximum(kept, -1e4)
    with_token = norm if keep_V[token] else norm + np.exp(scaled_V[token])
    two = np.sort(kept)[::-1][:2]
    gap = two[0] - two[1] if len(two) == 2 else 0.0
    head, tail = (1.0, 0.0) if top_p == 1.0 else (p_V[keep_V].sum(), p_V[~keep_V].sum())
    mean = (q * level).sum()
    return {
        "log_q": scaled_V[token] - np.log(with_token),
        "H": np.log(norm) - mean,
        "top1": q.max(),
        "margin": gap if np.isfinite(gap) else 0.0,
        "head_mass": head,
        "two_point_entropy": -sum(x * np.log(x) for x in (head, tail) if x > 0),
        "logit_var": (q * (level - mean) ** 2).sum(),
        "outside": float(not keep_V[token]),
    }


def row_gradient(
    logits_V: Tensor, token: int, temperature: float, top_p: float, weights: tuple[float, float]
) -> Tensor:
    """Return the gradient [V] of `weights[0] log q(token) + weights[1] H`, float64."""
    scaled_V = torch.from_numpy(scaled_row(logits_V, temperature)).requires_grad_()
    keep_V = torch.from_numpy(nucleus(scaled_V.detach().numpy(), top_p)[0])
    log_q_V = torch.log_softmax(scaled_V[keep_V], dim=-1)
    entropy = -(log_q_V.exp() * log_q_V.clamp(min=-1e4)).sum()
    with_token_V = keep_V | (torch.arange(len(keep_V)) == token)
    log_q = scaled_V[token] - torch.logsumexp(scaled_V[with_token_V], dim=-1)
    (gradient_V,) = torch.autograd.grad(weights[0] * log_q + weights[1] * entropy, scaled_V)
    return gradient_V / temperature
