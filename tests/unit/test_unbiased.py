"""The estimator's mean over all responses is the gradient itself, to 1e-9; and the slips that break it do break it."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from support.enumeration import Enumerated, enumerate_policy, flat_gradient
from support.models import processor, tiny_gpt2

from ray_probe.core.estimator.baselines import MODES, BaselineRule, Mode, ShardBaseline
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.records import Record, position_bins
from ray_probe.core.estimator.variance import gradient_noise
from ray_probe.core.policy.features import DEFAULT_FEATURES
from ray_probe.model.sequences import BatchedSequences, LogprobResults, pack_sequences
from ray_probe.probe_components import ProbeComponents
from ray_probe.rollout.shard_record import record_of_results

POLICIES = [(1.0, 0.7), (1.0, 1.3), (0.8, 0.7), (0.8, 1.3)]
TOLERANCE = 1e-9


class Toy:
    """A policy that can be enumerated, and the estimator on it: all its responses, scored with graph."""

    def __init__(self, vocabulary: int, cap: int, top_p: float, temperature: float, estimator: str = "rb_residual"):
        self.cap = cap
        self.model = tiny_gpt2(vocabulary, seed={3: 3, 4: 8}[vocabulary])  # nuclei of several tokens
        policy = {"top_p": top_p, "temperature": temperature, "max_new_tokens": cap, "tf_batch_size": 1000}
        self.processor = processor(self.model, "abcdef"[: vocabulary - 1], **policy)
        self.components = ProbeComponents(self.processor, estimator)
        self.prompt = [1, 2]
        self.exact: Enumerated = enumerate_policy(self.model, self.prompt, cap, temperature, top_p)
        assert len(self.exact.responses) >= 3, "the nucleus must leave something to choose"
        self.weights = dict(zip(self.exact.responses, self.exact.probabilities, strict=True))

    def sequences(self, *responses: tuple[int, ...]) -> BatchedSequences:
        return pack_sequences([self.prompt], [list(responses)])

    def score(self, with_grad: bool) -> dict[tuple[int, ...], LogprobResults]:
        """Each response's results, from one forward pass."""
        everything = self.processor.teacher_force_logprobs(
            self.sequences(*self.exact.responses), with_grad, compute_rb=True, return_baseline_features=True
        )
        columns = {name: value[0] for name, value in vars(everything).items() if value is not None}
        return {
            response: LogprobResults(**{name: [[column[g]]] for name, column in columns.items()})
            for g, response in enumerate(self.exact.responses)
        }

    def expected_gradient(self, baselines: dict[tuple[int, ...], list[tuple[float, Any]]]) -> torch.Tensor:
        """Gradient of the probability-weighted mean of loss_X; for each response, (probability, baseline) pairs."""
        results = self.score(with_grad=True)
        losses = [
            self.weights[response] * share * self.components._build_X_loss_rb_residual(results[response], baseline)
            for response, pairs in baselines.items()
            for share, baseline in pairs
        ]
        torch.stack(losses).sum().backward()
        return flat_gradient(self.model)

    def expected_under(self, baseline: ShardBaseline | None) -> torch.Tensor:
        return self.expected_gradient({response: [(1.0, baseline)] for response in self.exact.responses})

    def gradient(self, response: tuple[int, ...], baseline: ShardBaseline | None) -> torch.Tensor:
        flat_gradient(self.model)
        self.components.accumulate_sum_X(self.sequences(response), baseline)
        return flat_gradient(self.model)

    def records(self) -> dict[tuple[int, ...], Record]:
        return {
            response: record_of_results(results, np.array([0]), self.components.estimator, self.cap)
            for response, results in self.score(with_grad=False).items()
        }

    def bias(self, mean: torch.Tensor) -> float:
        return float((mean - self.exact.gradient).norm() / self.exact.gradient.norm())


def fixed_baseline(mode: Mode, cap: int) -> ShardBaseline:
    numbers = np.random.default_rng(3)
    beta_D, means_B = numbers.normal(size=len(DEFAULT_FEATURES)), numbers.normal(size=position_bins(cap))
    return ShardBaseline(mode, 0.7, means_B, beta_D, cap, True)


def pair_bias(toy: Toy, mode: Mode, fit: str) -> float:
    """Bias of the mean of two responses, each a shard of its own, over all pairs."""
    rule = BaselineRule(mode, fit, 1e-3, 0.9, DEFAULT_FEATURES, toy.cap)
    records, empty = toy.records(), PublishedFit.empty(rule, "toy")
    baselines = {
        first: [
            (toy.weights[second], empty.after_round(own + other).for_shard(own)) for second, other in records.items()
        ]
        for first, own in records.items()
    }
    return toy.bias(toy.expected_gradient(baselines))


