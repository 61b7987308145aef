"""A request is complete as soon as it is seen, and its pin outlasts the trainer's directory."""

import errno
import json
import logging
import os
import random
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_probe.checkpoints.files import CHECKPOINT_FILES
from ray_probe.errors import CheckpointError, ConfigError, OutputError
from ray_probe.integrations import spool as spool_module
from ray_probe.integrations.spool import MODEL_FILES, hand_over, request

MODEL = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
         "model.safetensors.index.json", "tokenizer.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
         "trainer_state.json")  # fmt: skip
OTHERS = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "README.md", ".tmpabc")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "out" / "checkpoint-120"
    (directory / "global_step120").mkdir(parents=True)
    for name in MODEL + OTHERS:
        (directory / name).write_text(f"content of {name}")
    return directory


def content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def left(spool: Path) -> list[str]:
    """Everything in a spool but its empty directory of pins."""
    return sorted(str(path.relative_to(spool)) for path in spool.rglob("*") if path != spool / "pins")


def test_a_request_has_the_documented_keys_and_names_the_pin(checkpoint: Path, tmp_path: Path) -> None:
    path = request(tmp_path / "spool", checkpoint, 120, "trl", {"run": "a"})
    assert path.parent == tmp_path / "spool" and path.name.startswith("000000000120-") and path.suffix == ".json"
    written = content(path)
    pin = Path(written.pop("checkpoint"))
    age = datetime.now().astimezone() - datetime.fromisoformat(written.pop("time"))
    assert timedelta(seconds=-1) < age < timedelta(minutes=1)
    assert written == {
        "schema_version": 1, "step": 120, "trainer": "trl", "tags": {"run": "a"}, "pinned": True,
        "source": str(checkpoint),
    }  # fmt: skip
    assert pin.parent == tmp_path / "spool" / "pins"
    assert pin.name.startswith("120-") and pin.name.removeprefix("120-").isalpha()


def test_a_pin_holds_what_a_model_needs_and_outlasts_the_directory(checkpoint: Path, tmp_path: Path) -> None:
    pin = Path(content(request(tmp_path / "spool", checkpoint, 120, "trl"))["checkpoint"])
    assert all((pin / name).samefile(checkpoint / name) for name in MODEL)
    shutil.rmtree(checkpoint)
    assert {path.name: path.read_text() for path in pin.iterdir()} == {name: f"content of {name}" for name in MODEL}


def test_the_files_of_a_model_are_those_that_a_measurement_reads() -> None:
    assert set(MODEL_FILES) == set(CHECKPOINT_FILES)


def test_a_link_to_a_file_is_followed(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "config.json").rename(tmp_path / "blob")
    (checkpoint / "config.json").symlink_to(tmp_path / "blob")
    pin = Path(content(request(tmp_path / "spool", checkpoint, 120, "trl"))["checkpoint"])
    (tmp_path / "blob").unlink()
    assert (pin / "config.json").read_text() == "content of config.json"


def test_a_model_inside_a_checkpoint_is_named_with_the_directory_of_its_step(checkpoint: Path, tmp_path: Path) -> None:
    inside = checkpoint / "global_step120"
    (inside / "model.safetensors").touch()
    for pin in (True, False):
        written = content(request(tmp_path / "spool", inside, 120, "verl", source=checkpoint, pin=pin))
        assert (written["source"], written["pinned"]) == (str(checkpoint), pin)
        assert (Path(written["checkpoint"]) / "model.safetensors").samefile(inside / "model.safetensors")


def test_relative_paths_become_absolute(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    written = content(request("spool", "checkpoint-120", 120, "trl"))
    assert written["source"] == str(checkpoint)
    assert Path(written["checkpoint"]).parent == checkpoint.parent / "spool" / "pins"


def test_names_sort_by_step_and_a_step_twice_makes_two_requests(checkpoint: Path, tmp_path: Path) -> None:
    made = [request(tmp_path / "spool", checkpoint, step, "trl") for step in (9, 10, 100, 100)]
    found = sorted((tmp_path / "spool").glob("*.json"))
    assert [content(path)["step"] for path in found] == [9, 10, 100, 100]
    assert set(found) == set(made)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EMLINK])
