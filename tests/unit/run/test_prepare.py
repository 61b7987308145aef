"""What is checked, resolved and written down of a run before a cluster is touched."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.adapters import write_adapter
from support.jobs import change_weights, plain_job

from ray_probe.config import ProbeConfig
from ray_probe.errors import CheckpointError, ConfigError, PromptsError
from ray_probe.run.preparation.prepare import prepare

CHARACTERS = "abcdef"
CONTEXT = 32
PROMPTS = ["abc", "f", "a" * 20, "dd"]


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., ProbeConfig]:
    """A config on a checkpoint and a prompts file of its own, with sections to change."""
    return plain_job(tmp_path, PROMPTS, CHARACTERS, CONTEXT)


def refused(config: ProbeConfig, error: type[Exception] = PromptsError) -> str:
    with pytest.raises(error) as caught:
        prepare(config)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


# Prompts that fit, and those that do not


def test_a_prompt_that_passes_the_context_is_named_by_line_with_both_remedies(job, tmp_path: Path):
    message = refused(job(generation={"max_new_tokens": 13}))
    where = f"{tmp_path / 'prompts.jsonl'}:3: the prompt has 20 tokens, with generation.max_new_tokens 13"
    remedy = "shorten it, set data.on_long to skip, or data.context_length where the model sees more"
    assert message == f"{where} it passes the context of 32; {remedy}"
    assert prepare(job(generation={"max_new_tokens": 12})).prompts.count == 4


def test_a_prompt_over_max_prompt_tokens_is_named_by_line_with_both_remedies(job, tmp_path: Path):
    message = refused(job(data={"max_prompt_tokens": 2}))
    where = f"{tmp_path / 'prompts.jsonl'}:1: the prompt has 3 tokens, data.max_prompt_tokens is 2"
    assert message == f"{where}; shorten it, or set data.on_long to skip"


def test_a_prompt_in_a_list_is_named_by_its_index(job):
    assert refused(job(data={"prompts": PROMPTS, "max_prompt_tokens": 5})).startswith("data.prompts[2]: ")


def test_the_context_counts_even_where_max_prompt_tokens_allows_more(job):
    assert "context of 32" in refused(job(data={"max_prompt_tokens": 30}, generation={"max_new_tokens": 13}))


@pytest.mark.parametrize(("limit", "skipped", "usable"), [(2, 2, (1, 3)), (3, 1, (0, 1, 3)), (20, 0, (0, 1, 2, 3))])
def test_longer_prompts_are_skipped_and_counted_where_the_config_says_so(job, limit: int, skipped: int, usable: tuple):
    prepared = prepare(job(data={"max_prompt_tokens": limit, "on_long": "skip"}))
    assert (prepared.prompts.skipped_as_too_long, prepared.plan.usable, prepared.prompts.count) == (skipped, usable, 4)
    used = {ref.index for n in range(2) for shard in prepared.plan.round(n) for ref in shard.prompts}
    assert used == set(usable)


def test_no_prompt_left_is_refused(job):
    assert "no prompt is left" in refused(
        job(data={"prompts": ["aa", "bb"], "max_prompt_tokens": 1, "on_long": "skip"})
    )


@pytest.mark.parametrize("cap", [CONTEXT, CONTEXT + 1])
def test_a_cap_that_leaves_no_room_for_a_prompt_is_refused(job, cap: int):
    message = refused(job(generation={"max_new_tokens": cap}), ConfigError)
    assert message.startswith(f"generation.max_new_tokens: got {cap}; it leaves no room for a prompt")


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_prompt_without_a_token_is_refused(job, tmp_path: Path):
    invisible = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    edit_json(tmp_path / "c" / "tokenizer.json", normalizer=invisible)
    message = refused(job(data={"prompts": ["a", "\u200b"], "on_long": "skip"}))
    assert message == "data.prompts[1]: the prompt has no token; write at least one"


def test_too_few_prompts_without_repeat_are_refused(job):
    assert refused(job(data={"repeat": False})).startswith("data.repeat: got False; 8 prompts are needed")


def test_tokenizing_writes_nothing_to_stderr(job, tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch):
    edit_json(tmp_path / "c" / "tokenizer_config.json", model_max_length=2)
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "propagate", True)
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    try:
        prepare(job())
    finally:
        transformers.logging.set_verbosity(before)
    assert caplog.text == ""


# Paths


def test_relative_paths_are_resolved_where_the_run_is_started(job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = job(model={"path": "c"}, data={"prompts": "prompts.jsonl"}, output={"dir": "runs"})
    resolved = prepare(config).config
    assert resolved.model.path == str(tmp_path / "c")
    assert resolved.data.prompts == str(tmp_path / "prompts.jsonl")
    assert resolved.output.dir == str(tmp_path / "runs")
    assert resolved.generation == config.generation and resolved.batch == config.batch
    monkeypatch.chdir("/")
    assert prepare(resolved).policy_id == prepare(job()).policy_id


def test_an_adapter_belongs_to_the_policy_and_is_found_from_anywhere(job, tmp_path: Path, monkeypatch):
    write_adapter(tmp_path / "a", tmp_path / "c", target_modules=["c_attn"], fan_in_fan_out=True)
    plain = prepare(job()).policy_id
    monkeypatch.chdir(tmp_path)
    prepared = prepare(job(model={"adapter": "a"}))
    assert prepared.config.model.adapter == str(tmp_path / "a") == str(prepared.checkpoint.adapter)
    assert prepared.policy_id != plain


def test_relative_sources_of_every_kind_are_resolved(job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([{"prompt": text} for text in PROMPTS]).save_to_disk(tmp_path / "d")
    datasets.Dataset.from_list([{"prompt": text} for text in PROMPTS]).to_parquet(tmp_path / "p.parquet")
    expected = prepare(job())
    monkeypatch.chdir(tmp_path)
    for source, absolute in (("datasets:d", f"datasets:{tmp_path / 'd'}"), ("p.parquet", str(tmp_path / "p.parquet"))):
        prepared = prepare(job(data={"prompts": source}))
        assert prepared.config.data.prompts == absolute
        assert prepared.plan == expected.plan and prepared.prompts.sha256 == expected.prompts.sha256


def test_a_list_of_prompts_stays_a_list(job):
    assert prepare(job(data={"prompts": PROMPTS})).config.data.prompts == tuple(PROMPTS)


def test_a_missing_checkpoint_is_refused(job):
    assert refused(job(model={"path": "nowhere"}), CheckpointError).startswith("model.path: got 'nowhere'; no such")


# The policy's name


@pytest.mark.parametrize(
    "sections",
    [
        {"generation": {"temperature": 1.1}},
        {"generation": {"top_p": 0.9}},
        {"generation": {"max_new_tokens": 7}},
        {"generation": {"eos_token_ids": [0, 3]}},
        {"model": {"dtype": "bfloat16"}},
        {"estimator": {"x_estimator_mode": "naive"}},
    ],
)
def test_another_policy_has_another_id(job, sections: dict[str, Any]):
    assert prepare(job(**sections)).policy_id != prepare(job()).policy_id


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"seed": 7}},
        {"batch": {"shard_prompts": 1, "rounds": 9}},
        {"generation": {"gen_batch_size": 1, "tf_batch_size": 1}},
        {"estimator": {"baseline": {"mode": "none"}}},
        {"cluster": {"actors": 1}},
    ],
)
def test_the_same_policy_keeps_its_id(job, sections: dict[str, Any]):
    assert prepare(job(**sections)).policy_id == prepare(job()).policy_id


def test_other_weights_are_another_policy(job, tmp_path: Path):
    before = prepare(job()).policy_id
    change_weights(tmp_path / "c")
    assert prepare(job()).policy_id != before


def test_a_target_error_on_few_prompts_is_refused_in_one_line(job):
    batch = {"rounds": None, "max_sequences": 4096, "target_error": {"of": "entropy", "relative": 0.1}}
    with pytest.raises(PromptsError) as refused:
        prepare(job(batch=batch))
    assert "batch.target_error needs at least 64 prompts" in str(refused.value) and "\n" not in str(refused.value)
    assert refused.value.exit_code == 2
