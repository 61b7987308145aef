"""The accumulated gradient and sums equal those of the whole loss_X."""

import gc
from typing import Any

import numpy as np
import pytest
import torch
from support.enumeration import flat_gradient
from support.models import EOS, probe_config, processor, save_checkpoint, tiny_gpt2, tiny_llama
from support.runs import held_of, processor_of

from ray_probe.core.estimator.baselines import MODES, BaselineRule, Mode, ShardBaseline
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.records import position_bins
from ray_probe.core.policy.features import DEFAULT_FEATURES
from ray_probe.errors import ConfigError
from ray_probe.fitter.fitter import Fitter
from ray_probe.model.sequences import BatchedSequences, LogprobResults, pack_sequences
from ray_probe.probe_components import ProbeComponents
from ray_probe.rollout.builder import build_rollout
from ray_probe.rollout.shard_record import record_of_results
from ray_probe.run.preparation.plan import Plan

CAP = 5
CHARACTERS = "abcdef"
PROMPTS = [[1, 2, 3], [4], [5, 6]]
# Three prompts with two responses each: EOS alone, cut at the cap, ended at the cap, and shorter ones.
RESPONSES = [[[EOS], [1, 2, 3, 4, 5]], [[3, 3, 1, 2, EOS], [6, EOS]], [[2, 2, EOS], [5, 4, 3, 2, 1]]]
SEQUENCES = pack_sequences(PROMPTS, RESPONSES)
PAIRS = [(b, g) for b in range(3) for g in range(2)]


def components(estimator: str = "rb_residual", pathwise: bool = True, tf_batch_size: int = 4) -> ProbeComponents:
    policy = processor(
        tiny_gpt2(8, seed=3), CHARACTERS, top_p=0.95, max_new_tokens=CAP, tf_batch_size=tf_batch_size
    )  # fmt: skip
    return ProbeComponents(policy, estimator, pathwise)


def scored(parts: ProbeComponents, with_grad: bool = True, features: bool = True) -> LogprobResults:
    return parts.processor.teacher_force_logprobs(
        SEQUENCES, with_grad=with_grad, compute_rb=True, return_baseline_features=features
    )


def baseline(mode: Mode) -> ShardBaseline:
    numbers = np.random.default_rng(5)
    beta_D, means_B = numbers.normal(size=len(DEFAULT_FEATURES)), numbers.normal(size=position_bins(CAP))
    return ShardBaseline(mode, 1.7, means_B, beta_D, CAP, True)


def gradient_of(loss: torch.Tensor, parts: ProbeComponents) -> torch.Tensor:
    loss.backward()
    return flat_gradient(parts.processor.model)


