"""Requests of a trainer's hook: read when whole, handled as found checkpoints, gone once the files are held."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.watching import Watch, saved

from ray_probe.integrations.spool import request as request_of_a_hook
from ray_probe.watch.layouts import QUIET_S


def request(spool: Path, checkpoint: Path, step: int | None, name: str = "a", **more: Any) -> Path:
    """Drop a request as the hook does: written whole, then renamed."""
    spool.mkdir(parents=True, exist_ok=True)
    raw = {"schema_version": 1, "checkpoint": str(checkpoint), "step": step, "trainer": "trl",
           "time": "2026-11-29T16:00:00+00:00", **more}  # fmt: skip
    (spool / f".{name}.tmp").write_text(json.dumps(raw))
    (spool / f".{name}.tmp").replace(spool / f"{name}.json")
    return spool / f"{name}.json"


def pinned(spool: Path, directory: Path, name: str) -> Path:
    """Pin a checkpoint as the hook does: by hard links, without states to resume from."""
    place = spool / "pins" / name
    place.mkdir(parents=True)
    for path in [*directory.glob("*.json"), *directory.glob("*.safetensors")]:
        os.link(path, place / path.name)
    return place


def test_a_request_gives_step_and_tags_and_goes_once_its_files_are_held(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    elsewhere = saved(tmp_path, 7, "run-{}")
    file = request(watch.spool.directory, elsewhere, 7, tags={"lr": 1e-6, "arm": "b"}, unknown=[1])
    assert watch.step() == {"run-7": "queued"}
    settings = watch.service.asked["m0001"]["settings"]
    assert (settings["series.step"], settings["series.tags"]) == (7, {"lr": "1e-06", "arm": "b"})
    assert not file.exists() and elsewhere.is_dir()


def test_the_layout_decides_whether_a_requested_checkpoint_is_finished(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    elsewhere = saved(tmp_path, 7, "checkpoint-{}")
    state = elsewhere / "trainer_state.json"
    whole = state.read_bytes()
    state.write_bytes(whole[:4])
    file = request(watch.spool.directory, elsewhere, 7)
    assert watch.step() == {"checkpoint-7": "waiting"} and file.exists()
    state.write_bytes(whole)
    assert watch.step() == {"checkpoint-7": "queued"} and not file.exists()


@pytest.mark.parametrize("found_first", [True, False])
def test_a_checkpoint_that_its_hook_has_pinned_is_measured_once_whatever_was_seen_first(
    tmp_path: Path, found_first: bool
) -> None:
    watch = Watch(tmp_path)
    directory = saved(watch.root, 5)
    if found_first:
        watch.step()
    place = pinned(watch.spool.directory, directory, "5-ab12")
    file = request(watch.spool.directory, place, 5, source=str(directory), pinned=True)
    watch.step()
    watch.step()
    assert watch.asked() == [("checkpoint-5", None)] and watch.states == {"checkpoint-5": "queued"}
    assert not file.exists() and not place.exists(), "the watch holds the files itself"


def test_a_checkpoint_that_was_rotated_away_is_measured_from_the_pin_of_its_hook(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    for step in (5, 10):
        directory = saved(watch.root, step)
        place = pinned(watch.spool.directory, directory, f"{step}-ab12")
        request(watch.spool.directory, place, step, name=str(step), source=str(directory))
        shutil.rmtree(directory)
    watch.step()
    assert watch.asked() == [("checkpoint-5", None), ("checkpoint-10", "checkpoint-5"), ("checkpoint-10", None)]
    watch.service.end_all()
    assert set(watch.step().values()) == {"measured"}
    assert list((watch.spool.directory / "pins").iterdir()) == []


def test_a_request_whose_checkpoint_is_gone_is_said_and_removed(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    file = request(watch.spool.directory, watch.root / "checkpoint-5", 5)
    assert watch.step() == {"checkpoint-5": "vanished"} and not file.exists()


def test_a_request_that_an_option_leaves_out_goes_with_its_pin(tmp_path: Path) -> None:
    watch = Watch(tmp_path, from_step=10)
    place = pinned(watch.spool.directory, saved(tmp_path, 5), "5-ab12")
    file = request(watch.spool.directory, place, 5, source=str(tmp_path / "checkpoint-5"))
    assert watch.step() == {"checkpoint-5": "skipped"} and not file.exists() and not place.exists()


@pytest.mark.parametrize(("raw", "said"), [
    ("{", "it is no JSON object"), ("[]", "it is no JSON object"),
    ('{"schema_version": 2}', "its schema_version is 2, need 1"),
    ('{"schema_version": true, "checkpoint": "/a"}', "its schema_version is True, need 1"),
    ('{"schema_version": 1}', "its checkpoint is None, need an absolute path"),
    ('{"schema_version": 1, "checkpoint": "relative"}', "its checkpoint is 'relative', need an absolute path"),
    ('{"schema_version": 1, "checkpoint": "/a", "source": 3}', "its source is 3, need an absolute path"),
    ('{"schema_version": 1, "checkpoint": "/a", "step": -1}', "its step is -1, need an integer >= 0 or null"),
    ('{"schema_version": 1, "checkpoint": "/a", "step": "5"}', "its step is '5', need an integer >= 0 or null"),
    ('{"schema_version": 1, "checkpoint": "/a", "tags": []}', "its tags are [], need an object"),
])  # fmt: skip
def test_a_malformed_request_is_put_aside_and_said(tmp_path: Path, raw: str, said: str) -> None:
    watch = Watch(tmp_path)
    watch.spool.directory.mkdir(parents=True)
    file = watch.spool.directory / "bad.json"
    file.write_text(raw)
    saved(watch.root, 5)
    assert watch.step() == {"checkpoint-5": "queued"}
    assert watch.log == [f"{file}: {said}; it is now bad.json.rejected"]
    assert (watch.spool.directory / "bad.json.rejected").read_text() == raw and not file.exists()


def test_a_request_never_has_files_outside_the_spool_removed(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    directory = saved(tmp_path, 5)
    (watch.spool.directory / "pins").mkdir(parents=True)
    (watch.spool.directory / "pins" / "link").symlink_to(directory)
    for number, path in enumerate([directory, watch.spool.directory / "pins" / ".." / ".." / ".." / "checkpoint-5",
                                   watch.spool.directory / "pins" / "link"]):  # fmt: skip
        request(watch.spool.directory, path, 5, name=str(number))
    watch.step()
    assert (directory / "model.safetensors").is_file()


def test_requests_of_a_trainer_that_always_writes_into_one_directory_are_all_measured(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    for step in (5, 10):
        directory = saved(tmp_path, step, "latest")
        place = pinned(watch.spool.directory, directory, f"{step}-abc")
        request(watch.spool.directory, place, step, name=str(step), source=str(directory))
        shutil.rmtree(directory)
    watch.step()
    assert [one["settings"]["series.step"] for one in watch.service.asked.values()] == [5, 10, 10]
    assert watch.asked()[1] == ("latest", "latest")


@pytest.mark.parametrize("pin", [True, False])
def test_a_request_of_the_shipped_hook_is_understood(tmp_path: Path, pin: bool) -> None:
    watch = Watch(tmp_path)
    for step in (5, 10):
        directory = saved(watch.root, step)
        request_of_a_hook(watch.spool.directory, directory, step, "trl", {"arm": "b"}, pin=pin)
        if pin:
            shutil.rmtree(directory)
    watch.step()
    watch.step()
    assert watch.asked() == [("checkpoint-5", None), ("checkpoint-10", "checkpoint-5"), ("checkpoint-10", None)]
    settings = [one["settings"] for one in watch.service.asked.values()]
    assert [(one["series.step"], one["series.tags"]) for one in settings] == [(n, {"arm": "b"}) for n in (5, 10, 10)]
    assert list(watch.spool.directory.glob("*.json")) == [] and watch.log == []
    assert not (watch.spool.directory / "pins").exists() or list((watch.spool.directory / "pins").iterdir()) == []


def test_a_model_inside_a_trainers_directory_is_measured_under_the_name_of_that_directory(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    inside = saved(watch.root / "global_step_5" / "actor", 5, "huggingface")
    (inside / "trainer_state.json").unlink()
    request_of_a_hook(watch.spool.directory, inside, 5, "verl", source=watch.root / "global_step_5")
    assert watch.step() == {"global_step_5": "waiting"}
    assert watch.step(QUIET_S) == {"global_step_5": "queued"}
    (watch.root / "latest_checkpointed_iteration.txt").write_text("5")
    watch.step()
    watch.step(QUIET_S)
    assert len(watch.service.asked) == 1, "found in the directory too, it is the same checkpoint"
