"""The tokenizer follows its files, not the class of the model's architecture."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.models import character_tokenizer, probe_config, save_checkpoint, tiny_model
from support.runs import processor_of
from tokenizers import Tokenizer

from ray_probe.checkpoints.inspection import inspect_checkpoint
from ray_probe.checkpoints.tokenizer.load import load_tokenizer
from ray_probe.config.schema import ModelConfig
from ray_probe.errors import CheckpointError
from ray_probe.rollout.builder import build_rollout
from ray_probe.run.preparation.prepare import prepare

CHARACTERS = "abcdefghijklmnopqrstuvwxyz"
ROWS = len(CHARACTERS) + 2
TEXT = "ab zé ?c"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Write a tokenizer on an architecture whose class would build another one."""
    return save_checkpoint(tmp_path / "c", tiny_model("qwen2", ROWS), CHARACTERS)


def declare(directory: Path, name: str | None) -> None:
    file = directory / "tokenizer_config.json"
    raw = json.loads(file.read_text()) | {"tokenizer_class": name}
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


@pytest.mark.parametrize("name", ["TokenizersBackend", "PreTrainedTokenizerFast"])
def test_a_tokenizer_of_its_own_gives_the_ids_of_its_file(checkpoint: Path, name: str):
    declare(checkpoint, name)
    ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(TEXT).ids
    assert transformers.AutoTokenizer.from_pretrained(checkpoint)(TEXT)["input_ids"] != ids, "the trap is there"
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer(TEXT)["input_ids"] == ids == character_tokenizer(CHARACTERS)(TEXT)["input_ids"]
    assert len(tokenizer) == ROWS
    config = probe_config(checkpoint, data={"prompts": [TEXT]}, generation={"max_new_tokens": 4})
    processor = processor_of(build_rollout(prepare(config).config, checkpoint, "policy"))
    assert processor.encode(TEXT) == ids


def inspected(directory: Path) -> Any:
    return inspect_checkpoint(ModelConfig(path=str(directory)), hashed=False)


def test_a_token_that_transformers_adds_is_named_with_a_remedy_that_works(checkpoint: Path):
    declare(checkpoint, None)
    with pytest.raises(CheckpointError) as caught:
        inspected(checkpoint)
    message = str(caught.value)
    assert f"its tokenizer has ids up to {ROWS}, the embeddings have {ROWS} rows; no file of it holds" in message
    assert "'<|endoftext|>': transformers adds it to a Qwen2Tokenizer; set tokenizer_class to PreTrained" in message
    declare(checkpoint, "PreTrainedTokenizerFast")
    assert len(inspected(checkpoint).tokenizer) == ROWS


def test_tokens_of_the_files_are_named_as_its_own(checkpoint: Path):
    tokenizer = character_tokenizer(CHARACTERS)
    tokenizer.add_tokens([f"<new {number}>" for number in range(5)])
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(CheckpointError, match=rf"ids up to {ROWS + 4}.* \({ROWS} '<new 0>', .*, \.\.\.\); resize"):
        inspected(checkpoint)


def test_a_special_token_that_only_the_settings_name_is_not_blamed_on_transformers(checkpoint: Path):
    file = checkpoint / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<end>"}))
    with pytest.raises(CheckpointError, match=rf"ids up to {ROWS}, .* \({ROWS} '<end>'\); resize them, or put in the"):
        inspected(checkpoint)
