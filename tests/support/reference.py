"""Plain transformers as the reference: one row, no cache, no padding, float64 from the logits on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_probe.sequence_processor import SequenceProcessor


@dataclass(frozen=True)
class Gaps:
    """Largest distances from the reference, nats, and the mean gap that the parity gate sees."""

    scored: float
    entropy: float
    sampled: float
    parity: float


def reference(model: Any, prompt: Tensor, response: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Log q of a response's tokens, -inf outside the nucleus, and H of its prefixes."""
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, response])[None], use_cache=False, return_dict=True).logits[0]
    scaled = logits[len(prompt) - 1 : -1].double() / temperature
    mass, order = torch.softmax(scaled, -1).sort(-1, descending=True)
    kept = torch.zeros_like(scaled, dtype=torch.bool).scatter(-1, order, mass.cumsum(-1) - mass <= top_p)
    log_q = torch.log_softmax(scaled.masked_fill(~kept, -torch.inf), -1)
    return log_q.gather(-1, response[:, None])[:, 0], -(log_q.exp() * log_q.masked_fill(~kept, 0)).sum(-1)


def worst_gaps(processor: SequenceProcessor, prompts: Sequence[str], group: int = 2) -> Gaps:
    """Sample and score in batches, and compare each response with itself alone."""
    seeds = [[(0, b, g) for g in range(group)] for b in range(len(prompts))]
    sequences = processor.generate(prompts, group, seeds)
    results = processor.teacher_force_logprobs(sequences, compute_rb=True)
    assert sequences.sample_logprobs is not None and results.rb_entropies is not None
    scored, entropy, sampled, parity = [], [], [], []
    for b in range(len(prompts)):
        for g in range(group):
            row = sequences.tokens(b, g)
            log_q, expected = reference(processor.model, *row, processor.rule.temperature, processor.rule.top_p)
            inside = torch.isfinite(log_q).numpy()
            mine, sample = -results.entropies[b][g], sequences.sample_logprobs[b][g]
            scored.append(np.abs(mine - log_q.numpy())[inside])
            sampled.append(np.abs(sample - log_q.numpy())[inside])
            entropy.append(np.abs(results.rb_entropies[b][g] - expected.numpy()))
            parity.append(np.abs(sample - mine))
    largest = [float(np.concatenate(parts).max()) for parts in (scored, entropy, sampled)]
    return Gaps(*largest, float(np.concatenate(parity).mean()))
