"""Every response of a policy that is small enough, with its probability, and the exact gradient of J by autograd.

This is the oracle of the self-test and of the tests: it restates the definitions of spec section 2 in float64, imports
nothing of the project, and so shares no mistake with what it judges.

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
    """All responses with positive probability, and what is exact about them.

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
    """The tokens such that the mass of strictly more probable ones is at most top_p, by the definition itself."""
    if top_p >= 1:
        return torch.ones_like(scaled_V, dtype=torch.bool)
    mass_V = torch.softmax(scaled_V.detach().double(), dim=-1)
    above_V = torch.stack([mass_V[scaled_V.detach() > value].sum() for value in scaled_V.detach()])
    return above_V <= top_p


def oracle_policy(logits_V: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """(log q with -inf outside, entropy), with graph, the nucleus held fixed."""
    scaled_V = logits_V / temperature
    keep_V = oracle_nucleus(scaled_V, top_p)
    log_q_V = torch.log_softmax(scaled_V.masked_fill(~keep_V, -torch.inf), dim=-1)
    kept_V = log_q_V[keep_V]
    return log_q_V, -(kept_V.exp() * kept_V).sum()


def all_responses(vocabulary: int, cap: int, prefix: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Every response: it ends at EOS (id 0) or at the cap."""
    for token in range(vocabulary):
        response = (*prefix, token)
        if token == EOS or len(response) == cap:
            yield response
        else:
            yield from all_responses(vocabulary, cap, response)


def enumerate_policy(model: Any, prompt: Sequence[int], cap: int, temperature: float, top_p: float) -> Enumerated:
    """Enumerate the responses to one prompt and differentiate J = E[sum of entropies] by autograd."""
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
