"""The sums that a comparison's estimates are made of. numpy only.

They are additive over shards and rounds.

Shape suffixes: P prompts, F columns of a prompt's row, T tokens, B position bins, C cells of the token's entropy, K
targets.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.change import ENTROPY, LENGTH, SIDES, ComparedResponse
from ray_probe.core.estimator.parity import ParityStats
from ray_probe.core.estimator.part_sums import PartSums

ROW = ("responses", "pathwise", "visitation", "length", "entropy_a", "entropy_b", "tokens_a", "tokens_b")
"""Columns of a prompt's row; the changes by position and by the token's entropy follow, nats."""
WITHIN = ("pathwise", "visitation", "total", "length")
"""What the scatter within uses of a prompt is kept of."""
FIRST_POSITION = 4
ENTROPY_BINS = 64
CELLS = ENTROPY_BINS + 1
"""Cells of the token's entropy: one for exactly 0, then equal bins up to log of the vocabulary."""


VECTORS = (
    "within_4", "log_ratio_4", "tokens_2", "impossible_2", "truncated_2", "position_tokens_B", "cell_tokens_C",
)  # fmt: skip


def position_edges(cap: int) -> list[int]:
    """Return the edges of the position bins: 0, 4, 8, 16, ... to the cap, tokens."""
    edges = [0]
    while edges[-1] < cap:
        edges.append(min(cap, max(FIRST_POSITION, 2 * edges[-1])))
    return edges


def cell_width(vocabulary: int) -> float:
    """Return the width of a cell of the token's entropy, nats."""
    return math.log(max(vocabulary, 2)) / ENTROPY_BINS


