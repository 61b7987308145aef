"""Enumerate every response of a tiny policy, and differentiate J by autograd.

This is the oracle of the self-test and of the tests. It restates the definitions of docs/specification.md, "Sampling
policy", in float64 and imports nothing of the project, so it shares no mistake with the code under test.

Shape suffix: V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EOS = 0


@dataclass(frozen=True)
class Enumerated:
    """All responses with positive probability, and exact values of the policy.

    Attributes:
        responses: token ids.
        probabilities: of each response.
        gradient: of J, flat, in the order of `model.parameters()`.
        entropy: J, nats.
    """

    responses: list[tuple[int, ...]]
    probabilities: list[float]
    gradient: Tensor
    entropy: float


def oracle_nucleus(scaled_V: Tensor, top_p: float) -> Tensor:
    """Return the nucleus: tokens with at most mass top_p strictly more probable."""
    if top_p >= 1:
        return torch.ones_like(scaled_V, dtype=torch.bool)
    mass_V = torch.softmax(scaled_V.detach().double(), dim=-1)
    above_V = torch.stack([mass_V[scaled_V.detach() > value].sum() for value in scaled_V.detach()])
    return above_V <= top_p


def oracle_policy(logits_V: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Return log q, with -inf outside the nucleus, and the entropy, both with graph."""
    scaled_V = logits_V / temperature
    keep_V = oracle_nucleus(scaled_V, top_p)
    log_q_V = torch.log_softmax(scaled_V.masked_fill(~keep_V, -torch.inf), dim=-1)
    kept_V = log_q_V[keep_V]
    return log_q_V, -(kept_V.exp() * kept_V).sum()


def all_responses(vocabulary: int, cap: int, prefix: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Yield every response; each ends at EOS (id 0) or at the cap."""
    for token in range(vocabulary):
        response = (*prefix, token)
        if token == EOS or len(response) == cap:
            yield response
        else:
            yield from all_responses(vocabulary, cap, response)


def enumerate_policy(model: Any, prompt: Sequence[int], cap: int, temperature: float, top_p: float) -> Enumerated:
    """Enumerate the responses to a prompt; differentiate J = E[sum of entropies]."""
    model.eval()
    parameters = list(model.parameters())
    objective = torch.zeros((), dtype=torch.float64)
    responses, probabilities = [], []
    for response in all_responses(model.config.vocab_size, cap):
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        steps = [oracle_policy(row, temperature, top_p) for row in logits]
        log_probability = torch.stack([log_q[y] for (log_q, _), y in zip(steps, response, strict=True)]).sum()
        if torch.isinf(log_probability):
            continue
        objective = objective + log_probability.exp() * torch.stack([h for _, h in steps]).sum()
        responses.append(response)
        probabilities.append(log_probability.exp().item())
    gradients = torch.autograd.grad(objective, parameters)
    return Enumerated(responses, probabilities, torch.cat([g.flatten() for g in gradients]), objective.item())
