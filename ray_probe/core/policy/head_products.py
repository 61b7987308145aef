"""The head of a language model as matrix products, forward for some rows and columns of logits, and backward.

Shape suffixes: T tokens, V vocabulary, W columns of a tile, D hidden size, E rank of an adapter, N rows, M kept tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_probe.core.policy.full_vocabulary import BLOCK
from ray_probe.core.policy.kept_nuclei import NucleusCollector
from ray_probe.core.policy.logits import Buffer

BLOCK_ELEMENTS = 9_000_000  # logits of a block of whole rows
_LARGER_ON_A_GPU = 4
_LEAST_ROWS = 8
_MOST_ROWS = {"cpu": 256, "cuda": 4096}  # of a block whose logits are computed tile by tile
# Before a CPU's library multiplies few rows of hidden states with a weight, it repacks the whole weight. Strips of the
# weight's rows that fit a core's cache are faster then.
_FEW_ROWS = 64
_STRIP = 1024
_PIECE = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements of a table of gathered hidden states


@dataclass(frozen=True, eq=False)
class Adapter:
    """A low-rank addition to the head's weight, `up @ down * scaling`."""

    down_ED: Tensor
    up_VE: Tensor
    scaling: float


@dataclass(frozen=True, eq=False)
class Head:
    """The map from hidden states to logits, `cap * tanh(scale * (weight @ h + bias) / cap)`.

    Attributes:
        weight_VD: tied to the embedding or not.
        bias_V: or None.
        scale: 1 where the architecture has none; the reciprocal where it divides the logits.
        softcap: the cap, or None.
        adapter: a LoRA on the head, or None.
        accumulate_into_grad: backward adds the weight's gradient to `weight_VD.grad`, in `grad_dtype`, and returns none
            to autograd; the weight must be a leaf.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    adapter: Adapter | None = None
    accumulate_into_grad: bool = False


class Products:
    """The matrix products of hidden states with a head's weights, as a `LogitSource`.

    Args:
        head: scale, softcap, and where the weight's gradient goes.
        tensors: hidden states, weights, and the bias if any: one pair of hidden states [T, D] and weight [V, D], or
            more pairs whose products add up.
        buffer: memory for the logits; None: new memory.
    """

    multiple = BLOCK

    def __init__(self, head: Head, *tensors: Tensor, buffer: Buffer | None = None) -> None:
        pairs = len(tensors) // 2
        self.head, self.tensors = head, tensors
        self.hiddens, self.weights = tensors[:pairs], tensors[pairs : 2 * pairs]
        self.bias_V = tensors[-1] if len(tensors) % 2 else None
        self.shape = len(self.hiddens[0]), len(self.weights[0])
        self.dtype, self._device = self.weights[0].dtype, self.weights[0].device
        self._buffer = buffer or Buffer()

    @classmethod
    def of(cls, hidden_TD: Tensor, head: Head, buffer: Buffer | None = None) -> "Products":
        """Return a head's products with hidden states; computes the adapter's inner states, with graph."""
        hiddens, weights = [hidden_TD], [head.weight_VD]
        if head.adapter is not None:
            hiddens.append(torch.nn.functional.linear(hidden_TD, head.adapter.down_ED) * head.adapter.scaling)
            weights.append(head.adapter.up_VE)
        return cls(head, *hiddens, *weights, *([] if head.bias_V is None else [head.bias_V]), buffer=buffer)

    def blocks(self, picked_N: Tensor | None, whole: bool) -> Iterator[tuple[slice, slice | Tensor]]:
        """Yield blocks of rows, each for one product with the whole weight or with tiles of it."""
        rows = self.shape[0] if picked_N is None else len(picked_N)
        size = _MOST_ROWS.get(self._device.type, _MOST_ROWS["cuda"])
        if whole:
            size = (1 if self._device.type == "cpu" else _LARGER_ON_A_GPU) * BLOCK_ELEMENTS // self.shape[1]
            size = max(_LEAST_ROWS, size // _LEAST_ROWS * _LEAST_ROWS)
        for first in range(0, rows, size):
            block = slice(first, min(first + size, rows))
            yield block, block if picked_N is None else picked_N[block]

    def logits(self, rows: slice | Tensor, columns: slice) -> Tensor:
        """Return raw logits of some rows and columns [N, W], in the weights' dtype; valid until the next call."""
        hidden_ND, weight_WD = self.hiddens[0][rows], self.weights[0][columns]
        shape = (len(hidden_ND), len(weight_WD))
        logits_NW = self._buffer.table(shape, self.dtype, self._device)
        few = self._device.type == "cpu" and shape[0] <= _FEW_ROWS
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
        # Bits, because logits that are computed again may round to the other side of a threshold.
        return NucleusCollector(self.shape[1], self._device)

    def sink(self, needed: Sequence[bool]) -> "HeadGradient":
        """Return the sink of the gradient by hidden states, weights and bias."""
        return HeadGradient(self, needed)

    def chain_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Turn a gradient by logits into the gradient by the products, in place; both have one shape."""
        if self.head.softcap is not None:
            grad.mul_(1.0 - (logits / self.head.softcap).square_())
        return grad if self.head.scale == 1.0 else grad.mul_(self.head.scale)


class HeadGradient:
    """Sums the gradients of a head's tensors in float32 or wider.

    Args:
        products: hidden states and weights.
        needed: which of `products.tensors` need a gradient.
    """

    def __init__(self, products: Products, needed: Sequence[bool]) -> None:
        self.products, pairs = products, len(products.hiddens)
        into_grad = products.head.accumulate_into_grad and needed[pairs]
        self._returned = [
            _zeros(tensor) if need and not (into_grad and place == pairs) else None
            for place, (tensor, need) in enumerate(zip(products.tensors, needed, strict=True))
        ]
        self.by_hidden, self.by_weight = self._returned[:pairs], self._returned[pairs : 2 * pairs]
        self.by_bias = self._returned[-1] if products.bias_V is not None else None
        if into_grad:
            self.by_weight[0] = _grad_of(products.head.weight_VD)

    def add_kept(self, row_M: Tensor, column_M: Tensor, grad_M: Tensor, logit_M: Tensor) -> None:
        """Add a gradient by logits that is 0 everywhere but at these rows and columns, in any order."""
        row_M, order_M = row_M.sort(stable=True)
        column_M, grad_M = column_M[order_M], self.products.chain_(grad_M, logit_M)[order_M]
        every_T = torch.arange(self.products.shape[0], device=row_M.device)
        first_T = torch.searchsorted(row_M, every_T)
        for k, (hidden_TD, weight_VD) in enumerate(zip(self.products.hiddens, self.products.weights, strict=True)):
            by_hidden, by_weight = self.by_hidden[k], self.by_weight[k]
            if by_hidden is not None:
                weighted_TD = torch.nn.functional.embedding_bag(
                    column_M, weight_VD, first_T, mode="sum", per_sample_weights=grad_M.to(weight_VD.dtype)
                )
                by_hidden.add_(weighted_TD)
            if by_weight is not None:
                _add_outer(by_weight, column_M, hidden_TD, row_M, grad_M)
        if self.by_bias is not None:
            self.by_bias.index_add_(0, column_M, grad_M.to(self.by_bias.dtype))

    def add_tile(self, rows: slice | Tensor, columns: slice, grad_NW: Tensor, logits_NW: Tensor) -> None:
        """Add a gradient by the logits of some rows and columns; each row occurs once. Overwrites `grad_NW`."""
        grad_NW = self.products.chain_(grad_NW, logits_NW)
        for k, (hidden_TD, weight_VD) in enumerate(zip(self.products.hiddens, self.products.weights, strict=True)):
            by_hidden, by_weight = self.by_hidden[k], self.by_weight[k]
            narrow_NW = grad_NW.to(weight_VD.dtype)
            if by_hidden is not None:
                by_hidden[rows] += narrow_NW @ weight_VD[columns]
            if by_weight is not None and by_weight.dtype == hidden_TD.dtype:
                by_weight[columns].addmm_(narrow_NW.t(), hidden_TD[rows])
            elif by_weight is not None:
                by_weight[columns] += narrow_NW.t() @ hidden_TD[rows]
        if self.by_bias is not None:
            self.by_bias[columns] += grad_NW.sum(dim=0)

    def results(self) -> list[Tensor | None]:
        """Return the gradients in the tensors' dtypes; None where none is needed or `.grad` took it."""
        tensors = self.products.tensors
        return [None if x is None else x.to(tensor.dtype) for x, tensor in zip(self._returned, tensors, strict=True)]


def _grad_of(weight: Tensor) -> Tensor:
    """Return the weight's `.grad`, and create it first if it is None."""
    # A new table of the weight's size that is filled with zeros and then added takes a third of the head's time.
    assert weight.is_leaf, "only a leaf has a .grad to accumulate into"
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
    return weight.grad


def _zeros(tensor: Tensor) -> Tensor:
    """Return zeros of the tensor's shape in float32 or wider."""
    return torch.zeros(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device)


def _add_outer(sum_VD: Tensor, column_M: Tensor, hidden_TD: Tensor, row_M: Tensor, grad_M: Tensor) -> None:
    """Add `grad * hidden[row]` to the rows `column` of a sum, piece by piece."""
    size = max(1, _PIECE.get(hidden_TD.device.type, _PIECE["cuda"]) // hidden_TD.shape[-1])
    for start in range(0, len(column_M), size):
        piece = slice(start, start + size)
        outer_MD = hidden_TD[row_M[piece]].to(sum_VD.dtype).mul_(grad_M[piece].to(sum_VD.dtype).unsqueeze(-1))
        sum_VD.index_add_(0, column_M[piece], outer_MD)
