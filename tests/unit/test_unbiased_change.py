"""The change between two policies is unbiased to 1e-9 at any distance; the slips that bias it do so.

Two shards hold one use of a prompt each, with two responses of A and two of B. Each shard's baseline is fitted on the
other's record. The mean over all combinations of responses is compared with J(B) - J(A) by enumeration. The fit of a
shard depends on the other shard alone, and a baseline is linear in the coefficients, so the mean over both shards is a
product of two means.
"""

import copy
import functools
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from support.enumeration import enumerate_policy, oracle_policy
from support.models import processor, tiny_gpt2

from ray_probe.core.columns import recommended
from ray_probe.core.estimator.baselines import BaselineRule
from ray_probe.core.estimator.change import ENTROPY, LENGTH, ComparedResponse
from ray_probe.core.estimator.change_sums import ROW, ChangeSums
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.records import Record, bin_of, column_bin_of, position_bins
from ray_probe.model.sequences import pack_sequences
from ray_probe.rollout.comparison import ComparedResponses, compared
from ray_probe.sequence_processor import SequenceProcessor

CAP, VOCABULARY, TEMPERATURE, PAIRS = 2, 3, 1.3, 2
COLUMNS = recommended(2 * PAIRS)
RULE = BaselineRule("regression", "leave_one_out", 1e-3, 0.9, COLUMNS, CAP, targets=2)
PROMPT, OTHER_PROMPT = (1, 2), (2, 2, 1)
TOLERANCE = 1e-9
SEEDS = (0, 2)


@functools.cache
def model_of(seed: int, ends_at_once: bool = False):
    model = tiny_gpt2(VOCABULARY, seed=seed)
    if ends_at_once:
        with torch.no_grad():
            model.transformer.ln_f.bias.copy_(60.0 * torch.nn.functional.normalize(model.lm_head.weight[0], dim=0))
    return model