def cell_of(entropy_T: Array, vocabulary: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the cell of each token's mean entropy [T]: 0 where there is no choice."""
    cell_T = np.minimum((entropy_T / cell_width(vocabulary)).astype(np.int64), ENTROPY_BINS - 1) + 1
    return np.where(entropy_T == 0.0, 0, cell_T)


@dataclass
class ChangeSums:
    """Sums over responses of both policies.

    Attributes:
        vocabulary: tokens of the vocabulary.
        rows: prompt id -> its row: `ROW`, then the change by position bin and by cell of the token's entropy.
        within_4: scatter of `WITHIN` within uses of a prompt, the sides apart.
        log_ratio_4: sums of -d over A's responses and of d over B's where finite, and numbers of infinite ones.
        js: sum over responses of the terms of the Jensen-Shannon divergence, nats.
        log_weight_2: log of the sums over A's responses of p_B / p_A and of its square.
        tokens_2: tokens sampled from each policy.
        impossible_2: of those, tokens that the other policy cannot sample.
        truncated_2: responses of each policy that were cut at the cap.
        position_tokens_B: tokens by position bin.
        cell_tokens_C: tokens by cell.
        parity: log q when sampled against log q when scored, of each policy.
        parts: products of the midpoint's gradient with the update; empty where they are not measured.
    """

    vocabulary: int
    rows: dict[int, Array] = field(default_factory=dict)
    within_4: Array = field(default_factory=lambda: np.zeros(len(WITHIN)))
    log_ratio_4: Array = field(default_factory=lambda: np.zeros(4))
    js: float = 0.0
    log_weight_2: Array = field(default_factory=lambda: np.full(2, -np.inf))
    tokens_2: Array = field(default_factory=lambda: np.zeros(2))
    impossible_2: Array = field(default_factory=lambda: np.zeros(2))
    truncated_2: Array = field(default_factory=lambda: np.zeros(2))
    position_tokens_B: Array = field(default_factory=lambda: np.zeros(0))
    cell_tokens_C: Array = field(default_factory=lambda: np.zeros(CELLS))
    parity: tuple[ParityStats, ParityStats] = field(default_factory=lambda: (ParityStats.zero(), ParityStats.zero()))
    parts: PartSums = field(default_factory=PartSums)

    def to_json(self) -> dict[str, object]:
        """Return the sums in plain JSON types; -inf is None."""
        weights = [value if math.isfinite(value) else None for value in self.log_weight_2.tolist()]
        vectors = {name: getattr(self, name).tolist() for name in VECTORS}
        rows = {str(prompt): row_F.tolist() for prompt, row_F in self.rows.items()}
        parity = [part.to_json() for part in self.parity]
        scalars = {"vocabulary": self.vocabulary, "js": self.js, "log_weight_2": weights}
        return {"rows": rows, "parity": parity, "parts": self.parts.to_json(), **scalars, **vectors}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned."""
        a, b = (ParityStats.from_json(part) for part in raw["parity"])
        return cls(
            vocabulary=raw["vocabulary"],
            rows={int(prompt): np.array(row) for prompt, row in raw["rows"].items()},
            js=raw["js"],
            log_weight_2=np.array([-np.inf if value is None else value for value in raw["log_weight_2"]]),
            parity=(a, b),
            parts=PartSums.from_json(raw["parts"]),
            **{name: np.array(raw[name], np.float64) for name in VECTORS},
        )

    @classmethod
    def zero(cls, cap: int, vocabulary: int) -> "ChangeSums":
        """Return the sums of no response."""
        return cls(vocabulary, position_tokens_B=np.zeros(len(position_edges(cap)) - 1))

    def __add__(self, other: "ChangeSums") -> "ChangeSums":
        rows = dict(self.rows)
        for prompt, row_F in other.rows.items():
            rows[prompt] = rows[prompt] + row_F if prompt in rows else row_F
        return ChangeSums(
            self.vocabulary,
            rows,
            self.within_4 + other.within_4,
            self.log_ratio_4 + other.log_ratio_4,
            self.js + other.js,
            np.logaddexp(self.log_weight_2, other.log_weight_2),
            self.tokens_2 + other.tokens_2,
            self.impossible_2 + other.impossible_2,
            self.truncated_2 + other.truncated_2,
            self.position_tokens_B + other.position_tokens_B,
            self.cell_tokens_C + other.cell_tokens_C,
            (self.parity[0] + other.parity[0], self.parity[1] + other.parity[1]),
            self.parts + other.parts,
        )

    def add_use(
        self, prompt: int, responses: Sequence[ComparedResponse], mu_hats: Sequence[Array], cap: int
    ) -> None:
        """Add the responses of one use of a prompt.

        Args:
            prompt: its id.
            responses: G responses, half of each policy.
            mu_hats: the baseline of each target at each token of each response [T, K].
            cap: max_new_tokens.
        """
        edges, bins = position_edges(cap), len(self.position_tokens_B)
        row_F = np.zeros(len(ROW) + bins + CELLS)
        values, sides = np.zeros((len(responses), len(WITHIN))), np.array([one.side for one in responses])
        for place, (response, mu_hat_TK) in enumerate(zip(responses, mu_hats, strict=True)):
            part_TK, pathwise_T = response.visitation_TK(mu_hat_TK), response.pathwise_T
            pathwise, visitation = pathwise_T.sum(), part_TK[:, ENTROPY].sum()
            values[place] = pathwise, visitation, pathwise + visitation, part_TK[:, LENGTH].sum()
            row_F[:4] += 1.0, pathwise, visitation, part_TK[:, LENGTH].sum()
            row_F[4 + response.side] += response.entropy_ST[response.side].sum()
            row_F[6 + response.side] += response.length
            change_T = pathwise_T + part_TK[:, ENTROPY]
            bin_T = np.searchsorted(edges, np.arange(response.length), side="right") - 1
            cell_T = cell_of(response.mean_entropy_T, self.vocabulary)
            row_F[len(ROW) : len(ROW) + bins] += np.bincount(bin_T, change_T, bins)
            row_F[len(ROW) + bins :] += np.bincount(cell_T, change_T, CELLS)
            self.position_tokens_B += np.bincount(bin_T, minlength=bins)
            self.cell_tokens_C += np.bincount(cell_T, minlength=CELLS)
            self._add_ratio(response)
        self.rows[prompt] = self.rows[prompt] + row_F if prompt in self.rows else row_F
        for side in range(len(SIDES)):
            own = values[sides == side]
            self.within_4 += ((own - own.mean(axis=0)) ** 2).sum(axis=0) * len(own) / (len(own) - 1)

    def _add_ratio(self, response: ComparedResponse) -> None:
        side, ratio = response.side, float(response.log_ratio_T[-1])
        own = ratio if side else -ratio  # log of the sampler's probability over the other's: never -inf
        self.log_ratio_4[side if math.isfinite(own) else 2 + side] += own if math.isfinite(own) else 1.0
        self.js += math.log(2.0) - float(np.logaddexp(0.0, -own))
        if side == 0:
            self.log_weight_2 = np.logaddexp(self.log_weight_2, [ratio, 2.0 * ratio])
        self.tokens_2[side] += response.length
        self.impossible_2[side] += response.impossible
