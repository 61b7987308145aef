"""The checkpoint that a run compares with: what is refused before a cluster is touched, in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import write_adapter
from support.jobs import chat_checkpoint, chat_tokenizer, job_on, plain_job, write_jsonl
from support.models import save_checkpoint, tiny_gpt2, tiny_llama

from ray_probe.checkpoints.memory_forecast import check_fits
from ray_probe.config import ProbeConfig
from ray_probe.config.loading import config_from_dict, to_dict
from ray_probe.errors import ClusterError, ConfigError, InputError
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.run.manifest import Manifest, check_same_inputs
from ray_probe.run.messages import ActorFacts
from ray_probe.run.preparation.prepare import prepare
from ray_probe.run.preparation.prepared import baseline_rule

CHARACTERS, CONTEXT = "abcdef", 32
PROMPTS = ["abc", "f", "dd", "e"]


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., ProbeConfig]:
    return plain_job(tmp_path, PROMPTS, CHARACTERS, CONTEXT)


def against(config: ProbeConfig, place: Path, group: int = 4, **sections: dict[str, Any]) -> ProbeConfig:
    raw = to_dict(config)
    own = {"compare": {"against": str(place)}, "batch": {"responses_per_prompt": group}}
    for part in (own, sections):
        for name, values in part.items():
            raw[name] |= values
    return config_from_dict(raw)


def refused(config: ProbeConfig) -> str:
    with pytest.raises(InputError) as caught:
        prepare(config)
    text = str(caught.value)
    assert "\n" not in text and caught.value.exit_code == 2
    return text


def test_a_comparison_is_prepared_with_both_checkpoints(job, tmp_path: Path):
    other = save_checkpoint(tmp_path / "a", tiny_gpt2(8, torch.float32, seed=1, positions=CONTEXT), CHARACTERS)
    alone, both = prepare(job()), prepare(against(job(), other))
    assert both.against is not None and both.against.directory == other and alone.against is None
    assert both.config.compare.against == str(other)
    assert both.policy_id != alone.policy_id and both.checkpoint == alone.checkpoint
    assert both.memory.weights == 2 * alone.memory.weights and both.memory.gradients == 0
    assert "gradients" not in both.memory.line() and "gradients" in alone.memory.line()
    assert both.memory.one_at_a_time.weights == alone.memory.weights
    both_fit, one_fits = both.memory.total, both.memory.one_at_a_time.total
    assert not check_fits(both.memory, both_fit, "it") and check_fits(both.memory, both_fit - 1, "it")
    with pytest.raises(ClusterError, match="memory: an actor needs weights"):
        check_fits(both.memory, one_fits - 1, "it")
    assert (baseline_rule(both.config).targets, baseline_rule(alone.config).targets) == (2, 1)


def test_a_comparison_with_itself_is_allowed(job, tmp_path: Path):
    assert prepare(against(job(), tmp_path / "c")).against is not None


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"batch": {"responses_per_prompt": 5}}, "batch.responses_per_prompt: got 5; a comparison needs an even num"),
        ({"batch": {"responses_per_prompt": 2}}, "batch.responses_per_prompt: got 2; a comparison needs an even num"),
        ({"estimator": {"x_estimator_mode": "naive"}}, "estimator.x_estimator_mode: got 'naive'; a comparison needs"),
        ({"output": {"save_gradient": True}}, "output.save_gradient: got True; a comparison takes no gradient"),
        ({"compare": {"against": None, "adapter": "x"}}, "compare.adapter: got 'x'; need compare.against"),
        ({"compare": {"against": None, "parts": True}}, "compare.parts: got True; need compare.against"),
        ({"compare": {"parts": True, "adapter": "x"}}, "compare.parts: got True; parts need full weights, compare"),
        (
            {"compare": {"parts": True}, "model": {"adapter": "x"}},
            "compare.parts: got True; parts need full weights, model.adapter is x; merge adapters into checkpoints, or",
        ),
        (
            {"batch": {"rounds": None, "max_seconds": 9.0, "target_error": {"of": "gradient", "relative": 0.1}}},
            "batch.target_error.of: got 'gradient'; a comparison takes no gradient: use change",
        ),
    ],
)  # fmt: skip
def test_settings_that_no_comparison_can_have_are_refused(job, tmp_path: Path, sections: dict[str, Any], says: str):
    with pytest.raises(ConfigError) as caught:
        against(job(), tmp_path / "c", **sections)
    assert str(caught.value).startswith(says)


def test_a_target_for_the_change_needs_a_comparison(job):
    raw = to_dict(job())
    raw["batch"] |= {"rounds": None, "max_seconds": 9.0, "target_error": {"of": "change", "nats": 0.1}}
    with pytest.raises(ConfigError, match=r"batch\.target_error\.of: got 'change'; need compare\.against"):
        config_from_dict(raw)


def test_parts_need_one_architecture_and_the_memory_of_a_gradient_but_of_no_third_model(job, tmp_path: Path):
    asked = {"compare": {"parts": True}}
    same = save_checkpoint(tmp_path / "a", tiny_gpt2(8, torch.float32, seed=1, positions=CONTEXT), CHARACTERS)
    with_parts, without = prepare(against(job(), same, **asked)), prepare(against(job(), same))
    assert with_parts.memory.weights == without.memory.weights
    assert with_parts.memory.total > without.memory.total
    assert 0 < with_parts.memory.gradients < prepare(job()).memory.gradients
    assert with_parts.memory.activations >= without.memory.activations
    assert without.memory.in_turns is not None and with_parts.memory.in_turns is None
    with pytest.raises(ClusterError, match=r"set compare\.parts: false, lower"):
        check_fits(with_parts.memory, with_parts.memory.total - 1, "this device")
    other = save_checkpoint(tmp_path / "llama", tiny_llama(8, positions=CONTEXT), CHARACTERS)
    assert prepare(against(job(), other)).against is not None
    text = refused(against(job(), other, **asked))
    assert text.startswith("compare.parts: got True; config.json of compare.against and of model.path differ in ")
    assert text.endswith("parts need checkpoints of one architecture; compare such checkpoints, or set it to false")


def test_another_vocabulary_is_refused_with_the_first_token_that_differs(job, tmp_path: Path):
    other = save_checkpoint(tmp_path / "a", tiny_gpt2(8, torch.float32, positions=CONTEXT), "abcdfe")
    text = refused(against(job(), other))
    assert text.startswith(f"compare.against: got '{other}'; 2 tokens have another id than in model.path ('e' is 6 th")
    assert text.endswith("compare checkpoints of one model")


def test_embeddings_of_another_height_are_refused(job, tmp_path: Path):
    other = save_checkpoint(tmp_path / "a", tiny_gpt2(9, torch.float32, positions=CONTEXT), CHARACTERS)
    assert "it has 9 rows of embeddings, model.path 8" in refused(against(job(), other))


def test_a_missing_checkpoint_is_named_by_its_own_key(job, tmp_path: Path):
    assert refused(against(job(), tmp_path / "gone")).startswith("compare.against: got ")


def test_an_adapter_of_another_base_is_named_by_its_own_key(job, tmp_path: Path):
    llama = save_checkpoint(tmp_path / "llama", tiny_llama(8), CHARACTERS)
    config, adapter = against(job(), tmp_path / "c"), write_adapter(tmp_path / "adapter", llama)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["target_modules"] = ["no_such_module"]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    config = against(config, tmp_path / "c", compare={"against": str(tmp_path / "c"), "adapter": str(adapter)})
    assert refused(config).startswith("compare.adapter: got ")


def test_responses_that_end_at_other_tokens_are_refused_with_the_key_that_decides(job, tmp_path: Path):
    model = tiny_gpt2(8, torch.float32, positions=CONTEXT)
    model.generation_config.eos_token_id = 3
    other = save_checkpoint(tmp_path / "a", model, CHARACTERS)
    text = refused(against(job(), other))
    assert "its responses end at [3], those of model.path at [0]; set generation.eos_token_ids" in text
    assert prepare(against(job(), other, generation={"eos_token_ids": [0]})).eos.ids == (0,)


def test_another_chat_template_is_refused_at_the_prompt_that_it_changes(tmp_path: Path):
    own = chat_checkpoint(tmp_path / "b", chat_tokenizer())
    other_tokenizer = chat_tokenizer()
    other_tokenizer.chat_template = other_tokenizer.chat_template.replace("| trim", "| trim | upper | lower")
    same = chat_checkpoint(tmp_path / "same", other_tokenizer)
    other_tokenizer.chat_template = other_tokenizer.chat_template.replace("<|assistant|>", "<|system|>")
    other = chat_checkpoint(tmp_path / "a", other_tokenizer)
    job = job_on(own, write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"say {n}"} for n in range(4)]))
    config = job(data={"chat_template": True})
    assert prepare(against(config, same)).against is not None, "templates that render the same are the same"
    text = refused(against(config, other))
    assert "its chat template or tokenizer makes another prompt of" in text and "prompts.jsonl:1" in text


def test_a_shorter_context_of_the_other_checkpoint_counts(job, tmp_path: Path):
    other = save_checkpoint(tmp_path / "a", tiny_gpt2(8, torch.float32, positions=9), CHARACTERS)
    assert "passes the context of 9" in refused(against(job(), other))
    skipping = against(job(data={"on_long": "skip"}), other)
    assert "compare.against: got " in refused(skipping)


def test_a_resumed_comparison_refuses_another_earlier_checkpoint(job, tmp_path: Path):
    other = save_checkpoint(tmp_path / "a", tiny_gpt2(8, torch.float32, seed=1, positions=CONTEXT), CHARACTERS)
    config = against(job(), other)
    prepared = prepare(config)
    facts = ActorFacts(ParameterLayout((), ()), "cpu", 1, 0)
    earlier = Manifest.from_json(json.loads(json.dumps(Manifest.of(prepared, facts, {}).to_json())))
    check_same_inputs(prepare(config), earlier)
    assert earlier.against is not None and earlier.pass_.name == "two"
    save_checkpoint(other, tiny_gpt2(8, torch.float32, seed=2, positions=CONTEXT), CHARACTERS)
    with pytest.raises(ConfigError, match=r"compare\.against: got "):
        check_same_inputs(prepare(config), earlier)
