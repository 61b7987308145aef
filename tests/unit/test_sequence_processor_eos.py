"""A response ends at an EOS id of the settings, the checkpoint or the tokenizer."""

from typing import Any

import pytest
from support.models import EOS, character_tokenizer, processor, tiny_model
from support.policies import CHARACTERS, VOCABULARY, WHOLE_VOCABULARY, many

from ray_probe.config import GenerationSettings
from ray_probe.errors import CheckpointError, ConfigError
from ray_probe.sequence_processor import SequenceProcessor


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
