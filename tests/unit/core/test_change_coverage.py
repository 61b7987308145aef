"""The interval of a change holds the truth as often as it says, from 32 prompts.

Two tabular policies read the prompt's kind, the position and the last token. On every other kind they also keep the
likely tokens alone, so each has responses that the other cannot give. J(B) - J(A) is exact, by dynamic programming.

Shape suffixes: K kinds of prompts, T positions, L last token, V tokens, R replicates, P prompts, F columns of a row.
"""

import dataclasses
import functools
import warnings
from typing import NamedTuple

import numpy as np
import pytest

from ray_probe.core.estimator.change import ComparedResponse
from ray_probe.core.estimator.change_sums import ROW, ChangeSums
from ray_probe.run.comparison.estimates import change_estimate

KINDS, CAP, TOKENS, EOS = 12, 4, 4, 0
PAIRS, REPLICATES = 2, 500
KEPT = 0.12
SIDES = (0, 1)


@functools.cache
def policies() -> tuple[np.ndarray, np.ndarray]:
    """Log q of A and of B [K, T, L, V]; the last token before the first is EOS."""
    numbers = np.random.default_rng(0)
    logits = numbers.normal(0.0, 1.0, (KINDS, CAP, TOKENS, TOKENS))
    logits[..., EOS] += np.linspace(-2.0, 1.0, KINDS)[:, None, None]  # kinds differ in length and entropy
    sharper = np.linspace(0.5, 2.0, KINDS)[:, None, None, None]
    moved = sharper * logits + numbers.normal(0.0, 0.7, logits.shape)
    return tuple(log_q_of(one) for one in (logits, moved))


def log_q_of(logits: np.ndarray) -> np.ndarray:
    q = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    q[::2] = np.where(q[::2] < KEPT, 0.0, q[::2])
    with np.errstate(divide="ignore"):
        return np.log(q / q.sum(axis=-1, keepdims=True))


def entropy_of(log_q: np.ndarray) -> np.ndarray:
    return -(np.exp(log_q) * np.where(np.isneginf(log_q), 0.0, log_q)).sum(axis=-1)


def exact_entropy(log_q: np.ndarray) -> np.ndarray:
    """J of each kind [K], by dynamic programming."""
    goes_on = np.exp(log_q)
    goes_on[..., EOS] = 0.0
    value = np.zeros((KINDS, TOKENS))
    for position in reversed(range(CAP)):
        value = entropy_of(log_q[:, position]) + np.einsum("klv,kv->kl", goes_on[:, position], value)
    return value[:, EOS]


