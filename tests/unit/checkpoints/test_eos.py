"""The first source that names ids ends a response, as in transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.jobs import job_on, write_jsonl
from support.models import EOS, character_tokenizer, save_checkpoint, tiny_gpt2, tiny_llama
from support.runs import processor_of

from ray_probe.checkpoints.inspection import inspect_checkpoint
from ray_probe.checkpoints.tokenizer.eos import KEY, Eos, EosSource, resolve_eos
from ray_probe.checkpoints.tokenizer.eos_sources import written_sources
from ray_probe.checkpoints.tokenizer.load import load_tokenizer
from ray_probe.config.schema import GenerationSettings, ModelConfig, ProbeConfig
from ray_probe.errors import CheckpointError, ConfigError
from ray_probe.rollout.builder import build_rollout
from ray_probe.run.preparation.prepare import prepare
from ray_probe.sequence_processor import SequenceProcessor

CHARACTERS = "abcdefghijklmnopqrstuv"
VOCABULARY = len(CHARACTERS) + 2
GENERATION, CONFIG = "generation_config.json", "config.json"
CAP = 20


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "c", tiny_llama(VOCABULARY), CHARACTERS)


def name_eos(directory: Path, file: str, value: Any) -> None:
    """Write `eos_token_id` into a file of the checkpoint; None removes it."""
    raw = json.loads((directory / file).read_text())
    raw.pop("eos_token_id", None)
    (directory / file).write_text(json.dumps(raw if value is None else raw | {"eos_token_id": value}))


def name_all(directory: Path, generation: Any, config: Any, tokenizer: str | None) -> None:
    name_eos(directory, GENERATION, generation)
    name_eos(directory, CONFIG, config)
    raw = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(raw | {"eos_token": tokenizer}))


def found(directory: Path, explicit: list[int] | None = None) -> Eos:
    return inspect_checkpoint(ModelConfig(path=str(directory)), hashed=False).eos(explicit)


def a_job(directory: Path, **sections: Any) -> ProbeConfig:
    prompts = write_jsonl(directory.parent / "p.jsonl", [{"prompt": text} for text in ("abc", "dq", "u", "klmn")])
    return job_on(directory, prompts)(**sections)


# The oracle


def greedy(policy: SequenceProcessor, prompts: list[str]) -> list[list[int]]:
    """With so small a nucleus one token is left, the most probable one."""
    sequences = policy.generate(prompts, 1, [[0]] * len(prompts))
    return [sequences.tokens(b, 0)[1].tolist() for b in range(len(prompts))]


def opened(directory: Path, **generation: Any) -> SequenceProcessor:
    config = a_job(directory, generation={"top_p": 1e-6, "max_new_tokens": CAP} | generation)
    return processor_of(build_rollout(config, directory, "policy"))


@pytest.mark.parametrize("several", [False, True])
def test_responses_end_where_generate_ends_them(checkpoint: Path, several: bool):
    prompts = [*CHARACTERS, "abc", "dq", "klmn"]
    free = greedy(opened(checkpoint, eos_token_ids=[]), prompts)
    counts = {token: sum(token in response[3:12] for response in free) for token in range(VOCABULARY)}
    frequent = sorted(counts, key=lambda token: counts[token], reverse=True)
    ends, bait = (frequent[:3:2], frequent[1]) if several else (frequent[0], frequent[1])
    name_all(checkpoint, ends, bait, "<eos>")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer, expected = load_tokenizer(checkpoint), []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=CAP, pad_token_id=0)
        expected.append(out[0, ids.shape[1] :].tolist())
    policy = opened(checkpoint)
    assert greedy(policy, prompts) == expected
    assert sum(len(response) < CAP for response in expected) > 3
    assert any(bait in response[:-1] for response in expected), "a union would have ended some earlier"


# Which source decides


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "ids", "source", "others"),
    [
        ([9, 4], 6, "a", (4, 9), GENERATION, {CONFIG: (6,), "tokenizer": (1,)}),
        (0, 2, "<eos>", (0,), GENERATION, {CONFIG: (2,)}),
        (None, 6, "<eos>", (6,), CONFIG, {"tokenizer": (0,)}),
        (None, None, "<eos>", (0,), "tokenizer", {}),
        ([], [6, 2], "b", (2, 6), CONFIG, {}),
        ([0, 2], [0, 2], "<eos>", (0, 2), GENERATION, {}),
        ([0, 2], 0, "<eos>", (0, 2), GENERATION, {CONFIG: (0,)}),
    ],
)
def test_the_first_source_that_names_ids_decides_and_those_that_differ_are_kept(
    checkpoint: Path, generation: Any, config: Any, tokenizer: str, ids: Any, source: str, others: Any
):
    """LlamaConfig's class default is 2: no row has it but where it is written."""
    name_all(checkpoint, generation, config, tokenizer)
    eos = found(checkpoint)
    assert (eos.ids, eos.source, dict(eos.others)) == (ids, source, others)
    assert build_rollout(a_job(checkpoint), checkpoint, "policy").eos_ids == ids


