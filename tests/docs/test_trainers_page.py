"""Each recipe of docs/trainers.md, run as it is shown, hands over every checkpoint of its trainer."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import stand_ins
from support.models import character_tokenizer, tiny_llama
from support.pages import page
from transformers import TrainingArguments

from ray_probe.integrations.spool import SCHEMA_VERSION, SPOOL

PAGE = page("docs/trainers.md")


def blocks(heading: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.section(heading), re.DOTALL)


def requests(spool: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(spool.glob("*.json"))]


def weights(found: dict[str, Any]) -> bytes:
    return (Path(found["checkpoint"]) / "model.safetensors").read_bytes()


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_page_is_short_and_has_a_recipe_for_each_trainer() -> None:
    assert len(PAGE.text.splitlines()) <= 130
    assert PAGE.headings()[1:6] == ["TRL", "transformers", "verl", "SkyRL", "Any directory"]


@pytest.mark.parametrize("heading", ["TRL", "transformers"])
def test_every_checkpoint_of_trl_and_transformers_is_handed_over(
    heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = blocks(heading)
    rows = [{"input_ids": [2, 3, 4], "labels": [2, 3, 4]}] * 80
    tokenizer = character_tokenizer("0123456789")
    given = {"model": tiny_llama(12), "tokenizer": tokenizer, "reward": None, "prompts": rows, "examples": rows}
    stand_ins.importable(monkeypatch, "trl", GRPOConfig=TrainingArguments, GRPOTrainer=stand_ins.GRPOTrainer)
    exec(code, given)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-30"]
    found = requests(tmp_path / "out" / SPOOL)
    assert [one["step"] for one in found] == [5, 10, 15, 20, 25, 30]
    assert len({weights(one) for one in found}) == 6
    assert {tuple(one["tags"].items()) for one in found} == {(("run", "a"),) if heading == "TRL" else ()}
    assert all((Path(one["checkpoint"]) / "tokenizer.json").is_file() == (heading != "TRL") for one in found)


@pytest.mark.parametrize("inside", ["huggingface", "model/huggingface"])
def test_every_checkpoint_of_verl_is_handed_over(inside: str, tmp_path: Path) -> None:
    (code,) = blocks("verl", "sh")
    (name,) = re.findall(r"trainer\.checkpoint_callback_class=(\S+)", code)
    (output,) = re.findall(r"trainer\.default_local_dir=(\S+)", code)
    stand_ins.verl(name, tmp_path / output, steps=3, inside=inside)
    shutil.rmtree(tmp_path / output / "global_step_1")
    found = requests(tmp_path / "out" / SPOOL)
    assert [(one["step"], weights(one)) for one in found] == [(step, stand_ins.WEIGHTS % step) for step in (1, 2, 3)]


def test_a_subclass_for_verl_has_its_own_spool_and_tags(tmp_path: Path) -> None:
    (code,) = blocks("verl")
    names: dict[str, Any] = {}
    exec(code.replace("/shared", str(tmp_path)), names)
    stand_ins.verl(names["MyCallback"], tmp_path / "out", steps=2, inside="huggingface")
    found = requests(tmp_path / "spool")
    assert [(one["step"], one["tags"]) for one in found] == [(step, {"run": "a"}) for step in (1, 2)]


def test_every_export_of_skyrl_is_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("SkyRL")
    names: dict[str, Any] = {}
    stand_ins.importable(monkeypatch, "skyrl.train.trainer", RayPPOTrainer=stand_ins.RayPPOTrainer)
    stand_ins.importable(monkeypatch, "skyrl.train.entrypoints.main_base", BasePPOExp=stand_ins.BasePPOExp)
    exec(code, names)
    settings = SimpleNamespace(export_path=str(tmp_path / "exports"), hf_save_interval=2)
    names["Experiment"](SimpleNamespace(trainer=settings, steps=5)).run()
    found = requests(tmp_path / "exports" / SPOOL)
    assert [(one["step"], weights(one)) for one in found] == [(step, stand_ins.WEIGHTS % step) for step in (2, 4, 5)]
    assert all(one["tags"] == {"run": "a"} for one in found)


def test_a_loop_of_ones_own_hands_over_what_it_has_saved(tmp_path: Path) -> None:
    (code,) = blocks("Any directory")
    for step in (1, 2):
        save = partial(lambda path, step: stand_ins.write_model(Path(path), step), step=step)
        exec(code, {"model": SimpleNamespace(save_pretrained=save), "step": step,
                    "tokenizer": SimpleNamespace(save_pretrained=lambda path: None)})  # fmt: skip
    found = requests(tmp_path / "out" / SPOOL)
    assert [(one["step"], weights(one)) for one in found] == [(step, stand_ins.WEIGHTS % step) for step in (1, 2)]


def test_the_table_has_the_keys_of_a_request(tmp_path: Path) -> None:
    stand_ins.verl("ray_probe.integrations.verl.ProbeCheckpointCallback", tmp_path, steps=1, inside="huggingface")
    (found,) = requests(tmp_path / SPOOL)
    rows = re.findall(r"^\| (`.+?) \|(.*)\|$", PAGE.section("What a hook does"), re.MULTILINE)
    assert [key for keys, _ in rows for key in re.findall(r"`(\w+)`", keys)] == list(found)
    assert rows[0][1].strip() == str(SCHEMA_VERSION)
