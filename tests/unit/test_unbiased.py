"""The estimator's mean over all responses is the gradient itself, to 1e-9; and the slips that break it do break it."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.enumeration import Enumerated, enumerate_policy, flat_gradient
from support.models import processor, tiny_gpt2

from ray_probe.core.baselines import MODES, BaselineRule, Mode, PublishedFit, ShardBaseline
from ray_probe.core.features import DEFAULT_FEATURES
from ray_probe.core.records import Record, position_bins
from ray_probe.core.variance import gradient_noise
from ray_probe.probe_components import ProbeComponents
from ray_probe.rollout import record_of_results
from ray_probe.sequences import pack_sequences

POLICIES = [(1.0, 0.7), (1.0, 1.3), (0.8, 0.7), (0.8, 1.3)]
TOLERANCE = 1e-9


class Toy:
    """A policy that can be enumerated, and the estimator on it."""

    def __init__(self, vocabulary: int, cap: int, top_p: float, temperature: float, estimator: str = "rb_residual"):
        self.cap = cap
        self.model = tiny_gpt2(vocabulary, seed=1)
        policy = {"top_p": top_p, "temperature": temperature, "max_new_tokens": cap}
        self.processor = processor(self.model, "abcdef"[: vocabulary - 1], **policy)
        self.components = ProbeComponents(self.processor, estimator)
        self.prompt = [1, 2]
        self.exact: Enumerated = enumerate_policy(self.model, self.prompt, cap, temperature, top_p)
        assert len(self.exact.responses) >= 3, "the nucleus must leave something to choose"

    def sequences(self, *responses: tuple[int, ...]):
        return pack_sequences([self.prompt], [list(responses)])

    def gradient(self, response: tuple[int, ...], baseline: ShardBaseline | None) -> torch.Tensor:
        self.components.accumulate_sum_X(self.sequences(response), baseline)
        return flat_gradient(self.model)

    def record(self, response: tuple[int, ...]) -> Record:
        results = self.processor.teacher_force_logprobs(
            self.sequences(response), compute_rb=True, return_baseline_features=True
        )
        return record_of_results(results, np.array([0]), self.components.estimator, self.cap)

    def expectation(self, estimate: Callable[[tuple[int, ...]], torch.Tensor]) -> torch.Tensor:
        pairs = zip(self.exact.responses, self.exact.probabilities, strict=True)
        return torch.stack([p * estimate(response) for response, p in pairs]).sum(dim=0)

    def bias(self, mean: torch.Tensor) -> float:
        return float((mean - self.exact.gradient).norm() / self.exact.gradient.norm())


def fixed_baseline(mode: Mode, cap: int) -> ShardBaseline:
    numbers = np.random.default_rng(3)
    beta_D, means_B = numbers.normal(size=len(DEFAULT_FEATURES)), numbers.normal(size=position_bins(cap))
    return ShardBaseline(mode, 0.7, means_B, beta_D, cap, True)


def pair_bias(toy: Toy, mode: Mode, fit: str) -> float:
    """Bias of the mean of two responses, each a shard of its own, over all pairs."""
    rule = BaselineRule(mode, fit, 1e-3, 0.9, DEFAULT_FEATURES, toy.cap)
    records = {response: toy.record(response) for response in toy.exact.responses}

    def estimate(first: tuple[int, ...]) -> torch.Tensor:
        def given(second: tuple[int, ...]) -> torch.Tensor:
            published = PublishedFit.empty(rule, "toy").after_round(records[first] + records[second])
            return toy.gradient(first, published.for_shard(records[first]))

        return toy.expectation(given)

    return toy.bias(toy.expectation(estimate))


@pytest.mark.parametrize(("top_p", "temperature"), POLICIES)
@pytest.mark.parametrize("estimator", ["rb_residual", "naive"])
def test_every_mode_with_a_fixed_baseline_is_unbiased(top_p: float, temperature: float, estimator: str):
    toy = Toy(4, 4, top_p, temperature, estimator)
    assert sum(toy.exact.probabilities) == pytest.approx(1.0, abs=1e-12)
    for mode in MODES:
        baseline = fixed_baseline(mode, 4)
        assert toy.bias(toy.expectation(lambda y, b=baseline: toy.gradient(y, b))) < TOLERANCE, mode
    assert toy.bias(toy.expectation(lambda y: toy.gradient(y, None))) < TOLERANCE


@pytest.mark.parametrize(("top_p", "temperature"), POLICIES)
@pytest.mark.parametrize("mode", ["constant", "residual_mu", "regression"])
def test_leaving_the_own_shard_out_is_unbiased_over_all_pairs(top_p: float, temperature: float, mode: Mode):
    assert pair_bias(Toy(3, 3, top_p, temperature), mode, "leave_one_out") < TOLERANCE


def test_naive_with_leave_one_out_is_unbiased_over_all_pairs():
    assert pair_bias(Toy(3, 3, 0.8, 1.3, "naive"), "regression", "leave_one_out") < TOLERANCE


@pytest.mark.parametrize("mode", ["constant", "residual_mu", "regression"])
def test_control_fitting_on_the_own_response_is_biased(mode: Mode):
    assert pair_bias(Toy(3, 3, 1.0, 1.3), mode, "in_sample") > 1e-2


def test_control_dividing_the_position_by_the_realised_length_is_biased():
    toy = Toy(4, 4, 1.0, 1.3)
    column = DEFAULT_FEATURES.index("pos_frac")
    baseline = fixed_baseline("regression", 4)

    def estimate(response: tuple[int, ...], realised: bool) -> torch.Tensor:
        results = toy.processor.teacher_force_logprobs(
            toy.sequences(response), with_grad=True, compute_rb=True, return_baseline_features=True
        )
        if realised:
            results.baseline_feats_torch[0][0][:, column] *= toy.cap / len(response)
        toy.components._build_X_loss_rb_residual(results, baseline).backward()
        return flat_gradient(toy.model)

    assert toy.bias(toy.expectation(lambda y: estimate(y, realised=False))) < TOLERANCE
    assert toy.bias(toy.expectation(lambda y: estimate(y, realised=True))) > 1e-2


@pytest.mark.parametrize("left_out", ["eos_only", "truncated"])
def test_control_leaving_responses_out_is_biased(left_out: str):
    toy = Toy(4, 4, 1.0, 1.3)
    dropped = {"eos_only": lambda y: len(y) == 1, "truncated": lambda y: y[-1] != 0}[left_out]
    pairs = list(zip(toy.exact.responses, toy.exact.probabilities, strict=True))
    kept = [(y, p) for y, p in pairs if not dropped(y)]
    share = sum(p for _, p in kept)
    mean = torch.stack([p / share * toy.gradient(y, None) for y, p in kept]).sum(dim=0)
    assert 0 < len(kept) < len(pairs)
    assert toy.bias(mean) > 1e-2


def test_control_the_pathwise_term_alone_is_not_the_gradient():
    toy = Toy(4, 4, 1.0, 1.3)
    score_alone = ProbeComponents(toy.processor, pathwise=False)

    def pathwise(response: tuple[int, ...]) -> torch.Tensor:
        score_alone.accumulate_sum_X(toy.sequences(response), None)
        return toy.gradient(response, None) - flat_gradient_after(toy, score_alone, response)

    assert toy.bias(toy.expectation(pathwise)) > 1e-1


def flat_gradient_after(toy: Toy, components: ProbeComponents, response: tuple[int, ...]) -> torch.Tensor:
    flat_gradient(toy.model)
    components.accumulate_sum_X(toy.sequences(response), None)
    return flat_gradient(toy.model)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 1, 1)])
def test_debiased_norm_and_covariance_trace_are_unbiased_over_all_shards(sizes: tuple[int, ...]):
    toy = Toy(3, 2, 1.0, 1.3)
    baseline = fixed_baseline("regression", 2)
    gradients = np.stack([toy.gradient(y, baseline).numpy() for y in toy.exact.responses])
    weights = np.array(toy.exact.probabilities)
    mean = weights @ gradients
    covariance_trace = float(weights @ ((gradients - mean) ** 2).sum(axis=1))
    norm_sq = trace = 0.0
    for index in np.ndindex(*[len(weights)] * sum(sizes)):
        parts = np.split(gradients[list(index)], np.cumsum(sizes)[:-1])
        sums = np.stack([part.sum(axis=0) for part in parts])
        noise = gradient_noise(float((sums.sum(axis=0) ** 2).sum()), (sums**2).sum(axis=1), np.array(sizes, float))
        probability = float(np.prod(weights[list(index)]))
        norm_sq += probability * noise.norm_sq_debiased
        trace += probability * noise.trace_cov
    assert norm_sq == pytest.approx(float(mean @ mean), rel=1e-9)
    assert trace == pytest.approx(covariance_trace, rel=1e-9)


def test_a_whole_leave_one_out_fit_is_refused_for_a_gradient():
    toy = Toy(3, 2, 1.0, 1.0)
    rule = BaselineRule("regression", "leave_one_out", 1e-3, 0.9, DEFAULT_FEATURES, 2)
    published = PublishedFit.empty(rule, "toy").after_round(toy.record((1, 0)))
    with pytest.raises(Exception, match="for_shard"):
        toy.components.accumulate_sum_X(toy.sequences((1, 0)), published)
    in_sample = dataclasses.replace(published, rule=dataclasses.replace(rule, fit="in_sample"))
    toy.components.accumulate_sum_X(toy.sequences((1, 0)), in_sample)
    assert flat_gradient(toy.model).norm() > 0
