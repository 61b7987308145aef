"""A watch takes each finished checkpoint once, in order, and holds it until it is measured."""

import os
import shutil
from pathlib import Path

import pytest
from support.trainer_scripts import SCRIPTS
from support.trainers import Write, adapter, as_json, tensors
from support.watching import Watch, saved

from ray_probe.watch import pins


def test_each_checkpoint_is_compared_with_the_one_before_and_its_gradient_taken(tmp_path: Path) -> None:
    watch = Watch(tmp_path, responses=4)
    for step in (5, 10, 15):
        saved(watch.root, step)
    assert set(watch.step().values()) == {"queued"}
    assert watch.asked() == [
        ("checkpoint-5", None), ("checkpoint-10", "checkpoint-5"), ("checkpoint-10", None),
        ("checkpoint-15", "checkpoint-10"), ("checkpoint-15", None),
    ]  # fmt: skip
    first, *rest = [one["settings"] for one in watch.service.asked.values()]
    assert [one["series.step"] for one in (first, *rest)] == [5, 10, 10, 15, 15]
    assert {one["series.name"] for one in (first, *rest)} == {"demo"}
    runs = [str(watch.service.directory / f"m000{n}") for n in range(1, 6)]
    assert (first["compare.side"], first["compare.keep_responses"], first["compare.responses_from"]) == (0, True, None)
    compared, gradients = [rest[0], rest[2]], [rest[1], rest[3]]
    assert [(one["compare.side"], one["compare.responses_from"]) for one in compared] == [(0, runs[0]), (1, runs[2])]
    assert all(one["compare.keep_responses"] and one["batch.responses_per_prompt"] == 8 for one in compared)
    assert [(one["compare.side"], one["compare.responses_from"]) for one in gradients] == [(1, runs[1]), (0, runs[3])]
    assert all(one["compare.keep_responses"] for one in gradients), "the next comparison takes them from the gradient"
    watch.service.end_all()
    assert set(watch.step().values()) == {"measured"} and watch.watcher.settled()


