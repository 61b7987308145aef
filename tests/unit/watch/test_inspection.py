"""Directories that no trainer leaves on a good day: torn, damaged, vanishing, pickled, given up."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trainer_scripts import SCRIPTS
from support.trainers import Write, adapter, as_json, config, index, tensors, tokenizer, weights

from ray_probe.watch.found import Found
from ray_probe.watch.inspection import inspect
from ray_probe.watch.layouts import PATIENT_S, QUIET_S
from ray_probe.watch.model_files import torn


def write(root: Path, *writes: Write | list[Write]) -> None:
    for one in writes:
        for item in one if isinstance(one, list) else [one]:
            for step in item.steps():
                step(root)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A finished checkpoint of transformers' Trainer, of step 5."""
    write(tmp_path, *SCRIPTS["transformers"].phases)
    return tmp_path / "checkpoint-5"


def later(directory: Path, seconds: float, base: Path | None = None) -> Found:
    """Returns what is said of a directory that has not changed for some seconds."""
    return inspect(directory, base, inspect(directory, base).stamp, seconds)


@given(st.binary(max_size=200))
def test_bytes_at_random_are_whole_only_where_their_header_says_so(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(data)
    assert torn(path) is not None or len(data) >= 8 + int.from_bytes(data[:8], "little")


def test_a_file_that_was_cut_anywhere_is_torn(tmp_path: Path) -> None:
    for size in range(len(tensors())):
        (tmp_path / "cut.safetensors").write_bytes(tensors()[:size])
        assert torn(tmp_path / "cut.safetensors") is not None, size


def test_a_file_with_bytes_too_many_is_not_whole(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(tensors() + b"more")
    assert inspect(checkpoint).why.startswith("the rest of model.safetensors")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "trainer_state.json"])
@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 10_000])
def test_json_that_cannot_be_read_keeps_a_checkpoint_from_being_ready(
    checkpoint: Path, name: str, data: bytes
) -> None:
    (checkpoint / name).write_bytes(data)
    assert inspect(checkpoint).state in ("waiting", "skipped")


