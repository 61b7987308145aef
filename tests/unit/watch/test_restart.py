"""A restarted watch goes on where it was, and knows checkpoints by their bytes."""

import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trainers import as_json, tensors
from support.watching import Watch, saved

from ray_probe.errors import ConfigError


def test_a_restart_goes_on_where_the_watch_was_ended(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    saved(watch.root, 5)
    watch.step()
    watch.service.end_all()
    watch.step()
    saved(watch.root, 10)
    again = Watch(tmp_path, watch.service)
    assert again.step() == {"checkpoint-5": "measured", "checkpoint-10": "queued"}
    assert again.asked() == [("checkpoint-5", None), ("checkpoint-10", "checkpoint-5"), ("checkpoint-10", None)]


def test_a_restart_knows_checkpoints_by_their_bytes_and_not_by_their_names(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    for step in (5, 10):
        saved(watch.root, step)
    watch.step()
    moved, kept = watch.root / "checkpoint-5", watch.root / "checkpoint-10"
    moved.rename(watch.root / "best-5")
    for path in kept.iterdir():
        os.utime(path, (1, 1))
    again = Watch(tmp_path, watch.service)
    again.step()
    assert len(again.service.asked) == 3, "nothing is queued twice"
    assert again.states["best-5"] == "skipped" and again.whys()["best-5"] == "it has the files of checkpoint-5"


def test_a_step_that_is_written_again_with_other_weights_is_measured_again(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    directory = saved(watch.root, 5)
    watch.step()
    watch.service.end_all()
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").write_bytes(tensors(40))
    watch.step()
    assert watch.asked() == [("checkpoint-5", None), ("checkpoint-5", "checkpoint-5"), ("checkpoint-5", None)]


def test_files_that_a_trainer_adds_later_change_nothing(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    directory = saved(watch.root, 5)
    watch.step()
    (directory / "entropy_ctrl_state.json").write_bytes(as_json({}))
    watch.step()
    assert watch.asked() == [("checkpoint-5", None)]


def test_a_watch_that_dies_between_queueing_and_writing_does_not_queue_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(tmp_path)
    saved(watch.root, 5)
    save, probe = watch.entries.save, watch.service.probe

    def dying(*args: object, **options: object) -> str:
        probe(*args, **options)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.service, "probe", dying)
    with pytest.raises(KeyboardInterrupt):
        watch.step()
    monkeypatch.undo()
    assert save is not None and len(watch.service.asked) == 1
    assert Watch(tmp_path, watch.service).step() == {"checkpoint-5": "queued"}
    assert len(watch.service.asked) == 1


def test_another_service_measures_what_was_open_and_not_what_was_measured(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    saved(watch.root, 5)
    watch.step()
    watch.service.end_all()
    watch.step()
    saved(watch.root, 10)
    watch.step()
    other = Watch(tmp_path, type(watch.service)(tmp_path / "other"))
    other.step()
    assert other.asked() == [("checkpoint-10", "checkpoint-5"), ("checkpoint-10", None)]


def test_every_takes_each_nth_finished_checkpoint_over_restarts_too(tmp_path: Path) -> None:
    watch = Watch(tmp_path, every=3)
    for step in range(1, 6):
        saved(watch.root, step)
    watch.step()
    again = Watch(tmp_path, watch.service, every=3)
    for step in range(6, 9):
        saved(again.root, step)
    again.step()
    taken = [name for name, state in again.states.items() if state == "queued"]
    assert sorted(taken) == ["checkpoint-1", "checkpoint-4", "checkpoint-7"]
    assert again.whys()["checkpoint-2"] == "--every 3"


def test_a_damaged_state_file_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    saved(watch.root, 5)
    watch.step()
    path = tmp_path / "watch" / "watch.json"
    path.write_bytes(path.read_bytes().replace(b"queued", b"broken", 1))
    with pytest.raises(ConfigError, match=r"cannot be read .* move it away"):
        Watch(tmp_path, watch.service)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(["save", "rotate", "look", "look", "measure", "restart"]), min_size=8, max_size=24))
def test_whatever_happens_each_checkpoint_that_was_seen_is_measured_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, events: list[str]
) -> None:
    home = tmp_path_factory.mktemp("life")
    watch, there, seen, newest = Watch(home), list[Path](), list[str](), 0
    for event in [*events, "look"]:
        if event == "save":
            newest += 5
            there.append(saved(watch.root, newest))
        elif event == "rotate" and there:
            shutil.rmtree(there.pop(0))
        elif event == "measure":
            waiting = [info.id for info in watch.service.results() if info.state == "queued"]
            for identity in waiting[:1]:
                watch.service.end(identity)
        elif event == "restart":
            watch = Watch(home, watch.service)
        elif event == "look":
            watch.step()
            seen += [path.name for path in there if path.name not in seen]
    watch.service.end_all()
    watch.step()
    assert [one["checkpoint"] for one in watch.service.asked.values() if one["against"] is None] == seen
    assert [(a, b) for b, a in watch.asked() if a is not None] == list(pairwise(seen))
    assert {name: watch.states[name] for name in seen} == dict.fromkeys(seen, "measured")
    assert watch.pins == seen[-1:]
