"""Sample responses from a model, step by step on its key-value cache.

transformers' `generate` would merge the checkpoint's generation_config (top_k, penalties, forced tokens, a length)
into the policy. Rows that have ended leave the cache, so that they take no time.

The search for a token's nucleus also scores the token, so its features need no second read of the logits.

Shape suffixes: N rows (responses) of a batch, P prompt width, T cap or tokens of a response, V vocabulary, D features.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor

from ray_probe.core.arrays import Array
from ray_probe.core.policy.logits import Buffer, SamplingRule
from ray_probe.core.policy.summarize import SummaryScratch
from ray_probe.core.policy.token_statistics import TokenStatistics, sample_statistics
from ray_probe.model.forward import Forward

COMPACT_BELOW = 0.75
"""Rows that have ended leave the cache once at most this share is left, as copying it takes time."""


@dataclass(frozen=True)
class Sampled:
    """A sampled response.

    Attributes:
        tokens: its ids.
        log_q: log q of each token when it was sampled, float64 [T], nats.
        entropy: H of each token when it was sampled, float64 [T], nats.
        features_TD: features of its prefixes, float32 or wider [T, D].
    """

    tokens: list[int]
    log_q: Array
    entropy: Array
    features_TD: Tensor


@dataclass(frozen=True)
class Decoder:
    """Samples responses.

    Attributes:
        forward: the model.
        rule: temperature and top_p.
        cap: max_new_tokens.
        eos_ids: ids that end a response.
        pad_id: any id that has an embedding; the mask marks padding.
        on_progress: called with each number of sampled tokens.
        features: names of the features of each step.
    """

    forward: Forward
    rule: SamplingRule
    cap: int
    eos_ids: tuple[int, ...]
    pad_id: int
    on_progress: Callable[[int], None]
    features: tuple[str, ...] = ()

    def sample(self, prompts: Sequence[Sequence[int]], uniforms_NT: Array, batch_size: int) -> list[Sampled]:
        """Sample one response a prompt, in batches of prompts of similar length.

        Args:
            prompts: token ids.
            uniforms_NT: float64 [N, cap] in [0, 1), one row a response, so that its tokens do not depend on its batch.
            batch_size: most responses sampled at once.

        Returns:
            The responses in the order of the prompts.
        """
        sampled: dict[int, Sampled] = {}
        for places in in_batches([len(prompt) for prompt in prompts], batch_size, self.forward.takes_padding):
            batch = self._batch([prompts[place] for place in places], torch.from_numpy(uniforms_NT[places]))
            sampled |= zip(places, batch, strict=True)
        return [sampled[place] for place in range(len(prompts))]

    @torch.no_grad()
    def _batch(self, prompts: list[Sequence[int]], uniforms_NT: Tensor) -> list[Sampled]:
        device = self.forward.device
        ids_NP, mask_NP = (table.to(device) for table in left_padded(prompts, self.pad_id))
        uniforms_NT = uniforms_NT.to(device)
        eos = torch.tensor(self.eos_ids, dtype=torch.int64, device=device)
        steps = _Steps.empty(len(prompts), self.cap, device)
        rows = torch.arange(len(prompts), device=device)  # place of each cached row in the batch
        alive = torch.ones_like(rows, dtype=torch.bool)
        cache: Any = None
        logits_buffer, scratch = Buffer(), SummaryScratch()
        for step in range(self.cap):
            logits_NV, cache = self.forward.next_logits(ids_NP, mask_NP, cache, logits_buffer)
            token_N, scored = sample_statistics(
                logits_NV, uniforms_NT[rows, step], torch.full_like(rows, step), self.rule, self.cap, self.features,
                scratch,
            )  # fmt: skip
            steps.put(step, rows, alive, token_N, scored)
            self.on_progress(int(alive.sum()))
            alive &= ~torch.isin(token_N, eos)
            left = int(alive.sum())
            if left == 0 or step + 1 == self.cap:
                break
            if left <= COMPACT_BELOW * len(rows) and self.forward.drops_rows:
                kept = alive.nonzero().squeeze(-1)
                cache.batch_select_indices(kept)
                rows, token_N, mask_NP, alive = rows[kept], token_N[kept], mask_NP[kept], alive[kept]
            ids_NP, mask_NP = token_N.unsqueeze(-1), torch.cat([mask_NP, torch.ones_like(mask_NP[:, :1])], dim=-1)
        return steps.responses()


@dataclass(frozen=True)
class _Steps:
    """Tokens (-1: none), log q, entropies and features of a batch so far."""

    tokens_NT: Tensor
    log_q_NT: Tensor
    entropy_NT: Tensor
    features: list[Tensor]

    @classmethod
    def empty(cls, rows: int, cap: int, device: torch.device) -> Self:
        tokens_NT = torch.full((rows, cap), -1, dtype=torch.int64, device=device)
        log_q_NT, entropy_NT = (torch.zeros((rows, cap), dtype=torch.float64, device=device) for _ in range(2))
        return cls(tokens_NT, log_q_NT, entropy_NT, [])

    def put(self, step: int, rows: Tensor, alive: Tensor, token_N: Tensor, scored: TokenStatistics) -> None:
        """Add a step: a token of each row, and whether the row had not ended."""
        self.tokens_NT[rows[alive], step] = token_N[alive]
        self.log_q_NT[rows[alive], step] = scored.log_q_T[alive].double()
        self.entropy_NT[rows[alive], step] = scored.entropy_T[alive].double()
        if scored.features_TD is not None:
            table_ND = scored.features_TD.new_zeros((len(self.tokens_NT), scored.features_TD.shape[-1]))
            table_ND[rows] = scored.features_TD
            self.features.append(table_ND)

    def responses(self) -> list[Sampled]:
        """Return the responses, each cut at its end."""
        lengths = (self.tokens_NT >= 0).sum(dim=-1).tolist()
        tokens = self.tokens_NT.tolist()
        log_q_NT, entropy_NT = self.log_q_NT.cpu().numpy(), self.entropy_NT.cpu().numpy()
        features_NTD = torch.stack(self.features, dim=1).cpu() if self.features else torch.zeros((len(tokens), 0, 0))
        return [
            Sampled(row[:n], log_q_T[:n].copy(), entropy_T[:n].copy(), features_TD[:n].clone())
            for row, log_q_T, entropy_T, features_TD, n in zip(
                tokens, log_q_NT, entropy_NT, features_NTD, lengths, strict=True
            )
        ]


def in_batches(lengths: Sequence[int], size: int, mixed: bool) -> Iterator[list[int]]:
    """Yield the places of prompts that are sampled together, shortest first.

    Args:
        lengths: of the prompts, tokens.
        size: most prompts in a batch.
        mixed: prompts of a batch may differ in length.
    """
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    groups = [order] if mixed else [list(group) for _, group in groupby(order, key=lambda place: lengths[place])]
    for group in groups:
        yield from (group[start : start + size] for start in range(0, len(group), size))


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return token ids [N, P] and their mask, padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids_NP = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    mask_NP = torch.zeros_like(ids_NP)
    for row, prompt in enumerate(prompts):
        ids_NP[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask_NP[row, width - len(prompt) :] = 1
    return ids_NP, mask_NP