def test_the_key_comes_before_every_source_and_an_empty_list_leaves_the_cap(checkpoint: Path):
    name_all(checkpoint, 0, 2, "<eos>")
    assert found(checkpoint, [5, 3]) == Eos(
        (3, 5), KEY, {GENERATION: (0,), CONFIG: (2,), "tokenizer": (0,)},
        {"0": "<eos>", "2": "b", "3": "c", "5": "e"},
    )  # fmt: skip
    assert found(checkpoint, []).line() == f"no token ({KEY})"


def test_the_text_section_of_a_config_counts_where_its_top_names_nothing(checkpoint: Path):
    name_all(checkpoint, None, None, None)
    raw = json.loads((checkpoint / CONFIG).read_text())
    (checkpoint / CONFIG).write_text(json.dumps(raw | {"text_config": {"eos_token_id": 7}}))
    chosen = resolve_eos(None, written_sources(checkpoint), VOCABULARY, str)
    assert (chosen.ids, chosen.source) == ((7,), CONFIG)


def test_a_checkpoint_that_names_no_id_is_refused_before_a_run(checkpoint: Path):
    name_all(checkpoint, None, None, None)
    with pytest.raises(CheckpointError, match=r"^generation\.eos_token_ids: got null, and .*; list the ids"):
        prepare(a_job(checkpoint))
    assert prepare(a_job(checkpoint, generation={"eos_token_ids": []})).eos.ids == ()


@pytest.mark.parametrize("value", ["</s>", ["</s>"], 2.5, True, -1])
def test_what_is_no_id_is_refused_with_its_source_unless_the_key_is_set(checkpoint: Path, value: Any):
    name_all(checkpoint, value, 2, "<eos>")
    with pytest.raises(CheckpointError, match=r"^eos_token_id: got .*; need integers >= 0 in generation_config"):
        found(checkpoint)
    assert found(checkpoint, [0]).ids == (0,)


def test_ids_without_an_embedding_row_are_refused_with_their_source(checkpoint: Path):
    name_all(checkpoint, [0, VOCABULARY], 2, "<eos>")
    with pytest.raises(CheckpointError, match=rf"^eos_token_id: got \[0, {VOCABULARY}\]; generation_config"):
        prepare(a_job(checkpoint))
    with pytest.raises(ConfigError, match=rf"^generation\.eos_token_ids: got \[{VOCABULARY}\]; need ids below the "):
        prepare(a_job(checkpoint, generation={"eos_token_ids": [VOCABULARY]}))


def test_sources_of_the_same_ids_are_reported_together():
    sources = [EosSource("one", 1), EosSource("two", [2, 3]), EosSource("three", [3, 2]), EosSource("four", 4)]
    eos = resolve_eos(None, sources, None, "abcdef".__getitem__)
    assert eos.line() == "1 'b' (one)"
    assert eos.differences() == "two, three name 2 'c', 3 'd'; four names 4 'e'"


def test_the_ids_belong_to_the_policy_and_not_the_key_that_names_them(checkpoint: Path):
    name_all(checkpoint, 0, 2, "<eos>")
    plain, same, other = (
        prepare(a_job(checkpoint, generation={"eos_token_ids": ids})).policy_id for ids in (None, [0], [2])
    )
    assert plain == same != other


# Models that a caller of the library has loaded


def test_a_class_default_of_a_model_in_memory_does_not_count():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    ))  # fmt: skip
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
    tokenizer = character_tokenizer(CHARACTERS)
    assert SequenceProcessor(model, tokenizer, GenerationSettings()).eos_ids == (EOS,)
    model.generation_config = transformers.GenerationConfig(eos_token_id=2)
    assert SequenceProcessor(model, tokenizer, GenerationSettings()).eos_ids == (2,)


@pytest.mark.parametrize(
    ("generation", "config", "ids"), [(None, None, (EOS,)), (None, 2, (2,)), (2, None, (2,)), (5, 2, (5,))]
)
def test_a_model_that_the_caller_loaded_ends_where_its_files_say(
    checkpoint: Path, generation: int | None, config: int | None, ids: tuple[int, ...]
):
    name_eos(checkpoint, CONFIG, config)
    (checkpoint / GENERATION).unlink()
    if generation is not None:
        (checkpoint / GENERATION).write_text(json.dumps({"_from_model_config": True, "eos_token_id": generation}))
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    assert SequenceProcessor(model, load_tokenizer(checkpoint), GenerationSettings()).eos_ids == ids
    assert found(checkpoint).ids == ids


def test_an_eos_id_of_the_tokenizer_that_the_model_does_not_have_is_refused():
    model, tokenizer = tiny_gpt2(VOCABULARY, torch.float32), character_tokenizer(CHARACTERS)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(CheckpointError, match=rf"^eos_token_id: got {VOCABULARY}; tokenizer names ids past the "):
        SequenceProcessor(model, tokenizer, GenerationSettings())
