"""What is checked, resolved and written down of a run before a cluster is touched."""

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.models import probe_config, save_checkpoint, tiny_gpt2

from ray_probe import __version__, versions
from ray_probe.config import ProbeConfig
from ray_probe.errors import CheckpointError, ConfigError, PromptsError
from ray_probe.preflight import Prepared, check_same_inputs, manifest, prepare

CHARACTERS = "abcdef"
CONTEXT = 32
PROMPTS = ["abc", "f", "a" * 20, "dd"]
ACTOR = {"device": "cpu", "threads": 1, "eos_ids": (0,)}


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., ProbeConfig]:
    """A config on a checkpoint and a prompts file of its own, with sections to change."""
    checkpoint = save_checkpoint(tmp_path / "c", tiny_gpt2(8, torch.float32, positions=CONTEXT), CHARACTERS)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))

    def build(**sections: Any) -> ProbeConfig:
        data = {"prompts": str(prompts)} | sections.pop("data", {})
        batch = {"prompts_per_round": 4, "shard_prompts": 2, "rounds": 2} | sections.pop("batch", {})
        generation = {"max_new_tokens": 8} | sections.pop("generation", {})
        return probe_config(checkpoint, data=data, batch=batch, generation=generation, **sections)

    return build


def refused(config: ProbeConfig, error: type[Exception] = PromptsError) -> str:
    with pytest.raises(error) as caught:
        prepare(config)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


# Prompts that fit, and those that do not


def test_a_prompt_that_passes_the_context_is_named_by_line_with_both_remedies(job, tmp_path: Path):
    message = refused(job(generation={"max_new_tokens": 13}))
    where = f"{tmp_path / 'prompts.jsonl'}:3: the prompt has 20 tokens, with generation.max_new_tokens 13"
    assert message == f"{where} it passes the context of 32; shorten it, or set data.on_long to skip"
    assert len(prepare(job(generation={"max_new_tokens": 12})).prompts) == 4


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
    assert (prepared.skipped, prepared.plan.usable, len(prepared.prompts)) == (skipped, usable, 4)
    used = {ref.index for n in range(2) for shard in prepared.plan.round(n) for ref in shard.prompts}
    assert used == set(usable)
    assert manifest(prepared, ACTOR, {})["prompts"]["skipped_as_too_long"] == skipped


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


def change_weights(directory: Path) -> None:
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (directory / "model.safetensors").write_bytes(data)


def test_other_weights_are_another_policy(job, tmp_path: Path):
    before = prepare(job()).policy_id
    change_weights(tmp_path / "c")
    assert prepare(job()).policy_id != before


# The manifest, and going on from it


def test_the_manifest_holds_what_fixes_the_result(job, tmp_path: Path):
    prepared = prepare(job(data={"seed": 3}))
    written = json.loads(json.dumps(manifest(prepared, ACTOR, {"address": "local"})))
    assert written["versions"]["torch"] == version("torch") and written["versions"]["ray-probe"] == __version__
    assert set(written["versions"]) == {"ray-probe", "python", "torch", "transformers", "tokenizers", "ray", "numpy"}
    assert written["checkpoint"] == {"path": str(tmp_path / "c"), "fingerprint": prepared.checkpoint.fingerprint}
    assert written["prompts"]["sha256"] == prepared.prompts.sha256 and written["prompts"]["count"] == 4
    assert written["policy_id"] == prepared.policy_id
    assert (written["seed"], written["device"], written["threads_per_actor"]) == (3, "cpu", 1)
    assert written["eos_token_ids"] == [0] and written["cluster"] == {"address": "local"}
    assert list(written["shard_plan"]) == ["0/0", "0/1", "1/0", "1/1"]
    assert sorted(written["shard_plan"]["0/0"] + written["shard_plan"]["0/1"]) == [0, 1, 2, 3]


def test_the_manifest_needs_no_installed_package_of_ours(job, monkeypatch: pytest.MonkeyPatch):
    def not_installed(name: str) -> str:
        if name == "ray-probe":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(versions, "version", not_installed)
    assert manifest(prepare(job()), ACTOR, {})["versions"]["ray-probe"] == __version__


def test_the_shard_plan_follows_from_prompts_seed_and_shard_size_alone(job):
    def plan(**sections: Any) -> dict[str, list[int]]:
        return manifest(prepare(job(**sections)), ACTOR, {})["shard_plan"]

    assert plan() == plan(cluster={"actors": 1}, generation={"temperature": 2.0})
    assert plan() != plan(data={"seed": 1})
    assert len(plan(batch={"shard_prompts": 3})) == 4


def refused_to_go_on(now: Prepared, earlier: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        check_same_inputs(now, earlier)
    return str(caught.value)


def test_a_run_may_go_on_with_the_same_inputs(job):
    check_same_inputs(prepare(job()), manifest(prepare(job()), ACTOR, {}))


def test_a_run_may_not_go_on_with_other_weights(job, tmp_path: Path):
    earlier = manifest(prepare(job()), ACTOR, {})
    change_weights(tmp_path / "c")
    message = refused_to_go_on(prepare(job()), earlier)
    assert message.startswith("model.path: got ") and earlier["checkpoint"]["fingerprint"][:12] in message
    assert message.endswith("restore it, or start a new run")


def test_a_run_may_not_go_on_with_other_prompts(job, tmp_path: Path):
    earlier = manifest(prepare(job()), ACTOR, {})
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "b"}\n')
    assert refused_to_go_on(prepare(job()), earlier).startswith("data.prompts: got ")


def test_a_run_may_not_go_on_under_another_policy(job):
    earlier = manifest(prepare(job()), ACTOR, {})
    assert refused_to_go_on(prepare(job(generation={"top_p": 0.5})), earlier).startswith("generation: got ")
