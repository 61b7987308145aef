"""Plan which responses are scored together, and collect their results.

A micro-batch has as many tokens as allowed, of responses of similar length, so that little is padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ray_probe.core.arrays import Array
from ray_probe.core.policy.token_scores import ScoredTokens
from ray_probe.core.policy.token_statistics import TokenStatistics
from ray_probe.model.sequences import LogprobResults

MOST_PADDING = 0.15
"""Largest share of padding in a micro-batch."""


def plan_micro_batches(lengths: Sequence[int], sequences: int, tokens: int) -> list[list[int]]:
    """Return the places of the responses of each micro-batch, longest first.

    A micro-batch is a rectangle: its number of responses times the longest of them. The next shorter response joins it
    within both limits and `MOST_PADDING`. A response longer than `tokens` is alone.

    Args:
        lengths: tokens of each response with its prompt.
        sequences: most responses in a micro-batch.
        tokens: most positions in a micro-batch, padding included.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    batches: list[list[int]] = []
    real = 0
    for place in order:
        width = lengths[batches[-1][0]] if batches else 0
        positions = width * (len(batches[-1]) + 1) if batches else 0
        fits = batches and len(batches[-1]) < sequences and positions <= tokens
        if fits and real + lengths[place] >= (1.0 - MOST_PADDING) * positions:
            batches[-1].append(place)
            real += lengths[place]
        else:
            batches.append([place])
            real = lengths[place]
    return batches


@dataclass(frozen=True)
class ScoredMicroBatch:
    """A micro-batch of scored responses.

    Attributes:
        places: of the responses in the whole batch, b * G + g, ascending.
        statistics: of each response, with or without graph.
        positions: of the micro-batch, prompts and padding included.
        cached: scores and nuclei for a later pass with graph; None: not cached.
    """

    places: list[int]
    statistics: list[TokenStatistics]
    positions: int
    cached: ScoredTokens | None = None

    @property
    def has_graph(self) -> bool:
        """Whether backward is possible."""
        return any(row.log_q_T.requires_grad for row in self.statistics)

    def without_graph(self) -> "ScoredMicroBatch":
        """Return a copy without graph and cache."""
        rows = [replace(row, log_q_T=row.log_q_T.detach(), entropy_T=row.entropy_T.detach()) for row in self.statistics]
        return ScoredMicroBatch(self.places, rows, self.positions)


def grouped(flat: list[Any], size: int) -> list[list[Any]]:
    """Split a flat list into lists of `size`: [b][g]."""
    return [flat[start : start + size] for start in range(0, len(flat), size)]


def to_float64(tensor: Tensor) -> Array:
    """Return a tensor's values as a float64 array on the CPU, detached."""
    values: Array = tensor.detach().cpu().double().numpy()
    return values


def entropies_of(parts: Sequence[ScoredMicroBatch], group: int) -> list[list[Array]]:
    """Return H of each token of all responses [b][g], float64 arrays [T], nats."""
    by_place = {p: row.entropy_T for part in parts for p, row in zip(part.places, part.statistics, strict=True)}
    return grouped([to_float64(by_place[place]) for place in sorted(by_place)], group)


def results_of(parts: Sequence[ScoredMicroBatch], group: int, with_grad: bool, compute_rb: bool) -> LogprobResults:
    """Return the results of all responses, in the order of the whole batch.

    Args:
        parts: the micro-batches.
        group: responses a prompt.
        with_grad: return entropies with graph too.
        compute_rb: return entropies.
    """
    by_place = {p: row for part in parts for p, row in zip(part.places, part.statistics, strict=True)}
    flat = [by_place[place] for place in sorted(by_place)]
    surprisal = [-to_float64(row.log_q_T) for row in flat]
    features = [row.features_TD for row in flat]
    return LogprobResults(
        logprobs=grouped([row.log_q_T for row in flat], group),
        entropies=grouped(surprisal, group),
        sequence_logprobs=grouped([-float(row.sum()) for row in surprisal], group),
        rb_entropies=grouped([to_float64(row.entropy_T) for row in flat], group) if compute_rb else None,
        rb_entropies_torch=grouped([row.entropy_T for row in flat], group) if compute_rb and with_grad else None,
        baseline_feats_torch=None if features[0] is None else grouped(features, group),
        outside_nucleus=grouped([row.outside_T.cpu().numpy() for row in flat], group),
    )
