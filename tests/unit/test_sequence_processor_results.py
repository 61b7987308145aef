"""Results have every requested field, for each prompt and response."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import character_tokenizer, processor, save_checkpoint, tiny_gpt2, tiny_model
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

from ray_probe.checkpoints.load import load_model
from ray_probe.checkpoints.tokenizer.load import load_tokenizer
from ray_probe.config import GenerationSettings
from ray_probe.core.policy.features import DEFAULT_FEATURES
from ray_probe.model.sequences import BatchedSequences
from ray_probe.sequence_processor import SequenceProcessor


def test_the_model_is_put_in_eval_mode_so_that_dropout_is_off():
    model = tiny_gpt2(VOCABULARY, positions=64)
    assert model.config.resid_pdrop == 0.3
    policy = processor(model.train(), CHARACTERS, **WHOLE_VOCABULARY)
    sequences = policy.generate(PROMPTS, 1, [[b] for b in range(3)])
    first, second = (scored(policy, sequences, with_grad=with_grad) for with_grad in (False, True))
    assert not model.training
    np.testing.assert_array_equal(first.entropies[1][0], second.entropies[1][0])


def test_results_are_addressable_by_prompt_and_response_with_every_field():
    sequences = sampled("llama")
    results = scored(policy("llama"), sequences, with_grad=True)
    assert results.shape == sequences.shape == (3, 3)
    for b, g in PAIRS:
        length = sequences.gen_lens[b][g]
        assert results.logprobs[b][g].shape == results.rb_entropies_torch[b][g].shape == (length,)
        assert results.entropies[b][g].shape == results.rb_entropies[b][g].shape == (length,)
        assert results.entropies[b][g].dtype == results.rb_entropies[b][g].dtype == np.float64
        assert results.baseline_feats_torch[b][g].shape == (length, len(DEFAULT_FEATURES))
        np.testing.assert_array_equal(results.entropies[b][g], -results.logprobs[b][g].detach().double().numpy())
        np.testing.assert_array_equal(
            results.rb_entropies[b][g], results.rb_entropies_torch[b][g].detach().double().numpy()
        )
        assert isinstance(results.sequence_logprobs[b][g], float)
        assert results.sequence_logprobs[b][g] == pytest.approx(-results.entropies[b][g].sum())


def test_what_was_not_asked_for_is_none():
    results = policy("llama").teacher_force_logprobs(sampled("llama"))
    assert (results.rb_entropies, results.rb_entropies_torch, results.baseline_feats_torch) == (None, None, None)
    assert scored(policy("llama"), sampled("llama")).rb_entropies_torch is None
    assert sampled("llama").responses_text is None


def test_only_with_grad_has_a_graph_and_features_never_do():
    for with_grad in (True, False):
        results = scored(policy("llama"), sampled("llama"), with_grad=with_grad)
        assert results.logprobs[1][2].requires_grad == with_grad
        assert not results.baseline_feats_torch[1][2].requires_grad
    with torch.no_grad():
        assert scored(policy("llama"), sampled("llama"), with_grad=True).rb_entropies_torch[0][0].requires_grad


def test_features_come_in_the_order_asked_for():
    model = tiny_model("llama", VOCABULARY)
    chosen = processor(model, CHARACTERS, features=("pos_frac", "H"), **WHOLE_VOCABULARY)
    (features, *_), (everything, *_) = (
        scored(policy, sampled("llama")).baseline_feats_torch[0] for policy in (chosen, policy("llama"))
    )
    order = [DEFAULT_FEATURES.index(name) for name in ("pos_frac", "H")]
    torch.testing.assert_close(features, everything[:, order])
    torch.testing.assert_close(features[:, 0], torch.arange(len(features)) / 16)


def test_responses_are_decoded_when_asked_for_without_their_eos():
    sequences = policy("llama").generate(PROMPTS, 3, SEEDS, decode=True)
    for b, g in PAIRS:
        response = sequences.tokens(b, g)[1].tolist()
        assert sequences.responses_text[b][g] == "".join(CHARACTERS[y - 1] for y in response if 0 < y <= 22)
    assert responses(sequences) == responses(sampled("llama"))


def test_the_mask_marks_exactly_the_tokens_of_prompt_and_response():
    sequences = sampled("llama")
    assert sequences.prompt_lens == [1, 25, 3]
    for b, g in PAIRS:
        assert sequences.attention_masks[b, g].sum() == sequences.prompt_lens[b] + sequences.gen_lens[b][g]
        assert sequences.tokens(b, g)[0].tolist() == [CHARACTERS.index(c) + 1 for c in PROMPTS[b]]


def test_padding_on_either_side_and_of_any_width_changes_no_score():
    sequences = sampled("llama")
    wide = torch.nn.functional.pad(sequences.sequences, (3, 5), value=2)
    masks = torch.nn.functional.pad(sequences.attention_masks, (3, 5))
    padded = BatchedSequences(wide, masks, sequences.prompt_lens, sequences.gen_lens)
    first, second = scored(policy("llama"), sequences), scored(policy("llama"), padded)
    for b, g in PAIRS:
        np.testing.assert_array_equal(first.entropies[b][g], second.entropies[b][g])


def test_progress_counts_every_token_sampled_and_every_token_scored():
    counted: list[int] = []
    counting = SequenceProcessor(
        tiny_model("llama", VOCABULARY), character_tokenizer(CHARACTERS), GenerationSettings(**WHOLE_VOCABULARY),
        on_progress=counted.append,
    )  # fmt: skip
    sequences = counting.generate(PROMPTS, 3, SEEDS)
    tokens = sum(map(sum, sequences.gen_lens))
    assert sum(counted) == tokens
    counting.teacher_force_logprobs(sequences)
    assert sum(counted) == 2 * tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_are_float32_or_wider_whatever_the_weights(dtype: torch.dtype):
    policy = processor(tiny_model("llama", VOCABULARY).to(dtype), CHARACTERS, **WHOLE_VOCABULARY)
    results = scored(policy, policy.generate(["abc"], 1, [[0]]), with_grad=True)
    expected = torch.promote_types(dtype, torch.float32)
    for value in (results.logprobs, results.rb_entropies_torch, results.baseline_feats_torch):
        assert value[0][0].dtype == expected


def test_the_checkpoint_is_loaded_from_plain_files(tmp_path: Path):
    directory = save_checkpoint(tmp_path / "checkpoint", tiny_model("qwen2", VOCABULARY), CHARACTERS)
    loaded = SequenceProcessor(
        load_model(directory, "float32"), load_tokenizer(directory), GenerationSettings(**WHOLE_VOCABULARY)
    )
    assert responses(loaded.generate(PROMPTS, 3, SEEDS)) == responses(sampled("qwen2"))
