"""What travels of a run, what its manifest holds, and whether it may go on."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from support.adapters import write_adapter
from support.jobs import change_weights, chat_checkpoint, chat_tokenizer, job_on, plain_job, write_jsonl

from ray_probe import __version__
from ray_probe.config.loading import config_from_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.errors import ConfigError
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.run.manifest import Manifest, changed_settings, check_same_inputs
from ray_probe.run.messages import ActorFacts
from ray_probe.run.preparation.prepare import prepare
from ray_probe.run.preparation.prepared import PreparedRun, few_shards
from ray_probe.system import versions

PROMPTS = ["abc", "f", "a" * 20, "dd"]
ACTOR = ActorFacts(ParameterLayout((), ()), "cpu", 1, 10**9, frozen=("gate.bias",))


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., ProbeConfig]:
    """A config on a checkpoint and a prompts file of its own, with sections to change."""
    return plain_job(tmp_path, PROMPTS, characters="abcdef", context=32)


def written(prepared: PreparedRun) -> dict[str, Any]:
    """The manifest as it is read back."""
    found: dict[str, Any] = json.loads(json.dumps(Manifest.of(prepared, ACTOR, {"address": "local"}).to_json()))
    return found


# What travels


def test_a_prepared_run_travels_to_a_process_that_has_neither_torch_nor_transformers(job, tmp_path: Path):
    prepared = prepare(job())
    (tmp_path / "prepared.pickle").write_bytes(pickle.dumps(prepared))
    program = f"""
import pickle, sys
from pathlib import Path
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.run.manifest import Manifest
from ray_probe.run.messages import ActorFacts
from ray_probe.run.preparation.prepared import few_shards
prepared = pickle.loads(Path({str(tmp_path / "prepared.pickle")!r}).read_bytes())
found = Manifest.of(prepared, {ACTOR!r}, {{}}).to_json()
few_shards(prepared.config)
heavy = {{"torch", "transformers", "tokenizers", "ray", "pyarrow", "datasets", "matplotlib"}} & set(sys.modules)
print(sorted(heavy), found["policy_id"], prepared.plan.round(0)[0].prompts[0].text)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["[]", prepared.policy_id, prepared.plan.round(0)[0].prompts[0].text]
    assert pickle.loads(pickle.dumps(prepared)) == prepared


def test_a_prepared_run_weighs_what_its_prompts_weigh(job, tmp_path: Path):
    texts = ["abc" + "a" * (i % 9) for i in range(3000)]
    few, many = (prepare(job(data={"prompts": texts[:count]})) for count in (1000, 3000))
    assert len(pickle.dumps(few)) < 100_000
    bare = [len(pickle.dumps((p.plan.texts, p.plan.usable, p.config.data.prompts))) for p in (few, many)]
    assert len(pickle.dumps(many)) - bare[1] < 4000 and len(pickle.dumps(few)) - bare[0] < 4000


# The manifest


def test_the_manifest_holds_what_fixes_the_result(job, tmp_path: Path):
    prepared = prepare(job(data={"seed": 3}))
    found = written(prepared)
    assert found["versions"]["torch"] == version("torch") and found["versions"]["ray-probe"] == __version__
    assert found["frozen_parameters"] == ["gate.bias"]
    assert set(found["versions"]) == {"ray-probe", "python", "torch", "transformers", "tokenizers", "ray", "numpy"}
    assert found["checkpoint"] == {
        "path": str(tmp_path / "c"), "fingerprint": prepared.checkpoint.fingerprint,
        "adapter": None, "adapter_fingerprint": "", "tokenizer_from": "model.path", "chat_template_from": None,
    }  # fmt: skip
    assert found["prompts"] == {
        "source": str(tmp_path / "prompts.jsonl"), "sha256": prepared.prompts.sha256, "rendered_sha256": None,
        "count": 4, "skipped_as_too_long": 0, "longest_tokens": prepared.prompts.longest_tokens,
        "ending_with_eos": 0,
    }  # fmt: skip
    assert found["policy_id"] == prepared.policy_id
    assert (found["seed"], found["device"], found["threads_per_actor"]) == (3, "cpu", 1)
    assert (found["eos_token_ids"], found["eos_source"]) == ([0], "generation_config.json")
    assert found["cluster"] == {"address": "local"}
    assert list(found["shard_plan"]) == ["0/0", "0/1", "1/0", "1/1"]
    assert sorted(found["shard_plan"]["0/0"] + found["shard_plan"]["0/1"]) == [0, 1, 2, 3]
    assert config_from_dict(found["settings"]).data == prepared.config.data
    assert set(found["settings"]) == {"model", "data", "batch", "generation", "estimator", "compare"}


