"""The callback in real trainers: every checkpoint is handed over, none is lost, and training hardly waits.

Needs TRL (pip install '.[test-slow]'): where it is missing, this file fails.
"""

import json
import re
import statistics
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.pages import page
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_probe.integrations import ProbeCallback

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def trainer_runs() -> ModuleType:
    """Imported late: `make test`, which has no TRL, collects this file too."""
    return import_module("support.trainer_runs")


def requests(output: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((output / ".ray_probe").glob("*.json"))]


@pytest.mark.parametrize(("train", "trainer"), [("grpo", "trl"), ("sft", "trl"), ("plain", "transformers")])
def test_every_checkpoint_of_a_trainer_that_keeps_one_is_handed_over(
    train: str, trainer: str, trainer_runs: ModuleType, tmp_path: Path
) -> None:
    remember = trainer_runs.Remember()
    getattr(trainer_runs, train)(tmp_path, [remember, ProbeCallback(tags={"run": "a"})], steps=30, every=5)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-30"]
    found = requests(tmp_path)
    assert [one["step"] for one in found] == [*remember.weights] == [5, 10, 15, 20, 25, 30]
    for one in found:
        assert (one["trainer"], one["tags"], one["pinned"]) == (trainer, {"run": "a"}, True)
        assert one["source"] == str(tmp_path / f"checkpoint-{one['step']}")
        state = json.loads((Path(one["checkpoint"]) / "trainer_state.json").read_text())
        assert state["global_step"] == one["step"]
        loaded = AutoModelForCausalLM.from_pretrained(one["checkpoint"], local_files_only=True).state_dict()
        weights = remember.weights[one["step"]]
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.items())
        assert AutoTokenizer.from_pretrained(one["checkpoint"], local_files_only=True).decode([2, 3])
    heads = [weights["lm_head.weight"] for weights in remember.weights.values()]
    assert not any(torch.equal(*pair) for pair in pairwise(heads))


def test_the_recipe_as_it_is_shown_hands_over_every_checkpoint(
    trainer_runs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", page("docs/trainers.md").section("TRL"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trl.GRPOConfig", partial(import_module("trl").GRPOConfig, **trainer_runs.SMALL))
    exec(code, {"model": trainer_runs.DEMO, "reward": trainer_runs.rightness, "prompts": trainer_runs.prompts()})
    found = requests(tmp_path / "out")
    assert [one["step"] for one in found] == [5, 10, 15, 20, 25, 30]
    for one in found:
        assert AutoModelForCausalLM.from_pretrained(one["checkpoint"], local_files_only=True).num_parameters() > 0


def test_adapters_are_handed_over_as_adapters(trainer_runs: ModuleType, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM, LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer_runs.sft(tmp_path, [ProbeCallback()], steps=4, every=2, peft_config=lora)
    found = requests(tmp_path)
    assert [(one["step"], one["pinned"]) for one in found] == [(2, True), (4, True)]
    for one in found:
        assert AutoPeftModelForCausalLM.from_pretrained(one["checkpoint"], local_files_only=True).num_parameters() > 0


def test_a_spool_that_cannot_be_written_does_not_stop_training(
    trainer_runs: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "spool").touch()
    trainer_runs.plain(tmp_path / "out", [ProbeCallback(tmp_path / "spool")], steps=2, every=1)
    assert (tmp_path / "out" / "checkpoint-2" / "model.safetensors").is_file()
    assert [record.levelname for record in caplog.records if record.name == "ray_probe"] == ["WARNING"] * 2


def test_the_callback_costs_training_less_than_50_ms_a_save(trainer_runs: ModuleType, tmp_path: Path) -> None:
    alone, beside, own = list[float](), list[float](), list[float]()
    for turn in range(3):  # in turns, so that a machine that slows down slows both
        clock = trainer_runs.Between()
        trainer_runs.plain(tmp_path / f"alone-{turn}", [clock], steps=12, every=1)
        alone += clock.with_save
        clock, callback = trainer_runs.Between(), trainer_runs.TimedProbeCallback()
        trainer_runs.plain(tmp_path / f"beside-{turn}", [clock, callback], steps=12, every=1)
        beside += clock.with_save
        own += callback.seconds
        assert len(requests(tmp_path / f"beside-{turn}")) == 12
    print(
        f"callback {1e3 * statistics.median(own):.2f} ms a save, at most {1e3 * max(own):.2f} ms; between steps "
        f"{1e3 * statistics.median(beside):.1f} ms with it and {1e3 * statistics.median(alone):.1f} ms without"
    )
    assert len(alone) == len(beside) == 3 * 11 and len(own) == 36
    assert statistics.median(own) < 0.05
    assert statistics.median(beside) - statistics.median(alone) < 0.05
