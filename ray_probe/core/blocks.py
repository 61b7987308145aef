"""Maxima of blocks of the vocabulary: what need not be looked into. Raw logits in, raw logits and tokens out.

Shape suffixes: R rows, V vocabulary, N some rows, K tokens of a row, B tokens of a block, M blocks.
"""

import torch
from torch import Tensor

from ray_probe.core.scaling import Workspace

_BLOCK = 8


class Blocks:
    """A chunk of logits in blocks: block m is tokens m, m + M, m + 2 M..., which vectorises; a short rest is apart."""

    def __init__(self, logits_RV: Tensor, space: Workspace) -> None:
        vocabulary, dtype, device = logits_RV.shape[-1], logits_RV.dtype, logits_RV.device
        self.logits_RV = logits_RV
        self.blocks = vocabulary // _BLOCK
        whole = self.blocks * _BLOCK
        self.steps_B = torch.arange(_BLOCK, device=device) * self.blocks
        self.left = torch.arange(whole, vocabulary, device=device)
        self.left_RK = logits_RV[:, whole:]
        self.inner_RM = space.table("maxima", (len(logits_RV), self.blocks), dtype, device)
        torch.amax(torch.unflatten(logits_RV[:, :whole], -1, (_BLOCK, self.blocks)), dim=1, out=self.inner_RM)

    @property
    def maxima_RM(self) -> Tensor:
        """Maxima of all blocks, the rest being one too."""
        if len(self.left) == 0:
            return self.inner_RM
        return torch.cat([self.inner_RM, self.left_RK.amax(dim=-1, keepdim=True)], dim=-1)

    def largest(self, rows_N: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Tokens and raw logits [N, size] of the largest logits of some rows, in falling order.

        Fewer than `size` blocks have a maximum above the `size`-th largest of all maxima, so the blocks with the
        largest maxima hold the largest tokens.
        """
        every = len(rows_N) == len(self.logits_RV)
        inner_NM = self.inner_RM if every else self.inner_RM[rows_N]
        blocks_N1K = inner_NM.topk(min(size, self.blocks), dim=-1, sorted=False).indices.unsqueeze(1)
        columns_NK = (blocks_N1K + self.steps_B.unsqueeze(-1)).flatten(1)
        columns_NK = torch.cat([columns_NK, self.left.expand(len(rows_N), -1)], dim=-1)
        logits_RV, row_N1 = self.logits_RV, rows_N.unsqueeze(-1)
        values_NK = logits_RV.gather(-1, columns_NK) if every else logits_RV[row_N1, columns_NK]
        values_NK, order_NK = values_NK.topk(size, dim=-1)
        return columns_NK.gather(-1, order_NK), values_NK