@pytest.mark.parametrize(("top_p", "temperature"), POLICIES)
@pytest.mark.parametrize("estimator", ["rb_residual", "naive"])
def test_every_mode_with_a_fixed_baseline_is_unbiased(top_p: float, temperature: float, estimator: str):
    toy = Toy(4, 4, top_p, temperature, estimator)
    assert sum(toy.exact.probabilities) == pytest.approx(1.0, abs=1e-12)
    for mode in MODES:
        assert toy.bias(toy.expected_under(fixed_baseline(mode, 4))) < TOLERANCE, mode
    assert toy.bias(toy.expected_under(None)) < TOLERANCE


@pytest.mark.parametrize("estimator", ["rb_residual", "naive"])
def test_accumulate_sum_x_leaves_the_unbiased_gradient_response_by_response(estimator: str):
    toy = Toy(4, 3, 0.9, 1.3, estimator)
    baseline = fixed_baseline("regression", 3)
    mean = torch.stack([p * toy.gradient(y, baseline) for y, p in toy.weights.items()]).sum(dim=0)
    assert toy.bias(mean) < TOLERANCE


@pytest.mark.parametrize(("top_p", "temperature"), POLICIES)
@pytest.mark.parametrize("mode", ["constant", "residual_mu", "regression"])
def test_leaving_the_own_shard_out_is_unbiased_over_all_pairs(top_p: float, temperature: float, mode: Mode):
    assert pair_bias(Toy(3, 3, top_p, temperature), mode, "leave_one_out") < TOLERANCE


def test_naive_with_leave_one_out_is_unbiased_over_all_pairs():
    assert pair_bias(Toy(3, 3, 0.8, 1.3, "naive"), "regression", "leave_one_out") < TOLERANCE


@pytest.mark.parametrize("mode", ["constant", "residual_mu", "regression"])
def test_control_fitting_on_the_own_response_is_biased(mode: Mode):
    assert pair_bias(Toy(3, 3, 1.0, 1.3), mode, "in_sample") > 1e-2


@pytest.mark.parametrize(("realised", "holds"), [(False, True), (True, False)])
def test_control_dividing_the_position_by_the_realised_length_is_biased(realised: bool, holds: bool):
    toy = Toy(4, 4, 1.0, 1.3)
    column = DEFAULT_FEATURES.index("pos_frac")
    score = toy.score

    def realised_length(with_grad: bool) -> dict[tuple[int, ...], LogprobResults]:
        results = score(with_grad)
        for response, result in results.items():
            result.baseline_feats_torch[0][0][:, column] *= toy.cap / len(response)
        return results

    if realised:
        toy.score = realised_length
    bias = toy.bias(toy.expected_under(fixed_baseline("regression", 4)))
    assert bias < TOLERANCE if holds else bias > 1e-2


@pytest.mark.parametrize("left_out", ["eos_only", "truncated"])
def test_control_leaving_responses_out_is_biased(left_out: str):
    toy = Toy(4, 4, 1.0, 1.3)
    dropped = {"eos_only": lambda y: len(y) == 1, "truncated": lambda y: y[-1] != 0}[left_out]
    pairs = list(zip(toy.exact.responses, toy.exact.probabilities, strict=True))
    kept = [(y, p) for y, p in pairs if not dropped(y)]
    share = sum(p for _, p in kept)
    assert 0 < len(kept) < len(pairs)
    mean = toy.expected_gradient({y: [(1.0 / share, None)] for y, _ in kept})
    assert toy.bias(mean) > 1e-2


def test_control_the_pathwise_term_alone_is_not_the_gradient():
    toy = Toy(4, 4, 1.0, 1.3)
    whole = toy.expected_under(None)
    toy.components = ProbeComponents(toy.processor, pathwise=False)
    score_term = toy.expected_under(None)
    assert toy.bias(whole) < TOLERANCE
    assert toy.bias(whole - score_term) > 1e-1


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
    published = PublishedFit.empty(rule, "toy").after_round(toy.records()[(1, 0)])
    with pytest.raises(Exception, match="for_shard"):
        toy.components.accumulate_sum_X(toy.sequences((1, 0)), published)
    in_sample = dataclasses.replace(published, rule=dataclasses.replace(rule, fit="in_sample"))
    toy.components.accumulate_sum_X(toy.sequences((1, 0)), in_sample)
    assert flat_gradient(toy.model).norm() > 0
