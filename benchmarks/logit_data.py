"""Logits of three kinds, from a seed, for the benchmarks of statistics and head.

At temperature 0.8 and top_p 0.95, `llm` is Zipf's law sharpened by row, like rows of trained models: a median nucleus
holds 4 tokens, a tenth hold more than about a hundred, and the entropy is 1.4 nats. `mid` has hundreds of tokens in a
nucleus. `flat` resembles a model with random weights: 85 % of the vocabulary. The module needs only torch.

Shape suffixes: T tokens, V vocabulary, D hidden size.
"""

import torch
from torch import Tensor

from ray_probe.core.policy.logits import SamplingRule
from ray_probe.core.policy.sampling import sample_rows

SEED = 7
KINDS = ("llm", "mid", "flat")
TEMPERATURE = 0.8


def logits(kind: str, tokens: int, vocabulary: int) -> Tensor:
    """Return raw logits [T, V], float32."""
    generator = torch.Generator().manual_seed(SEED)
    if kind == "flat":
        return torch.randn(tokens, vocabulary, generator=generator).mul_(0.5)
    zipf_TV = torch.stack([_zipf(vocabulary, generator) for _ in range(tokens)])
    if kind == "mid":
        return zipf_TV.add_(torch.randn(tokens, vocabulary, generator=generator), alpha=3.0)
    return zipf_TV.mul_(_sharpness(tokens, generator)).add_(torch.randn(tokens, vocabulary, generator=generator))


def sampled(logits_TV: Tensor, top_p: float) -> Tensor:
    """Return tokens [T] sampled from the policy, for the benchmarks to score."""
    uniform_T = torch.rand(len(logits_TV), dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    return sample_rows(logits_TV, SamplingRule(TEMPERATURE, top_p), uniform_T.to(logits_TV.device))[0]


def hidden_and_weight(tokens: int, vocabulary: int, hidden: int) -> tuple[Tensor, Tensor]:
    """Return float32 hidden states [T, D] and weight [V, D] with logits like `llm`."""
    generator = torch.Generator().manual_seed(SEED)
    weight_VD = torch.randn(vocabulary, hidden, generator=generator).mul_(hidden**-0.5)
    weight_VD[:, 0] = _zipf(vocabulary, generator)
    hidden_TD = torch.randn(tokens, hidden, generator=generator)
    hidden_TD[:, :1] = _sharpness(tokens, generator)
    return hidden_TD, weight_VD


def _sharpness(tokens: int, generator: torch.Generator) -> Tensor:
    return torch.randn(tokens, 1, generator=generator).mul_(0.35).exp_().mul_(2.1)


def _zipf(vocabulary: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(vocabulary, generator=generator).float().log1p_().neg_()
