"""The nuclei that a forward pass keeps for backward.

A narrow nucleus keeps its tokens, a wide one a bit for each token of the vocabulary.

Shape suffixes: N some rows, K candidates, M kept tokens, V vocabulary, W columns of a tile, B bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_probe.core.policy.nucleus.candidates import Candidates

NARROW_SHARE = 16  # a nucleus is wide when it holds more than 1/16 of the vocabulary


@dataclass(frozen=True)
class KeptNuclei:
    """The nuclei of T rows.

    Attributes:
        row_M: int32, row of every kept token of the narrow nuclei, in any order.
        column_M: int32, the token.
        scaled_M: its scaled logit, nats.
        wide_N: int64, the rows with wide nuclei.
        bits_NB: uint8, whether the wide nuclei hold each token of the vocabulary, eight to a byte; no rows where the
            bits were not collected.
    """

    row_M: Tensor
    column_M: Tensor
    scaled_M: Tensor
    wide_N: Tensor
    bits_NB: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All attributes, in order."""
        return tuple(vars(self).values())

    def keep(self, rows: slice, columns: slice) -> Tensor | None:
        """Return whether tokens are kept in wide rows [N, W]; None without collected bits.

        Args:
            rows: places in `wide_N`.
            columns: tokens; the first is a multiple of 8.
        """
        if len(self.bits_NB) < len(self.wide_N):
            return None
        bytes_NB = self.bits_NB[rows, columns.start // 8 : (columns.stop + 7) // 8]
        shift_8 = torch.arange(8, dtype=torch.uint8, device=bytes_NB.device)
        bits_NW = (bytes_NB.unsqueeze(-1) >> shift_8).bitwise_and_(1).flatten(1)
        return bits_NW[:, : columns.stop - columns.start].bool()


class NucleusCollector:
    """Collects the nuclei of a forward pass.

    Args:
        vocabulary: V.
        device: of the rows.
        share: a nucleus is wide when it holds more than 1/share of the vocabulary.
        has_bits: collect the bits of wide nuclei; False: only their rows, for a caller that keeps the logits.
    """

    def __init__(self, vocabulary: int, device: torch.device, share: int = NARROW_SHARE, has_bits: bool = True) -> None:
        self.vocabulary = vocabulary
        self._share = share
        self._has_bits = has_bits
        empty = torch.empty(0, dtype=torch.int64, device=device)
        self._entries = [(empty.int(), empty.int(), empty.float())]
        self._wide = [(empty, empty.to(torch.uint8).view(0, -(-vocabulary // 8)))]

    def add(self, first: int, group: Candidates) -> None:
        """Add some rows of a chunk that starts at row `first`."""
        keep_NK, rows_N = group.mass_NK > 0, group.rows_N + first
        # With bits, only a row of the whole vocabulary can be wide, because other candidates would need a scatter.
        if group.columns_NK is None or not self._has_bits:
            wide_N = group.kept_N * self._share > self.vocabulary
            if wide_N.any():
                bits_NB = _packed(keep_NK[wide_N]) if self._has_bits else self._wide[0][1]
                self._wide.append((rows_N[wide_N], bits_NB))
                keep_NK &= ~wide_N.unsqueeze(-1)
        row_M, index_M = keep_NK.nonzero(as_tuple=True)
        column_M = index_M if group.columns_NK is None else group.columns_NK[row_M, index_M]
        scaled_M = group.scaled_NK[row_M, index_M].to(group.largest_N.dtype)
        self._entries.append((rows_N[row_M].int(), column_M.int(), scaled_M))

    def kept(self) -> KeptNuclei:
        """Return the nuclei of all groups."""
        entries = self._entries[1:] or self._entries  # the first is an empty one in float32
        row_M, column_M, scaled_M = (torch.cat(column) for column in zip(*entries, strict=True))
        wide_N, bits_NB = (torch.cat(column) for column in zip(*self._wide, strict=True))
        return KeptNuclei(row_M, column_M, scaled_M, wide_N, bits_NB)


def _packed(keep_NV: Tensor) -> Tensor:
    """Return flags packed eight to a byte [N, B], the first in the lowest bit."""
    missing = -keep_NV.shape[-1] % 8
    bits_NB8 = torch.unflatten(torch.nn.functional.pad(keep_NV, (0, missing)).byte(), -1, (-1, 8))
    weight_8 = (1 << torch.arange(8, device=keep_NV.device)).byte()
    return (bits_NB8 * weight_8).sum(dim=-1, dtype=torch.uint8)