def test_a_service_whose_number_of_responses_is_not_known_shares_none_with_gradients(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    saved(watch.root, 5)
    saved(watch.root, 10)
    watch.step()
    first, compared, gradient = [one["settings"] for one in watch.service.asked.values()]
    assert "compare.side" not in first and "compare.side" not in gradient
    assert "batch.responses_per_prompt" not in compared and compared["compare.responses_from"] is None


def test_without_gradients_a_first_checkpoint_is_measured_by_the_next_comparison(tmp_path: Path) -> None:
    watch = Watch(tmp_path, gradient=False)
    saved(watch.root, 5)
    assert watch.step() == {"checkpoint-5": "queued"} and watch.watcher.settled()
    saved(watch.root, 10)
    watch.step()
    assert watch.asked() == [("checkpoint-10", "checkpoint-5")]
    watch.service.end_all()
    watch.step()
    assert set(watch.step().values()) == {"measured"}


def test_a_checkpoint_that_is_deleted_once_it_was_ready_is_measured_all_the_same(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    for step in (5, 10, 15):
        directory = saved(watch.root, step)
        watch.step()
        shutil.rmtree(directory)
        watch.step()
    assert watch.asked()[-2:] == [("checkpoint-15", "checkpoint-10"), ("checkpoint-15", None)]
    watch.service.end_all()  # it checks that the files are there
    assert set(watch.step().values()) == {"measured"}


def test_pins_are_hard_links_and_go_once_nothing_reads_them(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    directory = saved(watch.root, 5)
    watch.step()
    (pinned,) = (tmp_path / "watch" / "pins").glob("*/checkpoint-5")
    assert os.path.samefile(pinned / "model.safetensors", directory / "model.safetensors")
    assert {path.name for path in pinned.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }, "neither optimizer nor trainer_state.json"  # fmt: skip
    watch.service.end_all()
    watch.step()
    assert watch.pins == ["checkpoint-5"], "the next checkpoint is compared with it"
    saved(watch.root, 10)
    watch.step()
    assert watch.pins == ["checkpoint-10", "checkpoint-5"]
    watch.service.end_all()
    watch.step()
    assert watch.pins == ["checkpoint-10"]


def test_files_are_copied_where_hard_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    watch = Watch(tmp_path)
    directory = saved(watch.root, 5)
    watch.step()
    (pinned,) = (tmp_path / "watch" / "pins").glob("*/checkpoint-5/model.safetensors")
    assert pinned.read_bytes() == (directory / "model.safetensors").read_bytes() and pinned.stat().st_nlink == 1


def test_a_disk_without_room_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(tmp_path)
    saved(watch.root, 5)
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        patched.setattr(shutil, "copy2", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert watch.step() == {"checkpoint-5": "waiting"}
    assert "make room" in watch.whys()["checkpoint-5"] and watch.pins == []
    assert watch.step() == {"checkpoint-5": "queued"}


@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_that_vanishes_while_it_is_pinned_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    watch, link = Watch(tmp_path), os.link
    directory = saved(watch.root, 5)

    def vanishing(source: Path, target: Path) -> None:
        if Path(source).name == "tokenizer.json":
            shutil.rmtree(directory) if whole else Path(source).unlink()
        link(source, target)

    monkeypatch.setattr(os, "link", vanishing)
    assert watch.step() == {"checkpoint-5": "vanished" if whole else "waiting"}
    assert watch.pins == [] and watch.asked() == []


def test_a_half_written_checkpoint_that_goes_has_vanished(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    directory = saved(watch.root, 5)
    (directory / "trainer_state.json").unlink()
    assert watch.step() == {"checkpoint-5": "waiting"}
    assert watch.said == [("checkpoint-5", "waiting", "trainer_state.json")]
    shutil.rmtree(directory)
    assert watch.step() == {"checkpoint-5": "vanished"}
    watch.step()
    assert len(watch.said) == 2, "a state is said once"


def test_a_measurement_that_fails_or_is_lost_is_said_with_its_cause(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    saved(watch.root, 5)
    watch.step()
    watch.service.end("m0001", "failed", "generation.parity_tolerance: got 0.2", 5)
    assert watch.step() == {"checkpoint-5": "skipped"}
    assert watch.whys()["checkpoint-5"] == "m0001 failed: generation.parity_tolerance: got 0.2"
    assert watch.entries.items[0].code == 5 and not watch.entries.items[0].chosen
    saved(watch.root, 10)
    watch.step()
    watch.service.lose()
    assert watch.step()["checkpoint-10"] == "skipped"


def test_a_checkpoint_that_the_service_refuses_is_skipped_and_the_next_one_taken(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    for step in (5, 10, 15):
        saved(watch.root, step)
    watch.service.refused["checkpoint-10"] = "model.path: got 'checkpoint-10'; its weights are quantised"
    watch.step()
    assert watch.states["checkpoint-10"] == "skipped" and "quantised" in watch.whys()["checkpoint-10"]
    assert watch.asked() == [("checkpoint-5", None), ("checkpoint-15", "checkpoint-5"), ("checkpoint-15", None)]
    assert "checkpoint-10" not in watch.pins


def test_a_service_that_drains_is_waited_for(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    saved(watch.root, 5)
    watch.service.draining = True
    assert watch.step() == {"checkpoint-5": "waiting"} and "drains" in watch.whys()["checkpoint-5"]
    watch.service.draining = False
    assert watch.step() == {"checkpoint-5": "queued"}


def test_from_leaves_out_earlier_steps(tmp_path: Path) -> None:
    watch = Watch(tmp_path, from_step=10)
    for step in (0, 5, 10):
        saved(watch.root, step)
    assert watch.step() == {"checkpoint-0": "skipped", "checkpoint-5": "skipped", "checkpoint-10": "queued"}


def test_latest_drops_what_is_behind_and_withdraws_what_has_not_begun(tmp_path: Path) -> None:
    watch = Watch(tmp_path, latest=True)
    for step in (5, 10):
        saved(watch.root, step)
    assert watch.step() == {"checkpoint-5": "skipped", "checkpoint-10": "queued"}
    watch.service.begin("m0001")
    saved(watch.root, 15)
    watch.step()
    saved(watch.root, 20)
    watch.step()
    assert watch.states == {
        "checkpoint-5": "skipped", "checkpoint-10": "queued", "checkpoint-15": "skipped", "checkpoint-20": "queued"
    }  # fmt: skip
    assert watch.asked()[-2:] == [("checkpoint-20", "checkpoint-10"), ("checkpoint-20", None)]
    assert [info.state for info in watch.service.results()][:3] == ["running", "cancelled", "cancelled"]


def test_latest_without_gradients_still_compares(tmp_path: Path) -> None:
    watch = Watch(tmp_path, latest=True, gradient=False)
    for step in (5, 10):
        saved(watch.root, step)
        watch.step()
    assert watch.asked() == [("checkpoint-10", "checkpoint-5")]


def test_a_step_that_comes_late_is_not_compared(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    saved(watch.root, 10)
    watch.step()
    saved(watch.root, 5)
    watch.step()
    assert watch.asked() == [("checkpoint-10", None), ("checkpoint-5", None)]
    assert watch.whys()["checkpoint-5"] == "not compared: step 10 was there first"
    saved(watch.root, 15)
    watch.step()
    assert watch.asked()[-2] == ("checkpoint-15", "checkpoint-10")


def test_an_adapter_is_pinned_and_measured_on_its_base(tmp_path: Path) -> None:
    base = saved(tmp_path.resolve(), 0, "base")
    watch = Watch(tmp_path)
    for step in (5, 10):
        for phase in [*adapter(f"checkpoint-{step}", str(base)),
                      [Write(f"checkpoint-{step}/trainer_state.json", as_json({"global_step": step}))]]:  # fmt: skip
            for write in phase:
                for one in write.steps():
                    one(watch.root)
        path = watch.root / f"checkpoint-{step}" / "adapter_model.safetensors"
        path.write_bytes(tensors(step))
    watch.step()
    assert watch.asked()[1] == ("checkpoint-10", "checkpoint-5")
    one = watch.service.asked["m0002"]
    assert one["path"] == str(base) and Path(one["adapter"]).parent.parent == tmp_path.resolve() / "watch" / pins.PINS


def test_a_base_completes_weights_without_config_and_tokenizer(tmp_path: Path) -> None:
    base = saved(tmp_path.resolve(), 0, "base")
    watch = Watch(tmp_path, base=base)
    directory = saved(watch.root, 5)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    watch.step()
    (pinned,) = (tmp_path / "watch" / "pins").glob("*/checkpoint-5")
    assert {path.name for path in pinned.iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors"}
    assert os.path.samefile(pinned / "model.safetensors", directory / "model.safetensors")


def test_a_directory_that_its_trainer_renames_has_not_vanished(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    for phase in SCRIPTS["NeMo-RL, consolidated"].phases:
        for write in phase:
            for one in write.steps():
                one(watch.root)
                watch.step()
    watch.step()
    assert [state for _, state, _ in watch.said if state != "waiting"] == ["queued"]
