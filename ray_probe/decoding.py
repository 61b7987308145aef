"""Sampling responses from a model under the policy: a loop of our own on its key-value cache.

`generate` of transformers would merge the checkpoint's generation_config (top_k, penalties, forced tokens, a length)
into the policy. Rows that have ended are taken out of the cache, so that the rest does not wait for them.

Shape suffixes: N rows (responses) of a batch, P prompt width, T cap, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from ray_probe.core.policy import SamplingRule, sample_rows
from ray_probe.forward import Forward
from ray_probe.sequences import Array

COMPACT_BELOW = 0.75
"""Rows are taken out once so small a share is left: copying the cache costs less than what it saves."""


@dataclass(frozen=True)
class Sampled:
    """Responses in the order of their prompts: token ids, and log q of each when it was sampled, nats."""

    tokens: list[list[int]]
    log_q: list[Array]


@dataclass(frozen=True)
class Decoder:
    """Samples responses.

    Attributes:
        forward: the model.
        rule: temperature and top_p.
        cap: max_new_tokens.
        eos_ids: ids that end a response.
        pad_id: any id that has an embedding: the mask says what is padding.
        on_progress: told of tokens done.
    """

    forward: Forward
    rule: SamplingRule
    cap: int
    eos_ids: tuple[int, ...]
    pad_id: int
    on_progress: Callable[[int], None]

    def sample(self, prompts: Sequence[Sequence[int]], uniforms_NT: Array, batch_size: int) -> Sampled:
        """One response a prompt, in batches of prompts of like length.

        Args:
            prompts: token ids.
            uniforms_NT: float64 [N, cap] in [0, 1): they belong to the response, so its tokens do not depend on the
                batch that it is in.
            batch_size: responses sampled at once, at most.
        """
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        tokens: list[list[int]] = [[] for _ in prompts]
        log_q: list[Array] = [uniforms_NT[0][:0] for _ in prompts]
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = self._batch([prompts[place] for place in places], torch.from_numpy(uniforms_NT[places]))
            for place, one, its_log_q in zip(places, *batch, strict=True):
                tokens[place], log_q[place] = one, its_log_q
        return Sampled(tokens, log_q)

    @torch.no_grad()
    def _batch(self, prompts: list[Sequence[int]], uniforms_NT: Tensor) -> tuple[list[list[int]], list[Array]]:
        device = self.forward.device
        ids_NP, mask_NP = (table.to(device) for table in left_padded(prompts, self.pad_id))
        uniforms_NT = uniforms_NT.to(device)
        eos = torch.tensor(self.eos_ids, dtype=torch.int64, device=device)
        tokens_NT = torch.full((len(prompts), self.cap), -1, dtype=torch.int64, device=device)
        log_q_NT = torch.zeros((len(prompts), self.cap), dtype=torch.float64, device=device)
        rows = torch.arange(len(prompts), device=device)  # whose they are, of the rows that are in the cache
        alive = torch.ones_like(rows, dtype=torch.bool)
        cache: Any = None
        for step in range(self.cap):
            logits_NV, cache = self.forward.next_logits(ids_NP, mask_NP, cache)
            token_N, log_q_N = sample_rows(logits_NV, self.rule, uniforms_NT[rows, step])
            tokens_NT[rows[alive], step] = token_N[alive]
            log_q_NT[rows[alive], step] = log_q_N[alive].double()
            self.on_progress(int(alive.sum()))
            alive &= ~torch.isin(token_N, eos)
            left = int(alive.sum())
            if left == 0 or step + 1 == self.cap:
                break
            if left <= COMPACT_BELOW * len(rows) and can_select(cache):
                kept = alive.nonzero().squeeze(-1)
                cache.batch_select_indices(kept)
                rows, token_N, mask_NP, alive = rows[kept], token_N[kept], mask_NP[kept], alive[kept]
            ids_NP, mask_NP = token_N.unsqueeze(-1), torch.cat([mask_NP, torch.ones_like(mask_NP[:, :1])], dim=-1)
        lengths = (tokens_NT >= 0).sum(dim=-1).tolist()
        tokens, log_q = tokens_NT.tolist(), log_q_NT.cpu().numpy()
        return [row[:n] for row, n in zip(tokens, lengths, strict=True)], [
            row[:n].copy() for row, n in zip(log_q, lengths, strict=True)
        ]


def can_select(cache: Any) -> bool:
    """Whether rows can be taken out of a cache: keys and values can, the state of a recurrent layer cannot."""
    layers = getattr(cache, "layers", ())
    recurrent: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", ())  # transformers before 5.20 has none
    known = all(isinstance(layer, cache_utils.DynamicLayer) and not isinstance(layer, recurrent) for layer in layers)
    return known and len(layers) > 0


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids [N, P] and their mask: a prompt ends where its response begins."""
    width = max(len(prompt) for prompt in prompts)
    ids_NP = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    mask_NP = torch.zeros_like(ids_NP)
    for row, prompt in enumerate(prompts):
        ids_NP[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask_NP[row, width - len(prompt) :] = 1
    return ids_NP, mask_NP
