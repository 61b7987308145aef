"""The LM head as matrix products, which give some rows and columns of logits.

Shape suffixes: T tokens, V vocabulary, W columns of a tile, D hidden size, E rank of an adapter, N rows.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ray_probe.core.policy.full_vocabulary import BLOCK
from ray_probe.core.policy.head_gradient import HeadGradient
from ray_probe.core.policy.lm_head import Head, split_tensors
from ray_probe.core.policy.logits import Buffer
from ray_probe.core.policy.nucleus.kept import NucleusCollector

BLOCK_ELEMENTS = 9_000_000  # logits of a block of whole rows
_LARGER_ON_A_GPU = 4
_LEAST_ROWS = 8
MOST_ROWS = {"cpu": 256, "cuda": 4096}  # of a block whose logits are computed tile by tile
# Before a CPU's library multiplies few rows of hidden states with a weight, it repacks the whole weight. Strips of the
# weight's rows that fit a core's cache are faster then.
FEW_ROWS = 64
_STRIP = 1024


class Products:
    """The products of hidden states with a head's weights, as a `LogitSource`.

    Args:
        head: scale, softcap, and where the weight's gradient goes.
        tensors: hidden states, weights, and the bias if any: one pair of hidden states [T, D] and weight [V, D], or
            more pairs whose products add up.
        buffer: memory for the logits; None: new memory.
    """

    multiple = BLOCK

    def __init__(self, head: Head, *tensors: Tensor, buffer: Buffer | None = None) -> None:
        self.head, self.tensors = head, tensors
        self.hiddens, self.weights, self.bias_V = split_tensors(tensors)
        self.shape = len(self.hiddens[0]), len(self.weights[0])
        self.dtype, self._device = self.weights[0].dtype, self.weights[0].device
        self._buffer = buffer or Buffer()

    @classmethod
    def of(cls, hidden_TD: Tensor, head: Head, buffer: Buffer | None = None) -> "Products":
        """Return a head's products; computes the adapter's inner states, with graph."""
        hiddens, weights = [hidden_TD], [head.weight_VD]
        if head.adapter is not None:
            hiddens.append(torch.nn.functional.linear(hidden_TD, head.adapter.down_ED) * head.adapter.scaling)
            weights.append(head.adapter.up_VE)
        return cls(head, *hiddens, *weights, *([] if head.bias_V is None else [head.bias_V]), buffer=buffer)

    def blocks(self, picked_N: Tensor | None, whole: bool) -> Iterator[tuple[slice, slice | Tensor]]:
        """Yield blocks of rows, each for a product with the whole weight or tiles of it."""
        rows = self.shape[0] if picked_N is None else len(picked_N)
        size = MOST_ROWS.get(self._device.type, MOST_ROWS["cuda"])
        if whole:
            size = (1 if self._device.type == "cpu" else _LARGER_ON_A_GPU) * BLOCK_ELEMENTS // self.shape[1]
            size = max(_LEAST_ROWS, size // _LEAST_ROWS * _LEAST_ROWS)
        for first in range(0, rows, size):
            block = slice(first, min(first + size, rows))
            yield block, block if picked_N is None else picked_N[block]

    def logits(self, rows: slice | Tensor, columns: slice) -> Tensor:
        """Return raw logits of some rows and columns [N, W], valid until the next call."""
        hidden_ND, weight_WD = self.hiddens[0][rows], self.weights[0][columns]
        shape = (len(hidden_ND), len(weight_WD))
        logits_NW = self._buffer.table(shape, self.dtype, self._device)
        few = self._device.type == "cpu" and shape[0] <= FEW_ROWS
        for start in range(0, shape[1], _STRIP if few else max(1, shape[1])):
            strip = slice(start, start + _STRIP if few else None)
            torch.mm(hidden_ND, weight_WD[strip].t(), out=logits_NW[:, strip])
        for hidden_TE, weight_VE in zip(self.hiddens[1:], self.weights[1:], strict=True):
            logits_NW.addmm_(hidden_TE[rows], weight_VE[columns].t())
        if self.bias_V is not None:
            logits_NW.add_(self.bias_V[columns])
        if self.head.scale != 1.0:
            logits_NW.mul_(self.head.scale)
        if self.head.softcap is not None:
            logits_NW.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return logits_NW

    def collector(self) -> NucleusCollector:
        """Return a collector of narrow nuclei's tokens and wide nuclei's bits."""
        # Bits, because recomputed logits may round to the other side of a threshold.
        return NucleusCollector(self.shape[1], self._device)

    def sink(self, needed: Sequence[bool]) -> HeadGradient:
        """Return the sink of the gradient by hidden states, weights and bias."""
        return HeadGradient(self.head, self.tensors, needed)
