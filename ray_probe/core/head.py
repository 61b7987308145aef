"""The head of a language model as products of matrices: logits of some rows and columns, and the way back.

Shape suffixes: T tokens, V vocabulary, W columns of a tile, D hidden size, E rank of an adapter, N rows, M kept tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_probe.core.scaling import Buffer

_FEW_ROWS = 64  # of hidden states; before it multiplies few by many, a CPU's library puts the whole weight in order,
_STRIP = 1024  # so the weight is better taken a strip of its rows at a time, which stays in a core's cache
_PIECE = {"cpu": 1 << 18, "cuda": 1 << 24}  # numbers of a table of gathered hidden states


@dataclass(frozen=True, eq=False)
class Adapter:
    """A low-rank addition to the head's weight: `up @ down * scaling`."""

    down_ED: Tensor
    up_VE: Tensor
    scaling: float


@dataclass(frozen=True, eq=False)
class Head:
    """What turns hidden states into logits: `cap * tanh(scale * (weight @ h + bias) / cap)`.

    Attributes:
        weight_VD: tied to the embedding or not.
        bias_V: or None.
        scale: 1 where the architecture has none; what divides logits is its reciprocal here.
        softcap: the cap, or None.
        adapter: a LoRA on the head, or None.
        weight_grad_VD: gives, when backward comes, the table that the weight's gradient is added to; autograd hears of
            none for the weight. A new table of that size, filled with zeros and then added, takes a third of the
            head's time. None: there is a new table.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    adapter: Adapter | None = None
    weight_grad_VD: Callable[[], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Products:
    """Hidden states [T, D] with weights [V, D], one pair or more whose products add up, and what follows them."""

    hiddens: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    bias_V: Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, hidden_TD: Tensor, head: Head) -> "Products":
        """The head's products with hidden states; the adapter's inner states are formed here, with graph."""
        if head.adapter is None:
            return cls((hidden_TD,), (head.weight_VD,), head.bias_V, head.scale, head.softcap)
        inner_TE = torch.nn.functional.linear(hidden_TD, head.adapter.down_ED) * head.adapter.scaling
        weights = (head.weight_VD, head.adapter.up_VE)
        return cls((hidden_TD, inner_TE), weights, head.bias_V, head.scale, head.softcap)

    @classmethod
    def from_tensors(cls, head: Head, tensors: Sequence[Tensor]) -> "Products":
        """From what `tensors` gave."""
        pairs = len(tensors) // 2
        bias_V = tensors[-1] if len(tensors) % 2 else None
        return cls(tuple(tensors[:pairs]), tuple(tensors[pairs : 2 * pairs]), bias_V, head.scale, head.softcap)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Hiddens, weights, and the bias where there is one."""
        return (*self.hiddens, *self.weights, *(() if self.bias_V is None else (self.bias_V,)))

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and vocabulary."""
        return len(self.hiddens[0]), len(self.weights[0])

    def logits(self, rows: slice | Tensor, columns: slice, buffer: Buffer) -> Tensor:
        """Raw logits of some rows and columns [N, W], in the weights' dtype; kept until the next call."""
        hidden_ND, weight_WD = self.hiddens[0][rows], self.weights[0][columns]
        shape = (len(hidden_ND), len(weight_WD))
        logits_NW = buffer.table(shape, weight_WD.dtype, weight_WD.device)
        few = weight_WD.device.type == "cpu" and shape[0] <= _FEW_ROWS
        for start in range(0, shape[1], _STRIP if few else max(1, shape[1])):
            strip = slice(start, start + _STRIP if few else None)
            torch.mm(hidden_ND, weight_WD[strip].t(), out=logits_NW[:, strip])
        for hidden_TE, weight_VE in zip(self.hiddens[1:], self.weights[1:], strict=True):
            logits_NW.addmm_(hidden_TE[rows], weight_VE[columns].t())
        if self.bias_V is not None:
            logits_NW.add_(self.bias_V[columns])
        if self.scale != 1.0:
            logits_NW.mul_(self.scale)
        if self.softcap is not None:
            logits_NW.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NW

    def chain_(self, slope: Tensor, logits: Tensor) -> Tensor:
        """Turn the gradient by logits into that by the products, in place; both of one shape."""
        if self.softcap is not None:
            slope.mul_(1.0 - (logits / self.softcap).square_())
        return slope if self.scale == 1.0 else slope.mul_(self.scale)


