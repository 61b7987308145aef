"""Maxima of blocks of the vocabulary, which lead to the largest tokens of a row.

Shape suffixes: R rows, V vocabulary, N some rows, K tokens of a row, B tokens of a block, M blocks.
"""

import torch
from torch import Tensor

from ray_probe.core.policy.logits import Buffer

_BLOCK = 8


class BlockMaxima:
    """A chunk of raw logits with the largest of each block of 8 tokens.

    Args:
        logits_RV: raw logits.
        buffer: memory for the maxima.
    """

    def __init__(self, logits_RV: Tensor, buffer: Buffer) -> None:
        vocabulary, dtype, device = logits_RV.shape[-1], logits_RV.dtype, logits_RV.device
        self.logits_RV = logits_RV
        # Of M blocks, block m holds tokens m, m + M, m + 2 M...: so the maxima vectorise. The short rest is kept apart.
        self.blocks = vocabulary // _BLOCK
        whole = self.blocks * _BLOCK
        self.steps_B = torch.arange(_BLOCK, device=device) * self.blocks
        self.left = torch.arange(whole, vocabulary, device=device)
        self.left_RK = logits_RV[:, whole:]
        self.inner_RM = buffer.table((len(logits_RV), self.blocks), dtype, device)
        torch.amax(torch.unflatten(logits_RV[:, :whole], -1, (_BLOCK, self.blocks)), dim=1, out=self.inner_RM)

    @property
    def maxima_RM(self) -> Tensor:
        """Maxima of all blocks; the rest counts as a block."""
        if len(self.left) == 0:
            return self.inner_RM
        return torch.cat([self.inner_RM, self.left_RK.amax(dim=-1, keepdim=True)], dim=-1)

    def largest(self, rows_N: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return tokens and raw logits [N, size] of the `size` largest, in falling order."""
        # At most `size` blocks hold one of the `size` largest tokens, and no other block has a larger maximum.
        every = len(rows_N) == len(self.logits_RV)
        inner_NM = self.inner_RM if every else self.inner_RM[rows_N]
        blocks_N1K = inner_NM.topk(min(size, self.blocks), dim=-1, sorted=False).indices.unsqueeze(1)
        columns_NK = (blocks_N1K + self.steps_B.unsqueeze(-1)).flatten(1)
        columns_NK = torch.cat([columns_NK, self.left.expand(len(rows_N), -1)], dim=-1)
        logits_RV, row_N1 = self.logits_RV, rows_N.unsqueeze(-1)
        values_NK = logits_RV.gather(-1, columns_NK) if every else logits_RV[row_N1, columns_NK]
        values_NK, order_NK = values_NK.topk(size, dim=-1)
        return columns_NK.gather(-1, order_NK), values_NK