def test_a_file_of_the_index_that_is_gone_is_named(tmp_path: Path) -> None:
    write(tmp_path, *SCRIPTS["TRL, in two files"].phases)
    (tmp_path / "checkpoint-5" / "model-00002-of-00002.safetensors").unlink()
    found = inspect(tmp_path / "checkpoint-5")
    assert (found.state, found.why) == ("waiting", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("outside", ["../other/model.safetensors", "/etc/passwd", "weights.bin"])
def test_an_index_never_leads_out_of_the_directory(tmp_path: Path, outside: str) -> None:
    write(tmp_path, *SCRIPTS["TRL, in two files"].phases)
    (tmp_path / "checkpoint-5" / "model.safetensors.index.json").write_bytes(index(outside))
    found = inspect(tmp_path / "checkpoint-5")
    assert found.state == "skipped" and repr(outside) in found.why


def test_a_trainer_state_of_another_step_is_not_the_marker(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").write_bytes(as_json({"global_step": 4}))
    assert inspect(checkpoint).why == "trainer_state.json to say step 5 (it says 4)"
    assert inspect(checkpoint, step=4).state == "ready", "a request of the trainer knows its step"


def test_a_file_with_a_temporary_name_is_waited_for(checkpoint: Path) -> None:
    (checkpoint / ".tmpab12cd").write_bytes(b"")
    assert inspect(checkpoint).why == ".tmpab12cd to get its name"


def test_a_directory_that_is_gone_has_vanished(checkpoint: Path) -> None:
    before = inspect(checkpoint)
    shutil.rmtree(checkpoint)
    assert inspect(checkpoint, earlier=before.stamp).state == "vanished"


def test_pickled_weights_are_never_opened(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    found = inspect(checkpoint)
    assert found.state == "skipped" and "pickle" in found.why


def test_a_loop_that_names_its_checkpoints_as_a_trainer_does_is_finished_when_it_is_quiet(tmp_path: Path) -> None:
    write(tmp_path, config("checkpoint-5"), *weights("checkpoint-5"), tokenizer("checkpoint-5"))
    assert later(tmp_path / "checkpoint-5", QUIET_S + 1).state == "waiting"
    assert later(tmp_path / "checkpoint-5", PATIENT_S).state == "ready"


def test_a_trainer_that_died_while_it_saved_is_waited_for(tmp_path: Path) -> None:
    write(tmp_path, *SCRIPTS["transformers"].phases[:-1])
    assert later(tmp_path / "checkpoint-5", 100 * PATIENT_S).why == "trainer_state.json"


def test_a_checkpoint_without_a_tokenizer_takes_that_of_the_base(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    assert inspect(checkpoint).why == "it lacks a tokenizer: give --base DIR"
    write(tmp_path, tokenizer("base"))
    found = inspect(checkpoint, tmp_path / "base")
    assert found.state == "ready" and found.model is not None
    assert (found.model.config, found.model.tokenizer) == (checkpoint, tmp_path / "base")


def test_an_adapter_finds_a_base_that_is_a_directory(tmp_path: Path) -> None:
    base = tmp_path / "base model"
    write(tmp_path, *adapter("checkpoint-5", str(base)))
    write(tmp_path, Write("checkpoint-5/trainer_state.json", as_json({"global_step": 5})))
    found = inspect(tmp_path / "checkpoint-5")
    assert found.state == "skipped" and found.why.endswith("which is no directory here: give --base DIR")
    base.mkdir()
    found = inspect(tmp_path / "checkpoint-5")
    assert found.state == "ready" and found.model is not None and found.model.weights == base.resolve()


def test_a_broadcast_below_a_finished_one_was_given_up(tmp_path: Path) -> None:
    write(tmp_path, Write("broadcasts/step_5/model.safetensors", tensors()), Write("broadcasts/step_8/STABLE", b""))
    found = inspect(tmp_path / "broadcasts" / "step_5")
    assert found.state == "skipped" and "step 8" in found.why


def test_a_checkpoint_that_was_converted_by_hand_is_skipped(tmp_path: Path) -> None:
    write(tmp_path, *SCRIPTS["verl"].phases)
    command = inspect(tmp_path / "global_step_5").why
    assert command.endswith(f"--target_dir {tmp_path}/global_step_5_hf")
    write(tmp_path, config("global_step_5_hf"), *weights("global_step_5_hf"), tokenizer("global_step_5_hf"))
    assert inspect(tmp_path / "global_step_5").why == "it was converted, to global_step_5_hf"
    found = later(tmp_path / "global_step_5_hf", QUIET_S)
    assert (found.state, found.step) == ("ready", 5)


def test_a_manifest_of_verl_never_leads_out_of_the_directory(tmp_path: Path) -> None:
    write(tmp_path, *SCRIPTS["verl, Megatron"].phases, config("other"), *weights("other"), tokenizer("other"))
    contents = tmp_path / "global_step_5" / "actor" / "ckpt_contents.json"
    contents.write_text(json.dumps({"contents": {"model": {"path": "../../other"}}}))
    found = inspect(tmp_path / "global_step_5")
    assert found.model is not None and found.model.weights.is_relative_to(tmp_path / "global_step_5")


@pytest.mark.parametrize("name", [name for name, script in SCRIPTS.items() if script.end == "ready"])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_checkpoint_that_is_deleted_file_by_file_is_never_ready_without_its_weights(
    name: str, backwards: bool, tmp_path: Path
) -> None:
    script = SCRIPTS[name]
    write(tmp_path, *script.phases, config("base"), tokenizer("base"))
    directory = tmp_path / script.directory
    needed = set((directory / script.model).glob("*.safetensors*"))
    for path in sorted((path for path in directory.rglob("*") if path.is_file()), reverse=backwards):
        path.unlink()
        found = later(directory, 2 * PATIENT_S, tmp_path / "base")
        if not all(path.exists() for path in needed):
            assert found.state != "ready", path
    shutil.rmtree(directory)
    assert inspect(directory).state == "vanished"


FILES = ("config.json", "model.safetensors", "tokenizer.json", "trainer_state.json", "adapter_config.json",
         "model.safetensors.index.json", "adapter_model.safetensors", "actor/ckpt_contents.json", "STABLE")  # fmt: skip
GARBAGE = st.binary(max_size=40) | st.sampled_from([b"{}", b"[]", b"null", b'{"weight_map": 3}'])


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(st.sampled_from(FILES), GARBAGE, min_size=1))
def test_garbage_is_never_ready_and_never_an_error(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    root = tmp_path_factory.mktemp("garbage")
    for name, data in files.items():
        (root / "checkpoint-5" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "checkpoint-5" / name).write_bytes(data)
    found = later(root / "checkpoint-5", 2 * PATIENT_S)
    assert found.state in ("waiting", "skipped", "needs conversion") and found.why