class HeadGradient:
    """Gradients of a head's tensors, summed up in float32 or wider.

    Args:
        products: hidden states and weights.
        needed: which of `products.tensors` need a gradient.
        weight_grad_VD: as in `Head`.
    """

    def __init__(self, products: Products, needed: Sequence[bool], weight_grad_VD: Callable[[], Tensor] | None) -> None:
        self.products = products
        self._pairs = len(products.hiddens)
        self._lent = weight_grad_VD is not None and needed[self._pairs]
        self._sums: list[Tensor | None] = []
        for k, (tensor, need) in enumerate(zip(products.tensors, needed, strict=True)):
            if weight_grad_VD is not None and self._lent and k == self._pairs:
                self._sums.append(weight_grad_VD())
            else:
                self._sums.append(_zeros(tensor) if need else None)
        self.by_hidden, self.by_weight = self._sums[: self._pairs], self._sums[self._pairs : 2 * self._pairs]
        self.by_bias = self._sums[-1] if products.bias_V is not None else None

    def add_kept(self, row_M: Tensor, column_M: Tensor, slope_M: Tensor) -> None:
        """Add a gradient by products that is 0 everywhere but at these rows and columns, in any order."""
        row_M, order_M = row_M.sort(stable=True)
        column_M, slope_M = column_M[order_M], slope_M[order_M]
        every_T = torch.arange(self.products.shape[0], device=row_M.device)
        first_T = torch.searchsorted(row_M, every_T)
        for k, (hidden_TD, weight_VD) in enumerate(zip(self.products.hiddens, self.products.weights, strict=True)):
            by_hidden, by_weight = self.by_hidden[k], self.by_weight[k]
            if by_hidden is not None:
                weighted_TD = torch.nn.functional.embedding_bag(
                    column_M, weight_VD, first_T, mode="sum", per_sample_weights=slope_M.to(weight_VD.dtype)
                )
                by_hidden.add_(weighted_TD)
            if by_weight is not None:
                _add_outer(by_weight, column_M, hidden_TD, row_M, slope_M)
        if self.by_bias is not None:
            self.by_bias.index_add_(0, column_M, slope_M.to(self.by_bias.dtype))

    def add_tile(self, rows: slice | Tensor, columns: slice, slope_NW: Tensor) -> None:
        """Add a gradient by the products of some rows, each of which is here once, and columns."""
        for k, (hidden_TD, weight_VD) in enumerate(zip(self.products.hiddens, self.products.weights, strict=True)):
            by_hidden, by_weight = self.by_hidden[k], self.by_weight[k]
            narrow_NW = slope_NW.to(weight_VD.dtype)
            if by_hidden is not None:
                by_hidden[rows] += narrow_NW @ weight_VD[columns]
            if by_weight is not None and by_weight.dtype == hidden_TD.dtype:
                by_weight[columns].addmm_(narrow_NW.t(), hidden_TD[rows])
            elif by_weight is not None:
                by_weight[columns] += narrow_NW.t() @ hidden_TD[rows]
        if self.by_bias is not None:
            self.by_bias[columns] += slope_NW.sum(dim=0)

    def results(self) -> list[Tensor | None]:
        """Gradients in the tensors' dtypes; None where none is needed, or where it was added to what was given."""
        results = [
            None if total is None else total.to(tensor.dtype)
            for total, tensor in zip(self._sums, self.products.tensors, strict=True)
        ]
        if self._lent:
            results[self._pairs] = None
        return results


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device)


def _add_outer(sum_VD: Tensor, column_M: Tensor, hidden_TD: Tensor, row_M: Tensor, slope_M: Tensor) -> None:
    """Add `slope * hidden[row]` to the rows `column` of a sum, piece by piece."""
    size = max(1, _PIECE.get(hidden_TD.device.type, _PIECE["cuda"]) // hidden_TD.shape[-1])
    for start in range(0, len(column_M), size):
        piece = slice(start, start + size)
        outer_MD = hidden_TD[row_M[piece]].to(sum_VD.dtype).mul_(slope_M[piece].to(sum_VD.dtype).unsqueeze(-1))
        sum_VD.index_add_(0, column_M[piece], outer_MD)