def accumulated(parts: ProbeComponents, fit: ShardBaseline | None, sequences: BatchedSequences = SEQUENCES) -> Any:
    parts.accumulate_sum_X(sequences, fit)
    return flat_gradient(parts.processor.model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tf_batch_size", [1, 4, 6, 100])
def test_the_accumulated_gradient_is_that_of_the_whole_loss(mode: Mode, tf_batch_size: int):
    parts = components(tf_batch_size=tf_batch_size)
    loss = parts._build_X_loss_rb_residual(scored(parts), baseline(mode))
    assert loss.shape == () and loss.dtype == torch.float64
    whole = gradient_of(loss, parts)
    torch.testing.assert_close(accumulated(parts, baseline(mode)), whole, rtol=0, atol=1e-12 * float(whole.norm()))
    assert whole.norm() > 1


def test_the_gradient_is_added_to_what_grad_holds_already():
    parts = components()
    once = accumulated(parts, baseline("regression"))
    for parameter in parts.processor.model.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    torch.testing.assert_close(accumulated(parts, baseline("regression")), once + 0.25, rtol=0, atol=1e-12)
    parts.accumulate_sum_X(SEQUENCES, baseline("regression"))
    torch.testing.assert_close(accumulated(parts, baseline("regression")), 2 * once, rtol=1e-12, atol=1e-12)


def test_every_response_is_counted_under_its_prompt():
    parts = components()
    entropies = scored(parts).rb_entropies
    sums = parts.accumulate_sum_X(SEQUENCES, None)
    assert (sums.eos_only, sums.truncated, sums.sequences, sums.tokens) == (1, 2, 6, 21)
    np.testing.assert_array_equal(sums.prompt_rows_P3[:, 0], [2, 2, 2])
    np.testing.assert_array_equal(sums.prompt_rows_P3[:, 2], [6, 7, 8])
    expected = [sum(h.sum() for h in group) for group in entropies]
    np.testing.assert_allclose(sums.prompt_rows_P3[:, 1], expected, rtol=1e-12)
    sizes = [np.array([(h.sum(), len(h)) for h in group]) for group in entropies]
    squares = [((x[:, 0] ** 2).sum(), x.prod(axis=1).sum(), (x[:, 1] ** 2).sum()) for x in sizes]
    np.testing.assert_allclose(sums.prompt_squares_P3, squares, rtol=1e-12)


@pytest.mark.parametrize("estimator", ["rb_residual", "naive"])
@pytest.mark.parametrize("configured", MODES)
def test_advantage_sums_of_all_modes_are_those_of_a_direct_computation(estimator: str, configured: Mode):
    parts, fit = components(estimator), baseline(configured)
    results = scored(parts, with_grad=False)
    sums = parts.accumulate_sum_X(SEQUENCES, fit)
    assert set(sums.advantage) == set(MODES)
    advantages: dict[str, list[float]] = {mode: [] for mode in MODES}
    for b, g in PAIRS:
        entropy, surprisal = results.rb_entropies[b][g], results.entropies[b][g]
        features = results.baseline_feats_torch[b][g].numpy()
        for j in range(len(entropy)):
            returned = (entropy if estimator == "rb_residual" else surprisal)[j:].sum()
            bin_mean = fit.position_mean_B[j * len(fit.position_mean_B) // CAP]
            mu_hats = {"none": 0.0, "constant": 1.7, "residual_mu": bin_mean, "regression": features[j] @ fit.beta_E}
            for mode, mu_hat in mu_hats.items():
                advantages[mode].append(returned - (entropy[j] + mu_hat))
    for mode, values in advantages.items():
        np.testing.assert_allclose(sums.advantage[mode], [np.sum(values), np.sum(np.square(values))], rtol=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_sums_by_position_are_those_of_targets_and_baselines(mode: Mode):
    parts, fit = components(), baseline(mode)
    results = scored(parts, with_grad=False)
    sums = parts.accumulate_sum_X(SEQUENCES, fit)
    expected = np.zeros((3, CAP))
    for b, g in PAIRS:
        entropy = results.rb_entropies[b][g]
        mu_hat = fit.mu_hat(mode, np.arange(len(entropy)), results.baseline_feats_torch[b][g].numpy())
        for j in range(len(entropy)):
            expected[:, j] += (1, entropy[j + 1 :].sum(), mu_hat[j])
    np.testing.assert_allclose(
        [sums.bin_weight_B, sums.bin_target_B, sums.bin_mu_hat_B], expected, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_baseline_carries_no_gradient_and_is_entropy_plus_mu_hat(mode: Mode):
    parts, fit = components(), baseline(mode)
    results = scored(parts)
    for b, g in PAIRS:
        terms = parts.response_terms(results, b, g, fit)
        assert not terms.baseline_T.requires_grad and terms.baseline_T.dtype == torch.float64
        features = results.baseline_feats_torch[b][g]
        assert not features.requires_grad
        mu_hat = fit.mu_hat(mode, np.arange(len(features)), features.double().numpy())
        np.testing.assert_allclose(terms.baseline_T, results.rb_entropies[b][g] + mu_hat, rtol=1e-12)
        returned = np.cumsum(results.rb_entropies[b][g][::-1])[::-1]
        np.testing.assert_allclose(terms.advantage_T, returned - terms.baseline_T.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["none", "constant", "residual_mu"])
def test_asking_for_features_changes_no_gradient(mode: Mode):
    parts = components()
    with_features, without = (
        gradient_of(parts._build_X_loss_rb_residual(scored(parts, features=features), baseline(mode)), parts)
        for features in (True, False)
    )
    assert torch.equal(with_features, without)
    assert float(with_features.norm()) == float(without.norm()) > 0


def test_regression_without_features_is_refused():
    parts = components()
    with pytest.raises(ConfigError, match=r"^estimator\.baseline\.mode: got 'regression' .*return_baseline_features"):
        parts._build_X_loss_rb_residual(scored(parts, features=False), baseline("regression"))


def test_leaving_the_pathwise_term_out_leaves_out_exactly_that_term():
    whole, score = components(), components(pathwise=False)
    entropies = scored(whole).rb_entropies_torch
    pathwise = gradient_of(torch.cat([h for group in entropies for h in group]).sum(), whole)
    for mode in MODES:
        difference = accumulated(whole, baseline(mode)) - accumulated(score, baseline(mode))
        torch.testing.assert_close(difference, pathwise, rtol=0, atol=1e-11)
    assert pathwise.norm() > 0.1


def test_naive_has_no_pathwise_term():
    parts, fit = components("naive"), baseline("regression")
    results = scored(parts)
    terms = {(b, g): parts.response_terms(results, b, g, fit) for b, g in PAIRS}
    loss = sum((torch.from_numpy(terms[b, g].advantage_T) * results.logprobs[b][g]).sum() for b, g in PAIRS)
    expected = gradient_of(loss, parts)
    torch.testing.assert_close(accumulated(parts, fit), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("estimator", ["rb_residual", "naive"])
def test_no_baseline_is_mode_none(estimator: str):
    parts = components(estimator)
    sums = parts.accumulate_sum_X(SEQUENCES, None)
    bare = flat_gradient(parts.processor.model)
    assert set(sums.advantage) == {"none"}
    assert not sums.bin_mu_hat_B.any()
    torch.testing.assert_close(bare, accumulated(parts, baseline("none")), rtol=0, atol=1e-12)


def test_a_fit_of_other_rounds_is_taken_whole():
    parts = components()
    record = record_of_results(scored(parts, with_grad=False), np.arange(3), "rb_residual", CAP)
    for fit in ("in_sample", "lagged"):
        rule = BaselineRule("regression", fit, 1e-3, 0.9, DEFAULT_FEATURES, CAP)
        published = PublishedFit.empty(rule, "toy").after_round(record)
        expected = accumulated(parts, published.for_shard(None))
        parts.accumulate_sum_X(SEQUENCES, published)
        torch.testing.assert_close(flat_gradient(parts.processor.model), expected, rtol=0, atol=0)


def live_graphs() -> int:
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return sum(tensor.grad_fn is not None for tensor in tensors)


def test_no_graph_outlives_its_micro_batch():
    parts = components(tf_batch_size=1)
    before, live = live_graphs(), []
    parts.processor.on_progress = lambda tokens: live.append(live_graphs() - before)
    parts.accumulate_sum_X(SEQUENCES, baseline("regression"))
    assert len(live) == 6 and min(live) > 0
    assert max(live[1:]) == min(live[1:]), "what is alive at a micro-batch does not grow with those before it"
    assert live_graphs() == before


def test_gradients_of_bfloat16_weights_accumulate_in_float32():
    model = tiny_llama(8).to(torch.bfloat16)
    policy = processor(model, CHARACTERS, top_p=0.95, max_new_tokens=CAP, tf_batch_size=1)
    ProbeComponents(policy).accumulate_sum_X(SEQUENCES, baseline("regression"))
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_job_of_two_prompts_and_two_responses_fills_the_features_and_tells_four_modes_apart(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "checkpoint", tiny_llama(8), CHARACTERS)
    features = ["H", "top1", "pos_frac"]
    gradients, advantages = {}, {}
    for mode in MODES:
        config = probe_config(
            checkpoint,
            data={"prompts": ["abc", "f"]},
            batch={"prompts_per_round": 2, "responses_per_prompt": 2, "shard_prompts": 1, "rounds": 1},
            generation={"max_new_tokens": 8},
            estimator={"baseline": {"mode": mode, "features": features}},
        )
        rollout = build_rollout(config, checkpoint, "policy")
        fitter = Fitter(rollout._rule, "policy")
        shards = Plan(("abc", "f"), (0, 1), 0, 2, 2, 1, 1, True).round(0)
        for shard in shards:
            fitter.accept(rollout.collect(shard).delivery)
            sequences = held_of(rollout)[shard.key].sequences
            results = processor_of(rollout).teacher_force_logprobs(sequences, return_baseline_features=True)
            assert results.shape == (1, 2)
            for g, length in enumerate(sequences.gen_lens[0]):
                assert results.baseline_feats_torch[0][g].shape == (length, len(features))
        fit = fitter.close_round(0, [0, 1])
        sums = [rollout.accumulate(shard, fit).sums for shard in shards]
        gradients[mode] = rollout.bucket(0, rollout.layout.size)
        advantages[mode] = {name: sum(s.advantage[name][1] for s in sums) for name in MODES}
    for left, right in ((a, b) for a in MODES for b in MODES if a < b):
        distance = np.linalg.norm(gradients[left] - gradients[right])
        assert distance > 1e-3 * np.linalg.norm(gradients[left]), (left, right)
        assert advantages[left] == advantages[right], "every job reports all four modes"
        assert advantages[left][left] != advantages[left][right]