class Policies:
    """Two policies on one prompt: all responses of each, and all uses with two pairs, with exact weights."""

    def __init__(
        self, models: Sequence, prompt: Sequence[int], top_p: float, policies: int = 2, every: int = 1
    ) -> None:
        policy = {
            "top_p": top_p, "temperature": TEMPERATURE, "max_new_tokens": CAP, "tf_batch_size": 4096,
            "tf_batch_tokens": 1 << 20,
        }  # fmt: skip
        self.processors = tuple(processor(model, "ab", features=COLUMNS, **policy) for model in models)
        self.exact = [enumerate_policy(model, prompt, CAP, TEMPERATURE, top_p) for model in models]
        a, b = (dict(zip(one.responses, one.probabilities, strict=True)) for one in self.exact)
        uses = [(*first, *second) for first in product(a, repeat=PAIRS) for second in product(b, repeat=PAIRS)]
        self.uses = uses[::every]
        self.weights = np.array(
            [np.prod([(a if g < PAIRS else b)[y] for g, y in enumerate(use)]) for use in self.uses]
        )
        self.prompt = prompt
        self.found = scored(self.processors, prompt, self.uses, policies)

    @property
    def change(self) -> float:
        return self.exact[1].entropy - self.exact[0].entropy

    @property
    def length_change(self) -> float:
        lengths = [np.dot(one.probabilities, [len(y) for y in one.responses]) for one in self.exact]
        return lengths[1] - lengths[0]

    @functools.cached_property
    def records(self) -> list[Record]:
        uses = zip(self.found.responses, self.found.columns, strict=True)
        return [ComparedResponses([row], [columns]).record(np.array([0]), CAP) for row, columns in uses]

    def means(self, target: int) -> tuple[float, np.ndarray, np.ndarray]:
        """The mean without a baseline, and the means of the steps by column and by position bin."""
        value, by_column, by_bin = 0.0, np.zeros(len(RULE.recorded)), np.zeros(RULE.shape.column_bins)
        for weight, responses, columns in zip(self.weights, self.found.responses, self.found.columns, strict=True):
            for response, phi_TD in zip(responses, columns, strict=True):
                share, steps_T = weight / (2 * PAIRS), response.weight_step_T
                pathwise = response.pathwise_T.sum() if target == ENTROPY else 0.0
                value += share * (pathwise + steps_T @ response.target_TK[:, target])
                by_column += share * (steps_T @ phi_TD)
                bins_T = column_bin_of(bin_of(np.arange(response.length), CAP), position_bins(CAP))
                by_bin += share * np.bincount(bins_T, steps_T, len(by_bin))
        return value, by_column, by_bin

    @functools.cached_property
    def mean_fits(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each target, the mean over all uses of the coefficients fitted on them, another shard left out."""
        empty, own = PublishedFit.empty(RULE, "toy"), self.records[0]
        found = [(np.zeros(len(RULE.recorded)), np.zeros(RULE.shape.column_bins)) for _ in range(RULE.targets)]
        for record, weight in zip(self.records, self.weights, strict=True):
            published = empty.after_round(own + record)
            for target, (beta, column) in enumerate(found):
                baseline = published.for_shard(own, target)
                beta += weight * baseline.beta_E[:-1]
                column += weight * baseline.beta_E[-1] * baseline.column_C
        return found


@functools.cache
def policies_of(top_p: float, prompt: tuple[int, ...] = PROMPT, ends_at_once: bool = False) -> Policies:
    return Policies([model_of(seed, ends_at_once) for seed in SEEDS], prompt, top_p)


def scored(
    processors: tuple[SequenceProcessor, SequenceProcessor], prompt: Sequence[int], uses: Sequence, policies: int = 2
) -> ComparedResponses:
    found = compared(processors, pack_sequences([prompt] * len(uses), [list(use) for use in uses]))
    if policies == 2:
        return found
    columns = processors[0].columns  # the slip: all other responses, the own pair's included
    made = iter(columns.from_entropies([[one.mean_entropy_T for one in row] for row in found.responses], 1))
    places = [columns.names.index(name) for name in columns.of_entropies]
    for row in found.columns:
        for phi_TD in row:
            phi_TD[:, places] = next(made)
    return found


def expectation(policies: Policies, others: Policies, target: int = ENTROPY) -> float:
    value, by_column, by_bin = policies.means(target)
    beta, column = others.mean_fits[target]
    return value - by_column @ beta - by_bin @ column


def mass_outside(policies: Policies) -> float:
    """The share of B's responses that A cannot sample."""
    possible = set(policies.exact[0].responses)
    pairs = zip(policies.exact[1].responses, policies.exact[1].probabilities, strict=True)
    return sum(probability for response, probability in pairs if response not in possible)


@pytest.mark.parametrize("target", [ENTROPY, LENGTH], ids=["entropy", "length"])
@pytest.mark.parametrize(
    ("top_p", "other_prompt"), [(1.0, PROMPT), (0.85, PROMPT), (0.85, OTHER_PROMPT)],
    ids=["whole vocabulary", "nuclei", "nuclei, another prompt"],
)  # fmt: skip
def test_the_mean_over_all_responses_is_the_change(top_p: float, other_prompt: tuple[int, ...], target: int):
    policies = policies_of(top_p)
    if top_p < 1:
        assert mass_outside(policies) > 0.1
    change = policies.change if target == ENTROPY else policies.length_change
    assert abs(change) > 1e-2
    mean = expectation(policies, policies_of(top_p, other_prompt), target)
    assert abs(mean - change) < TOLERANCE * max(1.0, abs(change))


def test_a_prompt_whose_responses_end_at_once_changes_by_nothing_and_biases_nothing():
    ended = policies_of(0.85, ends_at_once=True)
    assert {len(y) for one in ended.exact for y in one.responses} == {1}
    assert abs(expectation(ended, ended) - ended.change) < TOLERANCE
    assert (ended.records[0].tokens, ended.records[0].sequences) == (2 * PAIRS, 2 * PAIRS)


def test_control_the_plain_mean_over_siblings_is_biased():
    slip = Policies([model_of(seed) for seed in SEEDS], PROMPT, 0.85, policies=1)
    assert abs(expectation(slip, slip) - slip.change) > 1e-3 * abs(slip.change)


def test_control_a_baseline_that_reads_the_own_record_is_biased():
    policies = policies_of(0.85)
    mean = 0.0
    empty = PublishedFit.empty(RULE, "toy")
    for place, weight in enumerate(policies.weights):
        baseline = empty.after_round(policies.records[place]).for_shard(None)
        for response, phi_TD in zip(policies.found.responses[place], policies.found.columns[place], strict=True):
            mu_T = baseline.mu_hat("regression", np.arange(response.length), phi_TD)
            part_T = response.weight_step_T * (response.target_TK[:, ENTROPY] - mu_T)
            mean += weight * (response.pathwise_T.sum() + part_T.sum()) / (2 * PAIRS)
    assert abs(mean - policies.change) > 1e-3 * abs(policies.change)


def test_the_sums_hold_that_estimate_and_its_parts_add_up():
    policies = policies_of(0.85)
    baselines = [PublishedFit.empty(RULE, "toy").after_round(policies.records[7]).for_shard(None, k) for k in range(2)]
    for place in (0, 5, 40):
        responses, columns = policies.found.responses[place], policies.found.columns[place]
        mu_hats = [
            np.stack([one.mu_hat("regression", np.arange(len(phi)), phi) for one in baselines], axis=1)
            for phi in columns
        ]
        sums = ChangeSums.zero(CAP, VOCABULARY)
        sums.add_use(9, responses, mu_hats, CAP)
        steps = [one.weight_step_T[:, None] * (one.target_TK - mu) for one, mu in zip(responses, mu_hats, strict=True)]
        expected = [
            2.0 * PAIRS, sum(one.pathwise_T.sum() for one in responses), sum(step[:, ENTROPY].sum() for step in steps),
            sum(step[:, LENGTH].sum() for step in steps),
        ]  # fmt: skip
        row = sums.rows[9]
        np.testing.assert_allclose(row[:4], expected, rtol=1e-12, atol=1e-12)
        bins = len(sums.position_tokens_B)
        by_position, by_entropy = row[len(ROW) : len(ROW) + bins], row[len(ROW) + bins :]
        assert by_position.sum() == pytest.approx(expected[1] + expected[2], abs=1e-12)
        assert by_entropy.sum() == pytest.approx(expected[1] + expected[2], abs=1e-12)
        assert sums.tokens_2.sum() == sums.position_tokens_B.sum() == sums.cell_tokens_C.sum()


@pytest.mark.parametrize("top_p", [1.0, 0.85])
def test_equal_policies_change_by_exactly_nothing(top_p: float):
    model = model_of(SEEDS[0])
    same = Policies([model, copy.deepcopy(model)], PROMPT, top_p, every=29)
    for responses in same.found.responses:
        for one in responses:
            assert not one.pathwise_T.any() and not one.weight_step_T.any()


def test_swapping_the_policies_changes_the_sign_and_nothing_else():
    forth = policies_of(0.85)
    back = scored(forth.processors[::-1], PROMPT, [(*use[PAIRS:], *use[:PAIRS]) for use in forth.uses])
    for there, here in zip(forth.found.responses, back.responses, strict=True):
        swapped = (*here[PAIRS:], *here[:PAIRS])
        for one, other in zip(there, swapped, strict=True):
            np.testing.assert_array_equal(one.pathwise_T, -other.pathwise_T)
            np.testing.assert_array_equal(one.weight_step_T, -other.weight_step_T)
            np.testing.assert_array_equal(one.target_TK, other.target_TK)
    for there, here in zip(forth.found.columns, back.columns, strict=True):
        for phi, other in zip(there, (*here[PAIRS:], *here[:PAIRS]), strict=True):
            np.testing.assert_allclose(phi, other, rtol=1e-14, atol=1e-14)


def test_a_small_step_changes_the_entropy_by_the_gradient_along_it():
    first = model_of(SEEDS[0])
    generator = torch.Generator().manual_seed(1)
    step = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in first.parameters()]
    size = 1e-4

    def moved(scale: float):
        model = copy.deepcopy(first)
        with torch.no_grad():
            for parameter, direction in zip(model.parameters(), step, strict=True):
                parameter += scale * direction
        return model

    policies = Policies([moved(-size / 2), moved(size / 2)], PROMPT, 0.85)
    gradient = enumerate_policy(first, PROMPT, CAP, TEMPERATURE, 0.85).gradient
    along = float(gradient @ torch.cat([direction.flatten() for direction in step]))
    assert policies.means(ENTROPY)[0] / size == pytest.approx(along, rel=1e-6)


