"""The gradient by an LM head's hidden states, weights and bias.

Shape suffixes: T tokens, V vocabulary, W columns of a tile, D hidden size, N rows, M kept tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ray_probe.core.policy.lm_head import Head, split_tensors

OUTER_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # of a table of gathered hidden states


class HeadGradient:
    """Sums the gradients of a head's tensors in float32 or wider.

    Args:
        head: scale, softcap, and where the weight's gradient goes.
        tensors: see `Products`.
        needed: whether each of the tensors needs a gradient.
    """

    def __init__(self, head: Head, tensors: Sequence[Tensor], needed: Sequence[bool]) -> None:
        self._head, self._tensors = head, tensors
        self._hiddens, self._weights, _ = split_tensors(tensors)
        first_weight = len(self._hiddens)
        into_grad = head.accumulate_into_grad and needed[first_weight]
        self._returned = [
            _zeros(tensor) if need and not (into_grad and place == first_weight) else None
            for place, (tensor, need) in enumerate(zip(tensors, needed, strict=True))
        ]
        self._by_hidden, self._by_weight, self._by_bias = split_tensors(self._returned)
        if into_grad:
            self._by_weight[0] = _grad_of(head.weight_VD)

    def add_kept(self, row_M: Tensor, column_M: Tensor, grad_M: Tensor, logit_M: Tensor) -> None:
        """Add a gradient by logits that is 0 except at these tokens (row, column)."""
        row_M, order_M = row_M.sort(stable=True)
        column_M, grad_M = column_M[order_M], self._head.chain_(grad_M, logit_M)[order_M]
        every_T = torch.arange(len(self._hiddens[0]), device=row_M.device)
        first_T = torch.searchsorted(row_M, every_T)
        for k, (hidden_TD, weight_VD) in enumerate(zip(self._hiddens, self._weights, strict=True)):
            by_hidden, by_weight = self._by_hidden[k], self._by_weight[k]
            if by_hidden is not None:
                weighted_TD = torch.nn.functional.embedding_bag(
                    column_M, weight_VD, first_T, mode="sum", per_sample_weights=grad_M.to(weight_VD.dtype)
                )
                by_hidden.add_(weighted_TD)
            if by_weight is not None:
                _add_outer(by_weight, column_M, hidden_TD, row_M, grad_M)
        if self._by_bias is not None:
            self._by_bias.index_add_(0, column_M, grad_M.to(self._by_bias.dtype))

    def add_tile(self, rows: slice | Tensor, columns: slice, grad_NW: Tensor, logits_NW: Tensor) -> None:
        """Add a gradient by logits of rows that occur once; overwrites `grad_NW`."""
        grad_NW = self._head.chain_(grad_NW, logits_NW)
        for k, (hidden_TD, weight_VD) in enumerate(zip(self._hiddens, self._weights, strict=True)):
            by_hidden, by_weight = self._by_hidden[k], self._by_weight[k]
            narrow_NW = grad_NW.to(weight_VD.dtype)
            if by_hidden is not None:
                by_hidden[rows] += narrow_NW @ weight_VD[columns]
            if by_weight is not None and by_weight.dtype == hidden_TD.dtype:
                by_weight[columns].addmm_(narrow_NW.t(), hidden_TD[rows])
            elif by_weight is not None:
                by_weight[columns] += narrow_NW.t() @ hidden_TD[rows]
        if self._by_bias is not None:
            self._by_bias[columns] += grad_NW.sum(dim=0)

    def results(self) -> list[Tensor | None]:
        """Return the gradients in the tensors' dtypes; None if not needed or in `.grad`."""
        pairs = zip(self._returned, self._tensors, strict=True)
        return [None if x is None else x.to(tensor.dtype) for x, tensor in pairs]


def _grad_of(weight: Tensor) -> Tensor:
    """Return the weight's `.grad`; creates it if it is None."""
    # To fill a table of the weight's size with zeros and then add it takes a third of the head's time.
    assert weight.is_leaf, "only a leaf has a .grad to accumulate into"
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
    return weight.grad


def _zeros(tensor: Tensor) -> Tensor:
    """Return zeros of the tensor's shape in float32 or wider."""
    return torch.zeros(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device)


def _add_outer(sum_VD: Tensor, column_M: Tensor, hidden_TD: Tensor, row_M: Tensor, grad_M: Tensor) -> None:
    """Add `grad * hidden[row]` to the rows `column` of a sum, piece by piece."""
    size = max(1, OUTER_ELEMENTS.get(hidden_TD.device.type, OUTER_ELEMENTS["cuda"]) // hidden_TD.shape[-1])
    for start in range(0, len(column_M), size):
        piece = slice(start, start + size)
        outer_MD = hidden_TD[row_M[piece]].to(sum_VD.dtype).mul_(grad_M[piece].to(sum_VD.dtype).unsqueeze(-1))
        sum_VD.index_add_(0, column_M[piece], outer_MD)
