"""A transformers model as a policy: padding, cache and batch change nothing, and only the declared policy samples."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import chisquare
from support.enumeration import oracle_policy
from support.models import ARCHITECTURES, EOS, character_tokenizer, processor, save_checkpoint, tiny_gpt2, tiny_model

from ray_probe.checkpoints.load import load_model
from ray_probe.checkpoints.tokenizer.load import load_tokenizer
from ray_probe.config import GenerationSettings
from ray_probe.core.policy.features import DEFAULT_FEATURES
from ray_probe.errors import CheckpointError, ConfigError, NonFiniteError, PromptsError
from ray_probe.model.context_length import context_length
from ray_probe.model.sequences import BatchedSequences, LogprobResults, pack_sequences
from ray_probe.sequence_processor import SequenceProcessor

CHARACTERS = "abcdefghijklmnopqrstuv"
VOCABULARY = len(CHARACTERS) + 2  # EOS and padding
PROMPTS = ["a", "bcdefghijklmnopqrstuvabcd", "efg"]
SEEDS = [[(b, g) for g in range(3)] for b in range(len(PROMPTS))]
PAIRS = [(b, g) for b in range(3) for g in range(3)]
WHOLE_VOCABULARY = {"top_p": 1.0, "max_new_tokens": 16}


@cache
def policy(architecture: str) -> SequenceProcessor:
    return processor(tiny_model(architecture, VOCABULARY), CHARACTERS, **WHOLE_VOCABULARY)


@cache
def sampled(architecture: str) -> BatchedSequences:
    return policy(architecture).generate(PROMPTS, 3, SEEDS)


def scored(processor: SequenceProcessor, sequences: BatchedSequences, **options: Any) -> LogprobResults:
    return processor.teacher_force_logprobs(sequences, compute_rb=True, return_baseline_features=True, **options)


def alone(sequences: BatchedSequences, b: int, g: int) -> BatchedSequences:
    prompt, response = sequences.tokens(b, g)
    return pack_sequences([prompt.tolist()], [[response.tolist()]])


def responses(sequences: BatchedSequences) -> list[list[int]]:
    groups, group = sequences.shape
    return [sequences.tokens(b, g)[1].tolist() for b in range(groups) for g in range(group)]


def many(policy: SequenceProcessor, prompt: str, count: int) -> list[list[int]]:
    return responses(policy.generate([prompt], count, [[(11, g) for g in range(count)]]))


# Padding, positions, cache and batch


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


# Where a response ends


def test_a_response_ends_at_the_first_of_several_eos_ids_which_belongs_to_it():
    ends = (EOS, 5, 9)
    policy = processor(tiny_model("llama", VOCABULARY), CHARACTERS, eos_token_ids=list(ends), **WHOLE_VOCABULARY)
    found = many(policy, "abc", 200)
    assert {response[-1] for response in found if len(response) < 16} == set(ends)
    for response in found:
        assert not set(response[:-1]) & set(ends)
        assert policy.ended(response) == (response[-1] in ends)
        assert policy.ended(response) or len(response) == 16
    assert any(len(response) == 1 for response in found), "EOS alone is a response of one token"
    assert any(not policy.ended(response) for response in found), "some are cut at the cap"


def test_explicit_eos_ids_replace_those_of_the_checkpoint():
    policy = processor(tiny_model("llama", VOCABULARY), CHARACTERS, eos_token_ids=[7], **WHOLE_VOCABULARY)
    found = many(policy, "abc", 60)
    assert any(EOS in response[:-1] for response in found)
    assert all(7 not in response[:-1] for response in found)


def test_an_empty_list_of_eos_ids_leaves_only_the_cap():
    policy = processor(tiny_model("llama", VOCABULARY), CHARACTERS, eos_token_ids=[], **WHOLE_VOCABULARY)
    found = many(policy, "abc", 40)
    assert {len(response) for response in found} == {16}
    assert not any(policy.ended(response) for response in found)


def test_an_explicit_eos_id_that_the_model_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"^generation\.eos_token_ids: got \[7, 99\]; need ids below the \d+ tokens"):
        processor(tiny_model("llama", VOCABULARY), CHARACTERS, eos_token_ids=[7, 99])


def without_eos(vocabulary: int = VOCABULARY) -> tuple[Any, Any]:
    model, tokenizer = tiny_model("llama", vocabulary), character_tokenizer(CHARACTERS)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token = None
    return model, tokenizer


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "ids"),
    [([9, 4], 6, "a", (4, 9)), (None, 6, "a", (6,)), (None, None, "a", (1,)), ([], 6, "a", (6,))],
)
def test_eos_ids_are_those_of_the_first_that_names_some(generation: Any, config: Any, tokenizer: str, ids: Any):
    model, own = without_eos()
    model.generation_config.eos_token_id, model.config.eos_token_id, own.eos_token = generation, config, tokenizer
    assert SequenceProcessor(model, own, GenerationSettings()).eos_ids == ids


def test_no_eos_id_anywhere_is_refused():
    model, tokenizer = without_eos()
    with pytest.raises(CheckpointError, match=r"^generation\.eos_token_ids: got null, .*; list the ids"):
        SequenceProcessor(model, tokenizer, GenerationSettings())
    assert SequenceProcessor(model, tokenizer, GenerationSettings(eos_token_ids=())).eos_ids == ()


@pytest.mark.parametrize("value", ["</s>", ["</s>"], 2.5])
def test_an_eos_id_that_is_no_integer_is_refused_in_one_line(value: object):
    model, tokenizer = without_eos()
    model.generation_config.eos_token_id = value
    with pytest.raises(CheckpointError, match=r"^eos_token_id: got .*; need integers.*generation\.eos_token_ids$"):
        SequenceProcessor(model, tokenizer, GenerationSettings())


# The declared policy and nothing of generation_config.json

TINY = "abcdefg"
DECLARED = {"temperature": 1.3, "top_p": 0.9, "max_new_tokens": 6, "gen_batch_size": 2000}
OTHER_WISHES = {
    "top_k": 5, "repetition_penalty": 1.3, "temperature": 0.1, "do_sample": True, "max_new_tokens": 3,
    "eos_token_id": [EOS, 3], "suppress_tokens": [1], "bad_words_ids": [[2]], "forced_eos_token_id": 0,
    "min_new_tokens": 2, "no_repeat_ngram_size": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def opinionated(tmp_path_factory: pytest.TempPathFactory) -> SequenceProcessor:
    """A policy loaded from a directory whose generation_config.json wants something else."""
    directory = save_checkpoint(tmp_path_factory.mktemp("opinionated"), tiny_gpt2(8, torch.float32, seed=2), TINY)
    (directory / "generation_config.json").write_text(json.dumps(OTHER_WISHES))
    model = load_model(directory, "float32")
    assert model.generation_config.top_k == 5
    return SequenceProcessor(model, load_tokenizer(directory), GenerationSettings(**DECLARED))


@pytest.fixture(scope="module")
def thousands(opinionated: SequenceProcessor) -> list[list[int]]:
    return many(opinionated, "ab", 6000)


def exact_prefixes(model: Any, temperature: float) -> dict[tuple[int, ...], float]:
    """Probabilities of the first two tokens, or of the first where it ends the response."""
    prompt, result = [1, 2], {}
    with torch.no_grad():
        first = oracle_policy(model(torch.tensor([prompt])).logits[0, -1], temperature, 0.9)[0].exp()
        for y in range(8):
            if y in (EOS, 3):
                result[(y,)] = first[y].item()
                continue
            logits = model(torch.tensor([[*prompt, y]])).logits[0, -1]
            second = oracle_policy(logits, temperature, 0.9)[0].exp() * first[y]
            result |= {(y, z): second[z].item() for z in range(8)}
    return {prefix: share for prefix, share in result.items() if share > 0}


def p_value(exact: dict[tuple[int, ...], float], found: list[list[int]]) -> float:
    """Chi-square of the observed prefixes; those expected fewer than 5 times are pooled."""
    cells = {prefix: share for prefix, share in exact.items() if share * len(found) >= 5}
    counts = dict.fromkeys(cells, 0)
    for response in found:
        prefix = tuple(response[:1]) if tuple(response[:1]) in exact else tuple(response[:2])
        if prefix in counts:
            counts[prefix] += 1
    observed = [*counts.values(), len(found) - sum(counts.values())]
    expected = [*cells.values(), 1 - sum(cells.values())]
    if expected[-1] * len(found) < 1e-6:
        if observed.pop():
            return 0.0
        expected.pop()
    return float(chisquare(observed, np.array(expected) / sum(expected) * len(found)).pvalue)


def test_nothing_of_generation_config_but_its_eos_ids_reaches_the_sampler(opinionated, thousands):
    exact = exact_prefixes(opinionated.model, 1.3)
    assert (
        p_value({(y,): sum(p for k, p in exact.items() if k[0] == y) for y in {k[0] for k in exact}}, thousands) > 1e-3
    )
    assert p_value(exact, thousands) > 1e-3
    assert {tuple(y[:2]) for y in thousands} <= {k[:2] for k in exact}
    assert opinionated.eos_ids == (EOS, 3)
    assert {y[-1] for y in thousands if len(y) < 6} == {EOS, 3}
    assert max(len(y) for y in thousands) == 6


def test_control_the_frequencies_would_show_another_temperature(opinionated, thousands):
    assert p_value(exact_prefixes(opinionated.model, 1.0), thousands) < 1e-6


def test_sampled_entropy_agrees_with_surprisal_on_average(opinionated):
    sequences = opinionated.generate(["ab"], 2000, [[(5, g) for g in range(2000)]])
    results = scored(opinionated, sequences, tf_batch_size=2000)
    gaps = [s.sum() - h.sum() for s, h in zip(results.entropies[0], results.rb_entropies[0], strict=True)]
    assert abs(np.mean(gaps)) < 4 * np.std(gaps) / np.sqrt(len(gaps))


# Ids without an embedding row


@pytest.mark.parametrize("has_pad", [True, False])
def test_a_padding_id_without_an_embedding_row_changes_nothing(has_pad: bool):
    model, settings = tiny_model("llama", VOCABULARY), GenerationSettings(**WHOLE_VOCABULARY)
    usual, other = character_tokenizer(CHARACTERS), character_tokenizer(CHARACTERS, pad=has_pad)
    if has_pad:
        other.add_special_tokens({"pad_token": "<another pad>"})
        assert other.pad_token_id == VOCABULARY
    prompts, seeds = ["a", "abcdefg"], [[0, 1], [2, 3]]
    found = []
    for tokenizer in (usual, other):
        policy = SequenceProcessor(model, tokenizer, settings)
        sequences = policy.generate(prompts, 2, seeds)
        found.append((responses(sequences), policy.teacher_force_logprobs(sequences).sequence_logprobs))
    assert found[0] == found[1]


def test_a_prompt_with_an_id_without_an_embedding_row_is_refused():
    tokenizer = character_tokenizer(CHARACTERS)
    tokenizer.add_tokens(["<new>"])
    policy = SequenceProcessor(tiny_model("llama", VOCABULARY), tokenizer, GenerationSettings(max_new_tokens=4))
    with pytest.raises(PromptsError, match=rf"^prompt 1: has the token id {VOCABULARY}, past the {VOCABULARY} embedd"):
        policy.generate(["a", "b<new>"], 1, [[0], [1]])


# What is refused


def test_a_prompt_that_leaves_no_room_for_the_cap_is_refused():
    policy = processor(tiny_model("llama", VOCABULARY), CHARACTERS, max_new_tokens=60)
    policy.generate(["abcd"], 1, [[0]])
    with pytest.raises(PromptsError, match=r"^prompt 1: 5 tokens plus generation.max_new_tokens 60 .* 64; shorten"):
        policy.generate(["abcd", "abcde"], 1, [[0], [1]])


def test_a_prompt_without_a_token_is_refused():
    with pytest.raises(PromptsError, match=r"^prompt 1: has no token; give the model at least one$"):
        policy("llama").generate(["a", ""], 1, [[0], [1]])


@pytest.mark.parametrize("seeds", [[[1]], [[1, 2], [3]], [[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 0, 0]]])
def test_a_response_without_a_seed_of_its_own_is_refused(seeds: list[list[int]]):
    with pytest.raises(ConfigError, match=r"^seeds: got .*; need one a response, 3 x 3$"):
        policy("llama").generate(PROMPTS, 3, seeds)


def test_weights_that_are_not_finite_end_in_an_error_and_not_in_numbers():
    model = tiny_model("llama", VOCABULARY)
    policy = processor(model, CHARACTERS, **WHOLE_VOCABULARY)
    sequences = policy.generate(["abc"], 1, [[0]])
    model.lm_head.weight.data[3, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^logits: .*check its weights and model\.dtype$"):
        policy.generate(["abc"], 1, [[0]])
    with pytest.raises(NonFiniteError):
        policy.teacher_force_logprobs(sequences)


@pytest.mark.parametrize("family", ["Bert", "OpenAIGPT"])
def test_a_model_without_a_key_value_cache_is_refused(family: str):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, **small)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(CheckpointError, match=r"^model\.path: got '\w+'; need a decoder-only model with a key-value"):
        processor(model, CHARACTERS, max_new_tokens=4).generate(["ab"], 1, [[0]])


@pytest.mark.parametrize(("architecture", "length"), [("gpt2", 64), ("opt", 64), ("gemma2", 64), ("bloom", None)])
def test_the_context_is_read_from_the_config_under_each_of_its_names(architecture: str, length: int | None):
    assert context_length(policy(architecture).model.config) == length


# Results


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
