"""Each hook hands over the right directory and step at its trainer's event, and never raises."""

import copy
import json
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_probe.integrations import ProbeCallback
from ray_probe.integrations.skyrl import ProbeTrainingCallback
from ray_probe.integrations.verl import ProbeCheckpointCallback


def a_model(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def requests(spool: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(spool.glob("*.json"))]


def saved(callback: ProbeCallback, output: Path, step: int, zero: bool = True) -> None:
    """Call `on_save` as transformers does."""
    args, state = SimpleNamespace(output_dir=str(output)), SimpleNamespace(global_step=step, is_world_process_zero=zero)
    returned = callback.on_save(args, state, SimpleNamespace(), model=None, processing_class=None, optimizer=None)
    assert returned is None  # anything else would replace the trainer's control


def test_the_callback_requests_the_checkpoint_of_the_step(tmp_path: Path) -> None:
    a_model(tmp_path / "checkpoint-20")
    saved(ProbeCallback(tags={"run": "a"}), tmp_path, 20)
    (found,) = requests(tmp_path / ".ray_probe")
    assert (found["step"], found["source"], found["tags"]) == (20, str(tmp_path / "checkpoint-20"), {"run": "a"})
    assert found["trainer"] == "types"  # the package of the trainer's arguments


def test_the_callback_writes_into_the_spool_that_it_was_given(tmp_path: Path) -> None:
    a_model(tmp_path / "out" / "checkpoint-20")
    saved(ProbeCallback(str(tmp_path / "spool")), tmp_path / "out", 20)
    assert [found["step"] for found in requests(tmp_path / "spool")] == [20]
    assert not (tmp_path / "out" / ".ray_probe").exists()


def test_one_process_of_a_job_requests_a_checkpoint(tmp_path: Path) -> None:
    a_model(tmp_path / "checkpoint-20")
    saved(ProbeCallback(), tmp_path, 20, zero=False)
    assert not (tmp_path / ".ray_probe").exists()


@pytest.mark.parametrize("hook", [ProbeCallback(), ProbeTrainingCallback()])
def test_every_other_event_is_accepted_and_other_names_are_not(hook: Any) -> None:
    assert hook.on_step_begin(1, 2, control=3) is None
    assert hook.on_an_event_of_a_later_version() is None
    assert not hasattr(hook, "state") and not hasattr(hook, "_undefined")


@pytest.mark.parametrize("hook", [ProbeCallback("/spool", {"a": "b"}), ProbeTrainingCallback("/spool", {"a": "b"})])
def test_a_hook_can_be_copied_and_sent_to_another_process(hook: Any) -> None:
    for other in (copy.deepcopy(hook), pickle.loads(pickle.dumps(hook))):
        assert vars(other) == vars(hook)


def sent_to_nowhere(tmp_path: Path) -> list[Any]:
    """Calls that cannot succeed: a file where the spool should be, a missing checkpoint, an event without its data."""
    (tmp_path / "file").touch()
    a_model(tmp_path / "checkpoint-1")
    verl = type("Mine", (ProbeCheckpointCallback,), {"spool": tmp_path / "file"})()
    a_model(tmp_path / "global_step_1" / "policy")
    skyrl = SimpleNamespace(cfg=SimpleNamespace(trainer=SimpleNamespace(export_path=str(tmp_path))))
    return [
        lambda: saved(ProbeCallback(tmp_path / "file"), tmp_path, 1),
        lambda: saved(ProbeCallback(), tmp_path, 2),
        lambda: ProbeCallback().on_save(None, None, None),
        lambda: verl.on_save(trainer=None, global_step=1, checkpoint_dir=str(tmp_path / "checkpoint-1")),
        lambda: ProbeCheckpointCallback().on_save(None, 3, str(tmp_path / "gone")),
        lambda: ProbeCheckpointCallback().on_save(None, 3, None),  # type: ignore[arg-type]
        lambda: ProbeTrainingCallback(tmp_path / "file").on_log(skyrl, SimpleNamespace(global_step=1), None),
        lambda: ProbeTrainingCallback().on_train_end(None, None, None),
    ]


@pytest.mark.parametrize("place", range(8))
def test_a_failure_is_one_warning_and_never_an_exception(
    place: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sent_to_nowhere(tmp_path)[place]()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "this checkpoint will not be measured" in caplog.text


@pytest.mark.parametrize("inside", ["actor/huggingface", "actor/model/huggingface"])
def test_verl_hands_over_the_model_inside_a_checkpoint(inside: str, tmp_path: Path) -> None:
    model = a_model(tmp_path / "global_step_7" / inside)
    ProbeCheckpointCallback(config=SimpleNamespace()).on_save(
        trainer=object(), global_step=7, checkpoint_dir=str(tmp_path / "global_step_7"), async_save=False, later=1
    )
    (found,) = requests(tmp_path / ".ray_probe")
    assert (found["source"], found["step"]) == (str(tmp_path / "global_step_7"), 7)
    assert (found["trainer"], found["pinned"]) == ("verl", True)
    assert (Path(found["checkpoint"]) / "model.safetensors").samefile(model / "model.safetensors")


def test_verl_hands_over_shards_as_they_are(tmp_path: Path) -> None:
    shards = tmp_path / "global_step_7" / "actor"
    (shards / "huggingface").mkdir(parents=True)
    (shards / "huggingface" / "config.json").write_text("{}")
    (shards / "model_world_size_1_rank_0.pt").touch()
    ProbeCheckpointCallback().on_save(None, 7, str(tmp_path / "global_step_7"))
    (found,) = requests(tmp_path / ".ray_probe")
    assert (found["checkpoint"], found["pinned"]) == (str(tmp_path / "global_step_7"), False)


def test_verl_pins_nothing_that_its_workers_still_write(tmp_path: Path) -> None:
    a_model(tmp_path / "global_step_7" / "actor/model/huggingface")
    ProbeCheckpointCallback().on_save(None, 7, str(tmp_path / "global_step_7"), async_save=True)
    (found,) = requests(tmp_path / ".ray_probe")
    assert (found["checkpoint"], found["pinned"]) == (str(tmp_path / "global_step_7"), False)


def test_skyrl_hands_over_each_export_once_after_it_was_written(tmp_path: Path) -> None:
    trainer = SimpleNamespace(cfg=SimpleNamespace(trainer=SimpleNamespace(export_path=str(tmp_path))))
    hook = ProbeTrainingCallback(tags={"run": "a"})
    for step in (0, 1, 2, 3):
        event = SimpleNamespace(global_step=step, ckpt_path=str(tmp_path / "checkpoints" / f"global_step_{step}"))
        hook.on_save(trainer, event, None)
        assert not any(found["step"] == step for found in requests(tmp_path / ".ray_probe"))
        if step in (1, 3):
            a_model(tmp_path / f"global_step_{step}" / "policy")
        hook.on_log(trainer, event, None)
    hook.on_train_end(trainer, event, None)
    found = requests(tmp_path / ".ray_probe")
    assert [one["step"] for one in found] == [1, 3]
    assert [one["source"] for one in found] == [str(tmp_path / f"global_step_{step}") for step in (1, 3)]
    assert {(one["trainer"], one["pinned"], one["tags"]["run"]) for one in found} == {("skyrl", True, "a")}