def test_a_token_outside_one_nucleus_alone_is_impossible_and_one_outside_both_is_kept():
    log_q = np.log(np.array([[0.5, 0.25], [0.25, 0.125]]))
    entropy = np.ones((2, 2))
    outside = np.array([[False, True], [True, True]])
    one = ComparedResponse.of(0, log_q, entropy, outside)
    assert one.impossible == 1 and np.isneginf(one.log_ratio_T).all()
    np.testing.assert_array_equal(one.weight_step_T, [-2.0, 0.0])
    both = ComparedResponse.of(0, log_q, entropy, np.array([[False, True], [False, True]]))
    assert both.impossible == 0
    np.testing.assert_allclose(both.log_ratio_T, [np.log(0.5), np.log(0.25)])
    own = ComparedResponse.of(1, log_q, entropy, np.array([[False, False], [False, True]]))
    assert own.impossible == 0, "outside its own sampler's nucleus alone: by rounding, so it stays"


def test_the_scores_are_those_of_the_oracle():
    policies = policies_of(0.85)
    for use, responses in list(zip(policies.uses, policies.found.responses, strict=True))[::37]:
        for y, one in zip(use, responses, strict=True):
            for side, model in enumerate(one_processor.model for one_processor in policies.processors):
                logits = model(input_ids=torch.tensor([[*PROMPT, *y]])).logits[0, len(PROMPT) - 1 : -1]
                steps = [oracle_policy(row, TEMPERATURE, 0.85) for row in logits]
                log_q = [log_q_V[token].item() for (log_q_V, _), token in zip(steps, y, strict=True)]
                np.testing.assert_allclose(one.log_q_ST[side], log_q, atol=1e-12)
                np.testing.assert_allclose(one.entropy_ST[side], [h.item() for _, h in steps], atol=1e-12)