def test_where_links_are_impossible_the_directory_itself_is_named(
    number: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, made = os.link, list[str]()

    def link(source: str, target: Path) -> None:
        if made:  # also where it fails after the first file
            raise OSError(number, os.strerror(number))
        made.append(source)
        whole(source, target)

    monkeypatch.setattr(os, "link", link)
    path = request(tmp_path / "spool", checkpoint, 120, "trl")
    assert (content(path)["checkpoint"], content(path)["pinned"]) == (str(checkpoint), False)
    assert left(tmp_path / "spool") == [path.name]


@pytest.mark.parametrize(("spare", "pinned"), [(0, True), (-1, False)])
def test_no_pin_takes_the_room_of_the_trainers_next_saves(
    spare: int, pinned: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    (checkpoint / "global_step120" / "states.pt").write_bytes(b"x" * 5000)
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * size + spare)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    path = request(tmp_path / "spool", checkpoint, 120, "trl")
    assert (content(path)["pinned"], content(path)["source"]) == (pinned, str(checkpoint))
    assert [record.levelno for record in caplog.records] == ([] if pinned else [logging.WARNING])
    assert pinned or ("is not pinned" in caplog.text and left(tmp_path / "spool") == [path.name])


def test_a_directory_without_weights_at_its_top_is_named_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    for weights in checkpoint.glob("*.safetensors"):
        weights.rename(checkpoint / "global_step120" / weights.name)
    written = content(request(tmp_path / "spool", checkpoint, 120, "trl"))
    assert (written["checkpoint"], written["pinned"]) == (str(checkpoint), False)


def test_a_caller_can_leave_the_pin_out(checkpoint: Path, tmp_path: Path) -> None:
    path = request(tmp_path / "spool", checkpoint, 120, "verl", pin=False)
    assert (content(path)["checkpoint"], content(path)["pinned"]) == (str(checkpoint), False)
    assert left(tmp_path / "spool") == [path.name]


def test_a_reader_never_sees_a_part_of_a_request(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_in_two_parts(path: Path, text: str, encoding: str) -> None:
        with path.open("w", encoding=encoding) as stream:
            for part in (text[:9], text[9:]):
                assert list((tmp_path / "spool").glob("*.json")) == []
                assert len(list((tmp_path / "spool" / "pins").glob("120-*/*"))) == len(MODEL)
                stream.write(part)
                stream.flush()

    monkeypatch.setattr(Path, "write_text", write_in_two_parts)
    assert content(request(tmp_path / "spool", checkpoint, 120, "trl"))["step"] == 120


@pytest.mark.parametrize("pin", [True, False])
def test_a_directory_that_is_not_there_is_refused_and_leaves_nothing(tmp_path: Path, pin: bool) -> None:
    with pytest.raises(CheckpointError, match=r"^checkpoint: got '.*gone'; .*request it once it is written$"):
        request(tmp_path / "spool", tmp_path / "gone", 3, "trl", pin=pin)
    assert left(tmp_path / "spool") == []


def test_a_file_that_vanishes_while_it_is_pinned_is_said_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.link

    def link(source: str, target: Path) -> None:
        shutil.rmtree(checkpoint, ignore_errors=True)
        whole(source, target)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(CheckpointError, match="vanished while it was pinned"):
        request(tmp_path / "spool", checkpoint, 120, "trl")
    assert left(tmp_path / "spool") == []


def test_a_disk_without_room_is_said_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text[:9].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"^spool: got .*No space left on device.*make room"):
        request(tmp_path / "spool", checkpoint, 120, "trl")
    assert left(tmp_path / "spool") == []


def test_a_step_may_be_an_integer_of_numpy(checkpoint: Path, tmp_path: Path) -> None:
    assert content(request(tmp_path / "spool", checkpoint, np.int64(120), "mine"))["step"] == 120


@pytest.mark.parametrize(
    ("step", "tags", "field"),
    [(-1, {}, "step"), (True, {}, "step"), (1.0, {}, "step"), (1, {"lr": 1e-6}, "tags"), (1, {3: "x"}, "tags")],
)
def test_a_bad_value_is_named_in_one_line(
    step: Any, tags: Any, field: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: got [^\n]+; give [^\n]+$"):
        request(tmp_path / "spool", checkpoint, step, "trl", tags)
    assert not (tmp_path / "spool").exists()


def test_the_seed_of_a_trainer_neither_fixes_the_names_nor_is_used_up(checkpoint: Path, tmp_path: Path) -> None:
    names = set()
    for _ in range(2):
        random.seed(7)
        names.add(request(tmp_path / "spool", checkpoint, 120, "trl").name)
        after = random.random()
    random.seed(7)
    assert after == random.random()
    assert len(names) == 2


def test_handing_over_makes_a_request(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hand_over(tmp_path / "spool", checkpoint, 120, "mine", {"run": "a"})
    (path,) = (tmp_path / "spool").glob("*.json")
    assert (content(path)["trainer"], content(path)["tags"], content(path)["pinned"]) == ("mine", {"run": "a"}, True)
    assert caplog.records == []


def test_handing_over_turns_a_failure_into_one_warning(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "spool").write_text("a file where the spool should be")
    hand_over(tmp_path / "spool", checkpoint, 120, "mine")
    assert [(record.levelno, record.name) for record in caplog.records] == [(logging.WARNING, "ray_probe")]
    assert "will not be measured: spool: got" in caplog.text and "\n" not in caplog.records[0].getMessage()
    assert spool_module.SPOOL == ".ray_probe"
