"""Sampled sequences and the results of scoring them, each addressable as [b][g].

Shape suffixes: B prompts, G responses a prompt, L padded length, T tokens of one response, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ray_probe.core.arrays import Array

TokenRow = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class BatchedSequences:
    """Prompts with their responses.

    Only the mask marks real tokens: padding may stand left of the prompt and right of the response.

    Attributes:
        sequences: token ids [B, G, L], int64, on the CPU.
        attention_masks: [B, G, L], 1 at the tokens of prompt and response.
        prompt_lens: tokens of each prompt [B].
        gen_lens: tokens of each response [B][G], the EOS token included.
        sample_logprobs: log q when each token was sampled [B][G], arrays [T], nats; or None.
        responses_text: decoded responses [B][G], or None.
        sample_features: features of each prefix as its token was sampled [B][G], tensors [T, D] on the CPU; or None.
    """

    sequences: Tensor
    attention_masks: Tensor
    prompt_lens: list[int]
    gen_lens: list[list[int]]
    sample_logprobs: list[list[Array]] | None = None
    responses_text: list[list[str]] | None = None
    sample_features: list[list[Tensor]] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, G)."""
        return self.sequences.shape[0], self.sequences.shape[1]

    def tokens(self, b: int, g: int) -> TokenRow:
        """Return prompt ids [P] and response ids [T] of one response."""
        real = self.sequences[b, g][self.attention_masks[b, g].bool()]
        prompt_len = self.prompt_lens[b]
        return real[:prompt_len], real[prompt_len : prompt_len + self.gen_lens[b][g]]


def pack_sequences(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Sequence[int]]],
    sample_logprobs: list[list[Array]] | None = None,
    pad_id: int = 0,
) -> BatchedSequences:
    """Pad prompts [B] on the left and responses [B][G] on the right into one batch."""
    prompt_width = max(len(prompt) for prompt in prompts)
    width = prompt_width + max(len(response) for group in responses for response in group)
    sequences = torch.full((len(prompts), len(responses[0]), width), pad_id, dtype=torch.int64)
    masks = torch.zeros_like(sequences)
    for b, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        for g, response in enumerate(group):
            span = slice(prompt_width - len(prompt), prompt_width + len(response))
            sequences[b, g, span] = torch.tensor([*prompt, *response], dtype=torch.int64)
            masks[b, g, span] = 1
    return BatchedSequences(
        sequences, masks, [len(prompt) for prompt in prompts], [[len(r) for r in group] for group in responses],
        sample_logprobs,
    )  # fmt: skip


@dataclass
class LogprobResults:
    """Teacher-forced results, each list addressable as [b][g].

    Attributes:
        logprobs: log q of the sampled tokens, nats, tensor [T], with graph on request.
        entropies: surprisal -log q of the sampled tokens, nats, float64 array [T].
        sequence_logprobs: sum of `logprobs`, nats.
        rb_entropies: entropy of q at each step, nats, float64 array [T]; None unless `compute_rb`.
        rb_entropies_torch: the same with graph, tensor [T]; None unless `compute_rb` and `with_grad`.
        baseline_feats_torch: detached features, tensor [T, D]; None unless requested.
        outside_nucleus: bool array [T]: tokens outside the recomputed nucleus, which were added to it.
    """

    logprobs: list[list[Tensor]] = field(default_factory=list)
    entropies: list[list[Array]] = field(default_factory=list)
    sequence_logprobs: list[list[float]] = field(default_factory=list)
    rb_entropies: list[list[Array]] | None = None
    rb_entropies_torch: list[list[Tensor]] | None = None
    baseline_feats_torch: list[list[Tensor]] | None = None
    outside_nucleus: list[list[npt.NDArray[np.bool_]]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, G)."""
        return len(self.logprobs), len(self.logprobs[0])
