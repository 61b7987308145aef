"""Padding, cache and batch change neither tokens nor scores of a response."""

import numpy as np
import pytest
import torch
from support.models import ARCHITECTURES, EOS, processor, tiny_gpt2, tiny_model
from support.policies import (
    CHARACTERS,
    PAIRS,
    PROMPTS,
    SEEDS,
    VOCABULARY,
    WHOLE_VOCABULARY,
    policy,
    responses,
    sampled,
    scored,
)

from ray_probe.core.policy.features import DEFAULT_FEATURES
from ray_probe.model.sequences import BatchedSequences, pack_sequences


def alone(sequences: BatchedSequences, b: int, g: int) -> BatchedSequences:
    prompt, response = sequences.tokens(b, g)
    return pack_sequences([prompt.tolist()], [[response.tolist()]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_response_alone_and_in_a_padded_batch_scores_the_same(architecture: str):
    sequences = sampled(architecture)
    together = scored(policy(architecture), sequences, tf_batch_size=len(PAIRS))
    for b, g in PAIRS:
        single = scored(policy(architecture), alone(sequences, b, g))
        for name in ("logprobs", "rb_entropies", "baseline_feats_torch"):
            numbers = [np.asarray(getattr(result, name)[i][j]) for result, i, j in ((together, b, g), (single, 0, 0))]
            np.testing.assert_allclose(*numbers, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scoring_agrees_with_the_plain_model_on_unpadded_tokens(architecture: str):
    sequences, model = sampled(architecture), policy(architecture).model
    results = scored(policy(architecture), sequences)
    for b, g in PAIRS:
        prompt, response = sequences.tokens(b, g)
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        exact = logits.double().log_softmax(-1)
        picked = exact.gather(-1, response[:, None])[:, 0]
        np.testing.assert_allclose(results.logprobs[b][g], picked, rtol=0, atol=1e-4)
        np.testing.assert_allclose(results.rb_entropies[b][g], -(exact.exp() * exact).sum(-1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_q_when_sampled_is_log_q_when_scored(architecture: str):
    sequences = sampled(architecture)
    results = scored(policy(architecture), sequences)
    for b, g in PAIRS:
        np.testing.assert_allclose(sequences.sample_logprobs[b][g], results.logprobs[b][g], rtol=0, atol=1e-4)
        assert not results.outside_nucleus[b][g].any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_when_sampled_are_features_when_scored_also_after_rows_have_ended(architecture: str):
    sequences = policy(architecture).generate(PROMPTS, 3, SEEDS, return_baseline_features=True)
    assert len({length for group in sequences.gen_lens for length in group}) > 1, "rows end one after the other"
    results = scored(policy(architecture), sequences)
    for b, g in PAIRS:
        features_TD = sequences.sample_features[b][g]
        assert features_TD.shape == (sequences.gen_lens[b][g], len(DEFAULT_FEATURES))
        np.testing.assert_allclose(features_TD, results.baseline_feats_torch[b][g], rtol=0, atol=1e-4)
    plain = sampled(architecture)
    assert plain.sample_features is None and responses(plain) == responses(sequences)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_belong_to_the_seed_and_not_to_the_batch(architecture: str):
    sequences = sampled(architecture)
    for b, g in PAIRS:
        single = policy(architecture).generate([PROMPTS[b]], 1, [[SEEDS[b][g]]])
        assert responses(single) == [sequences.tokens(b, g)[1].tolist()]


@pytest.mark.parametrize("gen_batch_size", [1, 2, 4])
def test_the_generation_batch_size_changes_no_token(gen_batch_size: int):
    smaller = processor(tiny_model("llama", VOCABULARY), CHARACTERS, gen_batch_size=gen_batch_size, **WHOLE_VOCABULARY)
    assert responses(smaller.generate(PROMPTS, 3, SEEDS)) == responses(sampled("llama"))


def test_different_seeds_give_different_responses():
    assert len({tuple(response) for response in responses(sampled("llama"))}) > 5


def test_the_micro_batch_size_changes_no_score():
    model = tiny_gpt2(VOCABULARY, positions=64)
    policy = processor(model, CHARACTERS, top_p=0.9, max_new_tokens=16)
    sequences = policy.generate(PROMPTS, 3, SEEDS)
    reference = scored(policy, sequences, tf_batch_size=9)
    for size in (1, 2, 5):
        results = scored(policy, sequences, tf_batch_size=size)
        for b, g in PAIRS:
            np.testing.assert_allclose(results.entropies[b][g], reference.entropies[b][g], rtol=0, atol=1e-6)
            np.testing.assert_allclose(results.rb_entropies[b][g], reference.rb_entropies[b][g], rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_of_a_prefix_do_not_move_when_the_rest_of_the_response_does(architecture: str):
    prompt, response = [3, 4, 5], [6, 7, 8, 9, 10, 11, 12, EOS]
    (features,) = scored(policy(architecture), pack_sequences([prompt], [[response]])).baseline_feats_torch[0]
    for kept in (0, 1, 4):
        others = ([*response[:kept], *[20] * (8 - kept)], [*response[:kept], EOS], [*response[:kept], *[21] * 12])
        for other in others:
            (moved,) = scored(policy(architecture), pack_sequences([prompt], [[other]])).baseline_feats_torch[0]
            rounding = 0.0 if len(other) == len(response) else 1e-5  # the same shapes give the same bits
            torch.testing.assert_close(moved[: kept + 1], features[: kept + 1], rtol=rounding, atol=rounding)
            if len(other) > kept + 1:
                assert not torch.equal(moved[kept + 1], features[kept + 1]), "the token that was changed is seen after"
