import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CONFIGS = Path(__file__).parents[3] / "configs"
CHECKPOINT = CONFIGS / "models" / "tiny"
CAP = 64  # generation.max_new_tokens of the demonstration


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, local_files_only=True)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in (CONFIGS / "prompts" / "tiny.jsonl").read_text().splitlines()]


def test_checkpoint_is_small_enough_to_ship(model):
    assert 500_000 <= model.num_parameters() <= 1_500_000
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 6_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_prompts_are_512_and_distinct(rows):
    assert len(rows) == 512
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == 512
    lengths = [len(row["prompt"]) for row in rows]
    assert max(lengths) >= 4 * min(lengths)


def test_tokenizer_returns_every_prompt_unchanged_one_token_a_character(tokenizer, rows):
    for prompt in (row["prompt"] for row in rows):
        ids = tokenizer.encode(prompt)
        assert len(ids) == len(prompt)
        assert tokenizer.decode(ids) == prompt
    working = "48+17=65[8+7=15];65+5=70;70-5=65 ok."
    assert tokenizer.decode(tokenizer.encode(working)) == working


def test_every_prompt_leaves_room_for_a_whole_response(model, rows):
    assert max(len(row["prompt"]) for row in rows) + CAP <= model.config.max_position_embeddings


def test_config_generation_config_and_tokenizer_agree_on_eos_and_pad(model, tokenizer):
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.pad_token_id == model.config.pad_token_id == model.generation_config.pad_token_id
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.bos_token_id is None
    assert len(tokenizer) == model.config.vocab_size


@torch.no_grad()
def test_eos_is_learned_it_follows_a_full_stop_and_never_a_prompt(model, tokenizer):
    def eos_probability(text: str) -> float:
        logits_V = model(torch.tensor([tokenizer.encode(text)])).logits[0, -1]
        return logits_V.softmax(-1)[tokenizer.eos_token_id].item()

    assert eos_probability("7+5+4=7+5=12;12+4=16.") > 0.95
    assert eos_probability("7+5+4=") < 0.01
