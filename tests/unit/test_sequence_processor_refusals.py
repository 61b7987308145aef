"""Prompts, seeds and models that cannot be measured are refused in one line."""

import pytest
import torch
import transformers
from support.models import character_tokenizer, processor, tiny_model
from support.policies import CHARACTERS, PROMPTS, VOCABULARY, WHOLE_VOCABULARY, policy, responses

from ray_probe.config import GenerationSettings
from ray_probe.errors import CheckpointError, ConfigError, NonFiniteError, PromptsError
from ray_probe.model.context_length import context_length
from ray_probe.sequence_processor import SequenceProcessor


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