def test_the_manifest_counts_skipped_prompts_and_says_when_the_run_was_created(job):
    created = datetime(2026, 3, 1, 23, 59, 58, tzinfo=UTC)
    found = written(prepare(job(data={"max_prompt_tokens": 3, "on_long": "skip"}), created))
    assert found["prompts"]["skipped_as_too_long"] == 1
    assert datetime.fromisoformat(found["created"]) == created
    now = datetime.fromisoformat(written(prepare(job()))["created"])
    assert abs(datetime.now(UTC) - now) < timedelta(minutes=1)


def test_the_manifest_needs_no_installed_package_of_ours(job, monkeypatch: pytest.MonkeyPatch):
    def not_installed(name: str) -> str:
        if name == "ray-probe":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(versions, "version", not_installed)
    assert written(prepare(job()))["versions"]["ray-probe"] == __version__


def test_the_shard_plan_follows_from_prompts_seed_and_shard_size_alone(job):
    def plan(**sections: Any) -> Any:
        return written(prepare(job(**sections)))["shard_plan"]

    assert plan() == plan(cluster={"actors": 1}, generation={"temperature": 2.0})
    assert plan() != plan(data={"seed": 1})
    assert len(plan(batch={"shard_prompts": 3})) == 4


# Going on


def refused_to_go_on(now: PreparedRun, earlier: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        check_same_inputs(now, Manifest.from_json(earlier))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_run_may_go_on_with_the_same_inputs(job):
    check_same_inputs(prepare(job()), Manifest.from_json(written(prepare(job()))))


def test_a_run_may_go_on_on_another_cluster_and_with_another_output(job):
    now = prepare(job(cluster={"actors": 7, "gpus_per_actor": 1}, output={"save_gradient": True}))
    check_same_inputs(now, Manifest.from_json(written(prepare(job()))))


def test_a_run_may_not_go_on_with_other_weights(job, tmp_path: Path):
    earlier = written(prepare(job()))
    change_weights(tmp_path / "c")
    message = refused_to_go_on(prepare(job()), earlier)
    assert message.startswith("model.path: got ") and earlier["checkpoint"]["fingerprint"][:12] in message
    assert message.endswith("restore it, or start a new run")


def test_a_run_may_not_go_on_with_another_adapter_in_the_same_place(job, tmp_path: Path):
    settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    config = job(model={"adapter": str(write_adapter(tmp_path / "a", tmp_path / "c", **settings))})
    earlier = written(prepare(config))
    check_same_inputs(prepare(config), Manifest.from_json(earlier))
    write_adapter(tmp_path / "a", tmp_path / "c", seed=1, **settings)
    message = refused_to_go_on(prepare(config), earlier)
    assert message.startswith("model.adapter: got ") and earlier["checkpoint"]["adapter_fingerprint"][:12] in message


def test_a_run_may_not_go_on_with_other_prompts(job, tmp_path: Path):
    earlier = written(prepare(job()))
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "b"}\n')
    message = refused_to_go_on(prepare(job()), earlier)
    assert message.startswith("data.prompts: got ") and earlier["prompts"]["sha256"][:12] in message


def test_a_changed_setting_is_named_with_both_values(job):
    message = refused_to_go_on(prepare(job(generation={"top_p": 0.5})), written(prepare(job())))
    assert message == (
        "generation.top_p: got 0.5; the run was started with 0.95; restore it, or start a new run"
    )  # fmt: skip


def test_every_changed_setting_is_named(job):
    changed = job(data={"seed": 4}, estimator={"baseline": {"mode": "none", "features": ["H"]}})
    message = refused_to_go_on(prepare(changed), written(prepare(job())))
    assert message.startswith(
        "data.seed: got 4; the run was started with 0; restore it, or start a new run (and 2 more: "
    )
    assert "estimator.baseline.mode: got 'none'; the run was started with 'regression'" in message
    assert "estimator.baseline.features: got ['H']; the run was started with 'recommended'" in message


