"""The section `change` of a result: known figures, sums that add up, errors by the delta method, JSON."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from ray_probe.core.estimator.change import ComparedResponse
from ray_probe.core.estimator.change_sums import ChangeSums, cell_of, position_edges
from ray_probe.core.estimator.intervals import t_quantile
from ray_probe.core.estimator.part_sums import PartSums
from ray_probe.run.comparison.change import Change, Figure
from ray_probe.run.comparison.estimates import change_estimate

CAP, VOCABULARY = 12, 32


def responses_of(generator: np.random.Generator, apart: float = 0.3) -> list[ComparedResponse]:
    """Four responses of one prompt, two of each policy."""
    found = []
    for side in (0, 0, 1, 1):
        length = int(generator.integers(1, CAP + 1))
        log_q = -generator.exponential(1.0, length)
        log_q_ST = np.stack([log_q, log_q + apart * generator.standard_normal(length)])
        entropy_ST = np.abs(generator.standard_normal((2, length))) * (generator.random(length) < 0.7)
        found.append(ComparedResponse.of(side, log_q_ST, entropy_ST, np.zeros((2, length), bool)))
    return found


def sums_of(prompts: int, uses: int = 1, apart: float = 0.3) -> ChangeSums:
    generator, sums = np.random.default_rng(5), ChangeSums.zero(CAP, VOCABULARY)
    for _ in range(uses):
        for prompt in range(prompts):
            responses = responses_of(generator, apart)
            mu_hats = [generator.standard_normal((one.length, 2)) for one in responses]
            sums.add_use(prompt, responses, mu_hats, CAP)
    return sums


def estimate(sums: ChangeSums, shares: bool = False) -> Change:
    return change_estimate(sums, CAP, shares, moved_share=0.5)


@pytest.mark.parametrize(("cap", "edges"), [(64, [0, 4, 8, 16, 32, 64]), (5, [0, 4, 5]), (2, [0, 2]), (4, [0, 4])])
def test_position_bins_double(cap: int, edges: list[int]):
    assert position_edges(cap) == edges


def test_tokens_without_a_choice_have_a_cell_of_their_own():
    width = math.log(VOCABULARY) / 64
    found = cell_of(np.array([0.0, 1e-12, 0.99 * width, 1.01 * width, math.log(VOCABULARY), 99.0]), VOCABULARY)
    assert found.tolist() == [0, 1, 1, 2, 64, 64]


def test_figures_of_one_response_a_side_and_prompt_are_those_by_hand():
    log_q, entropy = np.log([[0.5, 0.5], [0.25, 0.5]]), np.array([[1.0, 0.5], [0.8, 0.3]])
    pair = [ComparedResponse.of(side, log_q, entropy, np.zeros((2, 2), bool)) for side in (0, 0, 1, 1)]
    sums = ChangeSums.zero(CAP, VOCABULARY)
    for prompt in (3, 4):
        sums.add_use(prompt, pair, [np.zeros((2, 2))] * 4, CAP)
    found = estimate(sums)
    step = 2.0 * math.tanh(math.log(0.5) / 2.0)
    assert found.pathwise.value == pytest.approx(-0.4)
    assert found.visitation.value == pytest.approx(step * 0.4)
    assert found.total.value == pytest.approx(-0.4 + step * 0.4)
    assert found.length.change.value == pytest.approx(step * 1.0)
    assert found.entropy_a.value == pytest.approx(1.3 - found.total.value / 2)
    assert found.entropy_b.value == pytest.approx(1.3 + found.total.value / 2)
    assert found.entropy_b.value - found.entropy_a.value == pytest.approx(found.total.value)
    assert found.kl.ab == pytest.approx(math.log(2.0)) and found.kl.ba == pytest.approx(-math.log(2.0))
    assert found.effective_sample_share == pytest.approx(1.0)
    assert found.js == pytest.approx(math.log(2.0) - (math.log(1.5) + math.log(3.0)) / 2)
    assert (found.total.se, found.clusters, found.total.se_within) == (0.0, 2, 0.0)
    assert found.moved_share == 0.5


def test_the_parts_of_each_list_add_up_to_the_total():
    found = estimate(sums_of(60))
    for parts in (found.positions, found.token_entropy, found.prompts):
        assert sum(part.value for part in parts) == pytest.approx(found.total.value, abs=1e-12)
    assert found.pathwise.value + found.visitation.value == pytest.approx(found.total.value, abs=1e-12)
    tokens = sum(part.tokens for part in found.positions)
    assert tokens == sum(part.tokens for part in found.token_entropy) > 0
    assert (found.token_entropy[0].first, found.token_entropy[0].last) == (0.0, 0.0)
    fifths = [part.tokens for part in found.token_entropy[1:]]
    assert len(fifths) == 5 and max(fifths) < 0.35 * sum(fifths)
    named = [part for part in found.prompts if part.prompt is not None]
    assert len(named) == 20 and found.prompts[-1].prompt is None
    assert sum(part.responses for part in found.prompts) == 240


def test_errors_are_those_of_prompts_as_clusters_with_t_where_they_are_few():
    sums = sums_of(10)
    found, rows = estimate(sums), np.stack([sums.rows[prompt] for prompt in range(10)])
    totals = (rows[:, 1] + rows[:, 2]) / 4.0
    assert found.total.se == pytest.approx(totals.std(ddof=1) / math.sqrt(10))
    half = t_quantile(0.975, 9) * found.total.se
    assert found.total.interval == pytest.approx((found.total.value - half, found.total.value + half))


def test_the_error_per_token_is_that_of_a_jackknife():
    sums = sums_of(200)
    found = estimate(sums)
    left_out = []
    for prompt in range(200):
        rest = sums + ChangeSums.zero(CAP, VOCABULARY)
        del rest.rows[prompt]
        left_out.append(estimate(rest).per_token.change.value)
    jackknife = math.sqrt(199 / 200 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
    assert found.per_token.change.se == pytest.approx(jackknife, rel=0.02)
    assert found.per_token.change.value == pytest.approx(found.per_token.b.value - found.per_token.a.value)


def test_the_error_for_these_prompts_falls_with_uses_and_is_left_out_where_baselines_are_shared():
    once, often = estimate(sums_of(10)), estimate(sums_of(10, uses=9))
    assert often.pathwise.se_within == pytest.approx(once.pathwise.se_within / 3.0, rel=0.35)
    assert once.total.se_within is not None and once.visitation.se_within is not None
    shared = estimate(sums_of(10), shares=True)
    assert shared.total.se_within is shared.visitation.se_within is None
    assert shared.pathwise.se_within == once.pathwise.se_within


def test_one_prompt_has_no_error_and_an_infinite_divergence_is_null():
    sums = sums_of(1)
    assert estimate(sums).total.se is None and estimate(sums).total.interval is None
    log_q, entropy, outside = np.log(np.full((2, 1), 0.5)), np.ones((2, 1)), np.array([[False], [True]])
    far = [ComparedResponse.of(side, log_q, entropy, outside[[1, 0]] if side else outside) for side in (0, 0, 1, 1)]
    sums = ChangeSums.zero(CAP, VOCABULARY)
    sums.add_use(0, far, [np.zeros((1, 2))] * 4, CAP)
    found = estimate(sums)
    assert found.kl.ab is found.kl.ba is None and found.effective_sample_share == 0.0
    assert found.js == pytest.approx(math.log(2.0))
    assert (found.outside.a_of_b, found.outside.b_of_a) == (1.0, 1.0)


def test_sums_add_in_any_grouping_and_come_back_from_json():
    parts = [sums_of(5), sums_of(7), ChangeSums.zero(CAP, VOCABULARY)]
    left, right = (parts[0] + parts[1]) + parts[2], parts[0] + (parts[1] + parts[2])
    assert left.to_json() == right.to_json()
    read = ChangeSums.from_json(json.loads(json.dumps(left.to_json(), allow_nan=False)))
    assert read.to_json() == left.to_json()
    assert estimate(read) == estimate(left)
    empty = ChangeSums.zero(CAP, VOCABULARY)
    assert ChangeSums.from_json(json.loads(json.dumps(empty.to_json()))).to_json() == empty.to_json()


def test_the_section_comes_back_from_json():
    found = estimate(sums_of(20))
    assert Change.from_json(json.loads(json.dumps(found.to_json()))) == found


def with_parts(shards: int, product: float = -0.5) -> ChangeSums:
    """Sums with parts of two groups, in `shards` shards of four responses."""
    generator, sums = np.random.default_rng(3), sums_of(20)
    for _ in range(shards):
        part = PartSums(("embedding", "layer 0 q"), np.array([4.0]), product + generator.standard_normal((1, 2)))
        sums = sums + replace(ChangeSums.zero(CAP, VOCABULARY), parts=part)
    return sums


def test_parts_and_remainder_add_up_to_the_total_with_shards_as_clusters():
    sums = with_parts(9)
    found = change_estimate(sums, CAP, False, independent_shards=True)
    assert [part.group for part in found.parts] == ["embedding", "layer 0 q"]
    whole = sum(part.value for part in found.parts) + found.remainder.value
    assert whole == pytest.approx(found.total.value, abs=1e-12)
    product_SG = sums.parts.product_SG
    for place, part in enumerate(found.parts):
        by_shard = product_SG[:, place] / 4.0
        assert (part.value, part.se) == pytest.approx((by_shard.mean(), by_shard.std(ddof=1) / 3.0))
    of_parts = (product_SG.sum(axis=1) / 4.0).std(ddof=1) / 3.0
    assert found.remainder.se == pytest.approx(math.hypot(found.total.se, of_parts))
    assert Change.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_parts_of_few_or_dependent_shards_have_no_error_and_a_change_without_parts_has_none():
    for found in (change_estimate(with_parts(9), CAP, False), change_estimate(with_parts(1), CAP, False)):
        assert all(part.se is None and part.value is not None for part in found.parts) and len(found.parts) == 2
        assert found.remainder.se is None and found.remainder.value is not None
    plain = estimate(sums_of(20))
    assert plain.parts == () and plain.remainder == Figure()


def test_sums_of_parts_come_back_from_json():
    sums = with_parts(3)
    read = ChangeSums.from_json(json.loads(json.dumps(sums.to_json(), allow_nan=False)))
    assert read.to_json() == sums.to_json() and read.parts.groups == sums.parts.groups
    assert (read + sums).parts.responses_S.tolist() == [4.0] * 6
    empty = PartSums.from_json(json.loads(json.dumps(PartSums().to_json())))
    assert empty.groups == () and (empty + read.parts).to_json() == read.parts.to_json()


def test_far_ratios_do_not_overflow():
    found = estimate(sums_of(20, apart=400.0))
    assert all(math.isfinite(value) for value in (found.js, found.effective_sample_share, found.total.value))
    assert 0 <= found.effective_sample_share < 0.2