def every_response(start: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    if len(start) == CAP or start[-1:] == (EOS,):
        return [start]
    return [found for token in range(TOKENS) for found in every_response((*start, token))]


class Response(NamedTuple):
    """A response to a kind of prompt."""

    log_q: np.ndarray
    entropy: np.ndarray

    def sampled_from(self, side: int) -> ComparedResponse:
        return ComparedResponse(side, self.log_q, self.entropy, np.zeros(self.log_q.shape, bool))


class Population:
    """All responses to all kinds, and a baseline from responses of its own."""

    def __init__(self) -> None:
        self.responses = [[self._scored(kind, y) for y in every_response()] for kind in range(KINDS)]
        log_p = [[one.log_q.sum(axis=1) for one in row] for row in self.responses]
        self.cumulative = np.cumsum(np.exp(log_p), axis=1)  # [K, responses, side]
        self.mu_hat_TK = self._means_by_position(np.random.default_rng(1))
        self.rows = np.array([
            [[self._row(one, side) for one in row] for row in self.responses] for side in SIDES
        ])  # fmt: skip

    def _scored(self, kind: int, y: tuple[int, ...]) -> Response:
        places = (kind, np.arange(len(y)), np.array((EOS, *y[:-1])))
        return Response(
            np.stack([log_q[(*places, np.array(y))] for log_q in policies()]),
            np.stack([entropy_of(log_q[places]) for log_q in policies()]),
        )

    def draw(self, numbers: np.random.Generator, kinds: np.ndarray, side: int) -> np.ndarray:
        """Numbers of responses that one side samples to each of the kinds [...]."""
        uniforms = numbers.random(kinds.shape)
        drawn = np.empty(kinds.shape, int)
        for kind in range(KINDS):
            drawn[kinds == kind] = np.searchsorted(self.cumulative[kind, :, side], uniforms[kinds == kind])
        return drawn

    def _means_by_position(self, numbers: np.random.Generator) -> np.ndarray:
        sums, counts = np.zeros((CAP, 2)), np.zeros((CAP, 1))
        for side in SIDES:
            kinds = numbers.integers(KINDS, size=200)
            for kind, place in zip(kinds, self.draw(numbers, kinds, side), strict=True):
                one = self.responses[kind][place].sampled_from(side)
                sums[: one.length] += one.target_TK
                counts[: one.length] += 1.0
        return sums / counts

    def _row(self, response: Response, side: int) -> np.ndarray:
        """What one response adds to its prompt's row."""
        if np.isneginf(response.log_q[side]).any():
            return np.full(self.width, np.nan)  # it cannot be sampled
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no scatter of the other side
            return self.row_of_use([response.sampled_from(side)] * 2) / 2.0

    @property
    def empty(self) -> ChangeSums:
        return ChangeSums.zero(CAP, TOKENS)

    @property
    def width(self) -> int:
        return len(ROW) + len(self.empty.position_tokens_B) + len(self.empty.cell_tokens_C)

    def row_of_use(self, responses: list[ComparedResponse]) -> np.ndarray:
        sums = self.empty
        sums.add_use(0, responses, [self.mu_hat_TK[: one.length] for one in responses], CAP)
        return sums.rows[0]

    def replicates(self, prompts: int) -> np.ndarray:
        """Rows [R, P, F] of prompts of random kinds, each with two pairs of responses."""
        numbers = np.random.default_rng(prompts)
        kinds = np.repeat(numbers.integers(KINDS, size=(REPLICATES, prompts, 1)), PAIRS, axis=2)
        return sum(self.rows[side][kinds, self.draw(numbers, kinds, side)].sum(axis=2) for side in SIDES)


@functools.cache
def population() -> Population:
    return Population()


@functools.cache
def truth() -> float:
    a, b = (exact_entropy(log_q).mean() for log_q in policies())
    return b - a


def test_the_policies_are_told_apart_and_their_responses_are_all_there():
    np.testing.assert_allclose(population().cumulative[:, -1], 1.0, atol=1e-12)
    p = np.diff(population().cumulative, axis=1, prepend=0.0)
    assert 0.01 < p[..., 1][p[..., 0] == 0.0].sum() / KINDS < 0.5, "A cannot give some of B's responses"
    by_kind = np.subtract(*(exact_entropy(log_q) for log_q in policies()))
    assert abs(truth()) > 0.1 and np.ptp(by_kind) > 0.5


def test_a_row_is_the_sum_over_its_responses():
    numbers = np.random.default_rng(2)
    for kind in range(4):
        kinds = np.full(PAIRS, kind)
        drawn = [(side, place) for side in SIDES for place in population().draw(numbers, kinds, side)]
        use = [population().responses[kind][place].sampled_from(side) for side, place in drawn]
        expected = sum(population().rows[side][kind, place] for side, place in drawn)
        np.testing.assert_allclose(population().row_of_use(use), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prompts", [32, 64, 128])
def test_the_interval_of_the_total_holds_the_truth_95_times_in_100(prompts: int):
    counted = dataclasses.replace(population().empty, tokens_2=np.ones(2), log_weight_2=np.zeros(2))
    values, covered = [], []
    for rows_PF in population().replicates(prompts):
        sums = dataclasses.replace(counted, rows=dict(enumerate(rows_PF)))
        total = change_estimate(sums, CAP, shares_baselines=False).total
        low, high = total.interval
        values.append(total.value)
        covered.append(low <= truth() <= high)
    assert 0.92 <= np.mean(covered) <= 0.98
    assert abs(np.mean(values) - truth()) < 4.0 * np.std(values, ddof=1) / np.sqrt(REPLICATES)