def test_a_list_of_prompts_that_changed_is_never_quoted(job):
    earlier = written(prepare(job(data={"prompts": ["abc", "dd"]})))
    for prompts in (["abc", "ddd"], ["abc", "dd", "f"]):
        message = refused_to_go_on(prepare(job(data={"prompts": prompts})), earlier)
        assert message.startswith("data.prompts: got ") and "abc" not in message and "dd'" not in message


def test_a_chat_run_goes_on_the_next_day_with_the_prompts_of_its_first(tmp_path: Path):
    """A template that writes today's date must not change a run that was started yesterday."""
    today = "{{ strftime_now('%d %b') + messages[0].content }}"
    checkpoint = chat_checkpoint(tmp_path / "c", chat_tokenizer(template=today))
    config = job_on(checkpoint, write_jsonl(tmp_path / "p.jsonl", [{"prompt": "why"}]))(data={"chat_template": True})
    monday = datetime(2026, 3, 2, 12, tzinfo=UTC)
    earlier = written(prepare(config, monday))
    check_same_inputs(prepare(config, datetime.fromisoformat(earlier["created"])), Manifest.from_json(earlier))
    message = refused_to_go_on(prepare(config, monday + timedelta(days=1)), earlier)
    assert message.startswith("data.chat_template: got ") and earlier["prompts"]["rendered_sha256"][:12] in message


@pytest.mark.parametrize("missing", ["settings", "policy_id", "columns"])
def test_a_manifest_of_another_version_is_refused_in_one_line(job, missing: str):
    earlier = written(prepare(job()))
    del earlier[missing]
    message = refused_to_go_on(prepare(job()), earlier)
    assert message.startswith(f"manifest.json: has no '{missing}'; the run was started by another version of ray_probe")


def test_a_run_goes_on_only_with_the_columns_that_it_was_started_with(job):
    earlier = written(prepare(job()))
    earlier["columns"] = earlier["columns"][:-1]
    message = refused_to_go_on(prepare(job()), earlier)
    assert message.startswith("estimator.baseline.features: got ['H', 'top1', ") and "start a new run" in message


def test_settings_compare_without_a_run():
    before, now = (
        config_from_dict({"model": {"path": path}, "data": {"prompts": ["a"]}, "cluster": {"actors": actors}})
        for path, actors in (("a", 1), ("b", 2))
    )
    assert changed_settings(before, before) == []
    assert changed_settings(now, before) == ["model.path: got 'b'; the run was started with 'a'"]


# Few shards


def sized(prompts: int, shard: int, actors: int) -> ProbeConfig:
    batch = {"prompts_per_round": prompts, "shard_prompts": shard}
    return config_from_dict(
        {"model": {"path": "m"}, "data": {"prompts": ["a"]}, "batch": batch, "cluster": {"actors": actors}}
    )


@pytest.mark.parametrize(
    ("prompts", "shard", "actors", "shards", "remedy"),
    [
        (32, 4, 5, 8, "set batch.shard_prompts to 3 or less, or raise batch.prompts_per_round to 40 or more"),
        (33, 16, 2, 3, "set batch.shard_prompts to 8 or less, or raise batch.prompts_per_round to 64 or more"),
        (3, 1, 2, 3, "raise batch.prompts_per_round to 4 or more"),
        (1, 4, 1, 1, "raise batch.prompts_per_round to 8 or more"),
    ],
)
def test_fewer_than_two_shards_an_actor_are_told_with_a_remedy_that_works(
    prompts: int, shard: int, actors: int, shards: int, remedy: str
):
    expected = f"a round has {shards} shards for {actors} actors, fewer than two each: actors will wait; {remedy}"
    assert few_shards(sized(prompts, shard, actors)) == expected
    assert few_shards(sized(int(remedy.split()[-3]), shard, actors)) is None
    if remedy.startswith("set"):
        assert few_shards(sized(prompts, int(remedy.split()[3]), actors)) is None


def test_two_shards_an_actor_are_enough_and_the_number_of_actors_can_be_another_than_the_configs():
    config = sized(32, 4, 4)
    assert few_shards(config) is None
    assert few_shards(config, actors=2) is None
    assert few_shards(config, actors=5) is not None
