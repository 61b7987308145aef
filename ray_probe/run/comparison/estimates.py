"""Builds the section `change` of a result from its sums.

Shape suffixes: F columns of a prompt's row, P prompts, C cells, S shards, G groups of parameters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self

import numpy as np

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.change_sums import ROW, WITHIN, ChangeSums, cell_width, position_edges
from ray_probe.core.estimator.intervals import NORMAL_PROMPTS, interval
from ray_probe.core.estimator.part_sums import PartSums
from ray_probe.core.estimator.variance import clustered_ratio
from ray_probe.run.comparison.change import (
    AtBoth,
    Change,
    ChangeFigure,
    ChangePart,
    Divergence,
    Figure,
    OutsideShares,
    PartChange,
    PromptChange,
    Shares,
)

FIFTHS = 5
MOST_PROMPTS = 10
"""Prompts listed each way."""


class PromptRows:
    """The rows of prompts, by column.

    Args:
        ids: the prompts, ascending.
        table_FP: a row of each [F, P]; the columns are the first F of `ROW`, or all and what follows them.
    """

    def __init__(self, ids: Sequence[int], table_FP: Array) -> None:
        self.ids = list(ids)
        self.table_FP = table_FP
        self.responses_P: Array = table_FP[0]

    @classmethod
    def of(cls, rows: Mapping[int, Array], columns: int | None = None) -> Self:
        """Return the rows of sums, ascending.

        Args:
            rows: by prompt.
            columns: how many of them are kept; None: all.
        """
        ids = sorted(rows)
        return cls(ids, np.stack([rows[prompt][:columns] for prompt in ids], axis=1))

    def only(self, prompts: Sequence[int]) -> Self:
        """Return the rows of these prompts, which are ascending and all there."""
        if list(prompts) == self.ids:
            return self
        return type(self)(prompts, self.table_FP[:, np.searchsorted(self.ids, prompts)])

    def __getitem__(self, name: str) -> Array:
        """Return a column of `ROW` [P]."""
        column: Array = self.table_FP[ROW.index(name)]
        return column

    @property
    def total_P(self) -> Array:
        """The whole change."""
        return self["pathwise"] + self["visitation"]

    @property
    def entropies_P(self) -> tuple[Array, Array]:
        """Entropy at A and at B: the mean of both, less and plus half of the change."""
        own_P = self["entropy_a"] + self["entropy_b"]
        return own_P - self.total_P / 2.0, own_P + self.total_P / 2.0

    def mean(self, column_P: Array) -> Figure:
        """Return the mean of a column over responses."""
        value, error = clustered_ratio(column_P, self.responses_P)
        return Figure(float(value), _finite(float(error)))


def change_estimate(
    sums: ChangeSums, cap: int, shares_baselines: bool, moved_share: float | None = None,
    independent_shards: bool = False,
) -> Change:  # fmt: skip
    """Return what a comparison found.

    Args:
        sums: of all responses.
        cap: max_new_tokens.
        shares_baselines: the baseline has columns of siblings, so responses of a prompt depend on each other.
        moved_share: share of the parameters that differ; None: not compared.
        independent_shards: shards are enough, and share no prompt, so parts have errors.
    """
    rows = PromptRows.of(sums.rows)
    responses, clusters = float(rows.responses_P.sum()), len(rows.ids)
    within = dict(zip(WITHIN, np.sqrt(sums.within_4) / responses, strict=True))

    def part(column_P: Array, name: str, shared: bool) -> ChangeFigure:
        found = rows.mean(column_P)
        bounds = interval(found.value, found.se, clusters, NORMAL_PROMPTS)
        return ChangeFigure(found.value, found.se, None if shared else float(within[name]), bounds)

    total_P, entropies_P = rows.total_P, rows.entropies_P
    tokens_P, length_P = rows["tokens_a"] + rows["tokens_b"], rows["length"]
    lengths_P = tokens_P - length_P / 2.0, tokens_P + length_P / 2.0
    halves, bins = np.full(2, responses / 2.0), len(sums.position_tokens_B)
    (ab, ba), infinite = sums.log_ratio_4[:2] / halves, sums.log_ratio_4[2:]
    outside = sums.impossible_2 / sums.tokens_2
    found = Change(
        total=part(total_P, "total", shares_baselines),
        pathwise=part(rows["pathwise"], "pathwise", shared=False),
        visitation=part(rows["visitation"], "visitation", shares_baselines),
        entropy_a=rows.mean(entropies_P[0]),
        entropy_b=rows.mean(entropies_P[1]),
        per_token=_per_token(entropies_P, lengths_P),
        length=AtBoth(rows.mean(lengths_P[0]), rows.mean(lengths_P[1]), rows.mean(length_P)),
        truncated=Shares(*(sums.truncated_2 / halves).tolist()),
        js=sums.js / responses,
        kl=Divergence(None if infinite[0] else float(ab), None if infinite[1] else float(ba)),
        effective_sample_share=_sample_share(sums, float(halves[0])),
        outside=OutsideShares(float(outside[0]), float(outside[1])),
        moved_share=moved_share,
        clusters=clusters,
        positions=_by_position(rows, sums, cap),
        token_entropy=_by_entropy(rows, sums, len(ROW) + bins),
        prompts=_by_prompt(rows, total_P, responses),
    )
    return _with_parts(found, sums.parts, independent_shards)


def _sample_share(sums: ChangeSums, responses: float) -> float:
    """Return (sum of w)^2 / (responses x sum of w^2).

    It is 0 where B can give none of A's responses.
    """
    weight, square = sums.log_weight_2.tolist()
    return math.exp(2.0 * weight - square) / responses if math.isfinite(square) else 0.0


def _per_token(entropies_P: tuple[Array, Array], lengths_P: tuple[Array, Array]) -> AtBoth:
    """Return the ratios at A and at B and their difference, by the delta method."""
    found, influences = [], []
    for entropy_P, length_P in zip(entropies_P, lengths_P, strict=True):
        value, error = clustered_ratio(entropy_P, length_P)
        found.append(Figure(float(value), _finite(float(error))))
        influences.append((entropy_P - value * length_P) / length_P.sum())
    clusters = len(entropies_P[0])
    spread_P = influences[1] - influences[0]
    change_se = math.sqrt(float((spread_P**2).sum()) * clusters / (clusters - 1)) if clusters > 1 else None
    a, b = found
    assert a.value is not None and b.value is not None
    return AtBoth(a, b, Figure(b.value - a.value, change_se))


def _by_position(rows: PromptRows, sums: ChangeSums, cap: int) -> tuple[ChangePart, ...]:
    edges, parts = position_edges(cap), []
    for place, tokens in enumerate(sums.position_tokens_B.tolist()):
        found = rows.mean(rows.table_FP[len(ROW) + place])
        parts.append(ChangePart(edges[place], edges[place + 1], tokens, found.value, found.se))
    return tuple(parts)


def _by_entropy(rows: PromptRows, sums: ChangeSums, first: int) -> tuple[ChangePart, ...]:
    """Return the tokens without a choice, then fifths of the others by entropy."""
    width = cell_width(sums.vocabulary)
    tokens_C = sums.cell_tokens_C
    parts = [(0, 1, 0.0, 0.0)]
    for start, stop in _fifths(tokens_C[1:]):
        parts.append((1 + start, 1 + stop, start * width, stop * width))
    found = []
    for start, stop, low, high in parts:
        mean = rows.mean(rows.table_FP[first + start : first + stop].sum(axis=0))
        found.append(ChangePart(low, high, float(tokens_C[start:stop].sum()), mean.value, mean.se))
    return tuple(found)


def _fifths(tokens_C: Array) -> list[tuple[int, int]]:
    """Return ranges of cells that hold about a fifth of the tokens each.

    They are fewer where one cell holds more.
    """
    reached_C = np.cumsum(tokens_C)
    if not reached_C[-1]:
        return [(0, len(tokens_C))]
    ends = [int(np.searchsorted(reached_C, reached_C[-1] * share / FIFTHS)) + 1 for share in range(1, FIFTHS)]
    stops = sorted({*ends, len(tokens_C)})
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _by_prompt(rows: PromptRows, total_P: Array, responses: float) -> tuple[PromptChange, ...]:
    """Return the prompts with the largest parts each way, and the rest as one."""
    order = np.argsort(total_P, kind="stable").tolist()
    lowest, highest = order[:MOST_PROMPTS], order[MOST_PROMPTS:][-MOST_PROMPTS:]
    listed = [*(place for place in lowest if total_P[place] < 0), *(place for place in highest if total_P[place] > 0)]
    found = [
        PromptChange(rows.ids[place], int(rows.responses_P[place]), float(total_P[place]) / responses)
        for place in listed
    ]
    rest = sorted(set(order) - set(listed))
    if rest:
        found.append(PromptChange(None, int(rows.responses_P[rest].sum()), float(total_P[rest].sum()) / responses))
    return tuple(found)


def _with_parts(change: Change, sums: PartSums, independent: bool) -> Change:
    """Return a change with its parts by group of parameters and the remainder."""
    total = change.total
    if not sums.groups or total.value is None:
        return change
    values_GS = np.vstack([sums.product_SG.T, sums.product_SG.sum(axis=1)])
    found, errors = clustered_ratio(values_GS, np.broadcast_to(sums.responses_S, values_GS.shape))
    se = [_finite(float(error)) if independent else None for error in errors]
    figures = [Figure(float(value), error) for value, error in zip(found, se, strict=True)]
    parts = tuple(PartChange(group, one.value, one.se) for group, one in zip(sums.groups, figures[:-1], strict=True))
    error = None if se[-1] is None or total.se is None else math.hypot(total.se, se[-1])
    return replace(change, parts=parts, remainder=Figure(total.value - float(found[-1]), error))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
