"""A checkpoint is loaded as written, or refused with field, value and remedy."""

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from support.models import character_tokenizer, save_checkpoint, tiny_gpt2, tiny_llama, tiny_model

from ray_probe.checkpoints.inspection import inspect_checkpoint
from ray_probe.checkpoints.load import load_model
from ray_probe.checkpoints.tokenizer.load import load_tokenizer, open_tokenizer
from ray_probe.checkpoints.tokenizer.token_ids import check_token_ids
from ray_probe.config.schema import ModelConfig
from ray_probe.errors import CheckpointError, ClusterError

CHARACTERS = "abcdef"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("pristine") / "c", tiny_llama(8), CHARACTERS)


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "c"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded") / "c"
    tiny_llama(8).save_pretrained(directory, max_shard_size="8KB")
    character_tokenizer(CHARACTERS).save_pretrained(directory)
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    return directory


def settings(path: Path | str, **others: Any) -> ModelConfig:
    return ModelConfig(path=str(path), **others)


def open_checkpoint(path: Path, dtype: str = "float32") -> Any:
    """Everything that a run does to load a checkpoint."""
    found = inspect_checkpoint(settings(path))
    model = load_model(found.directory, dtype)
    tokenizer = open_tokenizer(found.directory, found.adapter, model.config)
    check_token_ids(tokenizer, model.get_input_embeddings().weight.shape[0])
    return model


def edit_json(file: Path, **changes: Any) -> None:
    raw = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(raw | changes))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = safetensors.torch.load_file(directory / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


class Boom:
    """Unpickling it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def booby_trap(file: Path) -> None:
    file.write_bytes(pickle.dumps(Boom(file.parent / "ran")))


def write_remote_code(directory: Path) -> None:
    """A module that writes a file when it is imported, also from a copy."""
    (directory / "code.py").write_text(f"from pathlib import Path\nPath({str(directory / 'ran')!r}).touch()\n")


Spoiler = Callable[[Path], object]
SPOILT: dict[str, tuple[Spoiler, tuple[str, ...]]] = {}


def spoil(name: str, *says: str) -> Callable[[Spoiler], None]:
    """Register a fault of a checkpoint, and the problem and remedy of its message."""

    def register(function: Spoiler) -> None:
        SPOILT[name] = (function, says)

    return register


@spoil("a file instead", "no such directory", "give the directory")
def _(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("weights")


@spoil("only pickles", WEIGHTS, "pickle weights are not loaded")
def _(path: Path) -> None:
    (path / WEIGHTS).unlink()
    booby_trap(path / "pytorch_model.bin")


@spoil("pickles named in config.json", "transformers_weights", "remove it")
def _(path: Path) -> None:
    booby_trap(path / "pytorch_model.bin")
    edit_json(path / "config.json", transformers_weights="pytorch_model.bin")


@spoil("a pickle called safetensors", "truncated or damaged", "export it again")
def _(path: Path) -> None:
    booby_trap(path / WEIGHTS)


@spoil("truncated weights", "truncated or damaged", "export it again")
def _(path: Path) -> None:
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: len(data) // 2])


@spoil("header past the end", "truncated or damaged", "export it again")
def _(path: Path) -> None:
    (path / WEIGHTS).write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


@spoil("index names a missing file", "model-00002-of-00002.safetensors", "copy the whole checkpoint")
def _(path: Path) -> None:
    (path / WEIGHTS).rename(path / "model-00001-of-00002.safetensors")
    edit_json(path / INDEX, weight_map={"lm_head.weight": "model-00002-of-00002.safetensors"})


@spoil("index names a file elsewhere", "../elsewhere.safetensors", "copy it there")
def _(path: Path) -> None:
    (path / WEIGHTS).rename(path.parent / "elsewhere.safetensors")
    edit_json(path / INDEX, weight_map={"lm_head.weight": "../elsewhere.safetensors"})


@spoil("index without a map", "no weight_map", "copy the whole checkpoint")
def _(path: Path) -> None:
    (path / WEIGHTS).unlink()
    edit_json(path / INDEX, weight_map=["model-00001-of-00001.safetensors"])


@spoil("index of numbers", "no weight_map", "copy the whole checkpoint")
def _(path: Path) -> None:
    (path / WEIGHTS).unlink()
    edit_json(path / INDEX, weight_map={"lm_head.weight": 1})


@spoil("index names a tensor that its file does not hold", "names extra", "does not hold", "copy the whole checkpoint")
def _(path: Path) -> None:
    tensors = safetensors.torch.load_file(path / WEIGHTS)
    (path / WEIGHTS).rename(path / "model-00001-of-00001.safetensors")
    edit_json(path / INDEX, weight_map=dict.fromkeys([*tensors, "extra"], "model-00001-of-00001.safetensors"))


@spoil("a tensor in two files", "lm_head.weight is in", "in another file too", "copy the whole checkpoint")
def _(path: Path) -> None:
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    tensors = safetensors.torch.load_file(path / WEIGHTS)
    safetensors.torch.save_file({"lm_head.weight": tensors["lm_head.weight"] + 1}, path / names[1], {"format": "pt"})
    (path / WEIGHTS).rename(path / names[0])
    edit_json(path / INDEX, weight_map=dict.fromkeys(tensors, names[0]) | {"lm_head.weight": names[1]})


@spoil("quantised", "quantised (quantization_config)", "export it in float32")
def _(path: Path) -> None:
    edit_json(path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


@spoil("adapter", "holds an adapter", "name it in model.adapter")
def _(path: Path) -> None:
    edit_json(path / "adapter_config.json", peft_type="LORA", base_model_name_or_path="elsewhere")
    booby_trap(path / "adapter_model.bin")


@spoil("remote code of the tokenizer", "remote code (auto_map)", "convert it first")
def _(path: Path) -> None:
    write_remote_code(path)
    edit_json(path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})


@spoil("remote code of the model", "remote code (auto_map)", "convert it first")
def _(path: Path) -> None:
    write_remote_code(path)
    edit_json(path / "config.json", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})


@spoil("no tokenizer", "no tokenizer", "put tokenizer.json beside the weights")
def _(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


@spoil("tokenizer with a hole, past the embeddings", "ids up to 99, the embeddings have 8 rows", "resize them")
def _(path: Path) -> None:
    raw = json.loads((path / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    del vocabulary["f"]
    (path / "tokenizer.json").write_text(json.dumps(raw | {"model": raw["model"] | {"vocab": vocabulary | {"z": 99}}}))


spoil("missing directory", "no such directory", "give the directory")(lambda path: shutil.rmtree(path))
spoil("no config.json", "no config.json", "save_pretrained")(lambda path: (path / "config.json").unlink())
spoil("config.json is not JSON", "config.json cannot be read as JSON", "copy it again")(
    lambda path: (path / "config.json").write_text("{'a': 1}")
)
spoil("config.json is not UTF-8", "config.json cannot be read as JSON", "copy it again")(
    lambda path: (path / "config.json").write_bytes(b"\xff{}")
)
spoil("config.json is nested without end", "config.json cannot be read as JSON", "copy it again")(
    lambda path: (path / "config.json").write_text("[" * 100_000)
)
spoil("config.json is a list", "config.json is not a JSON object", "copy it again")(
    lambda path: (path / "config.json").write_text("[]")
)
spoil("unknown model type", "lllama", "check its files")(
    lambda path: edit_json(path / "config.json", model_type="lllama")
)
spoil("generation_config is not JSON", "generation_config.json cannot be read", "copy it again")(
    lambda path: (path / "generation_config.json").write_text("{")
)
spoil("tokenizer_config is not JSON", "tokenizer_config.json cannot be read", "copy it again")(
    lambda path: (path / "tokenizer_config.json").write_text("{")
)
spoil("tokenizer.json is not JSON", "cannot be loaded", "check its files")(
    lambda path: (path / "tokenizer.json").write_text("{")
)
spoil("hub kernel", "attn_implementation", "remove it")(
    lambda path: edit_json(path / "config.json", attn_implementation="somebody/kernel")
)
spoil("hub kernel, hidden", "_attn_implementation", "remove it")(
    lambda path: edit_json(path / "config.json", _attn_implementation="somebody/kernel")
)
spoil("no weights", WEIGHTS, "pickle weights are not loaded")(lambda path: (path / WEIGHTS).unlink())
spoil("empty weights", "truncated or damaged", "export it again")(lambda path: (path / WEIGHTS).write_bytes(b""))
spoil("header is not JSON", "truncated or damaged", "export it again")(
    lambda path: (path / WEIGHTS).write_bytes((9).to_bytes(8, "little") + b"not json!")
)
spoil("missing tensor", "1 tensors are missing: lm_head.weight", "export the checkpoint again")(
    lambda path: edit_weights(path, lambda t: t.pop("lm_head.weight"))
)
spoil("unexpected tensor", "1 tensors are unexpected: extra", "export the checkpoint again")(
    lambda path: edit_weights(path, lambda t: t.update(extra=torch.ones(2)))
)
spoil("mismatched shape", "1 tensors are mismatched: lm_head.weight", "export the checkpoint again")(
    lambda path: edit_weights(path, lambda t: t.update({"lm_head.weight": torch.ones(9, 16)}))
)
spoil("NaN weights", "NaN or infinity in 1 tensors: lm_head.weight", "export the checkpoint again")(
    lambda path: edit_weights(path, lambda t: t["lm_head.weight"].fill_(torch.nan))
)
spoil("infinite weights", "NaN or infinity in 1 tensors: lm_head.weight", "export the checkpoint again")(
    lambda path: edit_weights(path, lambda t: t["lm_head.weight"][0].fill_(torch.inf))
)
spoil("tokenizer larger than the embeddings", "ids up to 12, the embeddings have 8 rows", "resize them")(
    lambda path: character_tokenizer("abcdefghijk").save_pretrained(path)
)


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_checkpoint_is_refused_in_one_line_and_none_of_its_code_runs(checkpoint: Path, name: str):
    spoiler, says = SPOILT[name]
    spoiler(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(checkpoint)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message and len(message) < 600
    assert message.startswith(f"model.path: got '{checkpoint}'"[:80])
    for part in says:
        assert part in message
    assert not list(checkpoint.parent.rglob("ran")), "no code of the checkpoint may run"


def test_control_the_trap_goes_off_when_it_is_unpickled(tmp_path: Path):
    booby_trap(tmp_path / "pytorch_model.bin")
    pickle.loads((tmp_path / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "ran").exists()


def test_remote_code_does_not_run_even_where_a_checkpoint_is_loaded_without_inspection(checkpoint: Path):
    for name in ("remote code of the model", "remote code of the tokenizer"):
        SPOILT[name][0](checkpoint)
    for load in (lambda: load_model(checkpoint, "float32"), lambda: load_tokenizer(checkpoint)):
        with contextlib.suppress(CheckpointError):  # known classes may load by their own code
            load()
    assert not (checkpoint / "ran").exists()


def test_a_path_that_no_file_system_takes_is_refused_like_a_missing_one():
    with pytest.raises(CheckpointError, match=r"^model\.path: got 'x+\.\.\.; no such directory"):
        inspect_checkpoint(settings("x" * 5000))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_weights_are_loaded_in_the_dtype_of_the_config_and_in_eval_mode(pristine: Path, dtype: str):
    model = open_checkpoint(pristine, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training
    expected = tiny_llama(8).lm_head.weight.to(getattr(torch, dtype))
    assert torch.equal(model.lm_head.weight, expected)


def test_the_dtype_of_the_config_wins_over_the_one_that_was_stored(tmp_path: Path):
    directory = save_checkpoint(tmp_path / "c", tiny_llama(8).to(torch.bfloat16), CHARACTERS)
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
    model = open_checkpoint(directory, "float32")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, tiny_llama(8).lm_head.weight.to(torch.bfloat16).float())


def test_shards_of_a_checkpoint_load_as_one(sharded: Path, pristine: Path):
    whole, parts = open_checkpoint(pristine).state_dict(), open_checkpoint(sharded).state_dict()
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("cut", [20, -1])
def test_a_damaged_shard_is_named(sharded: Path, tmp_path: Path, cut: int):
    copied = Path(shutil.copytree(sharded, tmp_path / "c"))
    shard = max(copied.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=f"{shard.name} is truncated or damaged"):
        open_checkpoint(copied)


def test_the_model_is_held_in_memory_of_its_own(checkpoint: Path):
    model = open_checkpoint(checkpoint)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (checkpoint / WEIGHTS).open("r+b") as file:  # as a trainer that overwrites its checkpoint does
        file.seek(-8000, os.SEEK_END)
        file.write(b"\1" * 8000)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_go_to_the_device_tensor_by_tensor_and_what_does_not_fit_is_no_fault_of_the_checkpoint(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: dict[str, Any] = {}

    def from_pretrained(directory: Path, **settings: Any) -> Any:
        asked.update(settings)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ClusterError, match=r"^model\.path: .*CUDA out of memory\); use a larger one") as caught:
        load_model(checkpoint, "bfloat16", "cuda")
    assert caught.value.exit_code == 4
    assert asked["device_map"] == {"": torch.device("cuda")} and asked["dtype"] == torch.bfloat16
    assert asked["use_safetensors"] and asked["local_files_only"] and asked["trust_remote_code"] is False


@pytest.mark.parametrize("architecture", ["gpt2", "llama_tied", "opt", "gemma2", "bloom"])
def test_a_tied_head_is_not_missing(tmp_path: Path, architecture: str):
    model = open_checkpoint(save_checkpoint(tmp_path / "c", tiny_model(architecture, 8), CHARACTERS))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_embeddings_may_have_more_rows_than_the_tokenizer_has_tokens(tmp_path: Path):
    open_checkpoint(save_checkpoint(tmp_path / "c", tiny_llama(16), CHARACTERS))


def test_the_fingerprint_is_that_of_the_files_and_not_of_their_place(pristine: Path, checkpoint: Path):
    fingerprints = [inspect_checkpoint(settings(path)).fingerprint for path in (pristine, checkpoint, checkpoint)]
    assert len(set(fingerprints)) == 1 and len(fingerprints[0]) == 64


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "generation_config.json", "tokenizer.json"])
def test_one_byte_changes_the_fingerprint(checkpoint: Path, name: str):
    before = inspect_checkpoint(settings(checkpoint)).fingerprint
    data = bytearray((checkpoint / name).read_bytes())
    if name == WEIGHTS:
        data[-1] ^= 1
    else:
        data += b" "
    (checkpoint / name).write_bytes(data)
    assert inspect_checkpoint(settings(checkpoint)).fingerprint != before


def test_merges_of_a_tokenizer_are_in_the_fingerprint(checkpoint: Path):
    before = inspect_checkpoint(settings(checkpoint)).fingerprint
    (checkpoint / "merges.txt").write_text("a b\n")
    assert inspect_checkpoint(settings(checkpoint)).fingerprint != before


def test_generation_settings_that_make_no_sense_do_not_stop_loading_and_leave_the_eos_ids(checkpoint: Path):
    nonsense = {"temperature": -1.0, "top_p": 7, "top_k": -3, "num_beams": 0, "eos_token_id": [0, 5], "unheard_of": 1}
    edit_json(checkpoint / "generation_config.json", **nonsense)
    assert open_checkpoint(checkpoint).generation_config.eos_token_id == [0, 5]


def test_a_checkpoint_without_generation_config_has_the_eos_ids_of_its_config(checkpoint: Path):
    (checkpoint / "generation_config.json").unlink()
    edit_json(checkpoint / "config.json", eos_token_id=4)
    assert open_checkpoint(checkpoint).config.eos_token_id == 4


@pytest.mark.parametrize("name", ["eager", "sdpa", None])
def test_attention_that_comes_with_transformers_may_be_named(checkpoint: Path, name: str | None):
    edit_json(checkpoint / "config.json", attn_implementation=name)
    assert open_checkpoint(checkpoint).config._attn_implementation == (name or "sdpa")


def test_a_relative_path_is_resolved(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(checkpoint.parent)
    assert inspect_checkpoint(settings("c")).directory == checkpoint.resolve()


def test_dropout_of_the_config_is_off(tmp_path: Path):
    directory = save_checkpoint(tmp_path / "c", tiny_gpt2(8, torch.float32), CHARACTERS)
    model = open_checkpoint(directory)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_threads_that_load_at_once_leave_transformers_as_it_was(pristine: Path, monkeypatch: pytest.MonkeyPatch):
    """Loading replaces transformers' own `init_weights` and `tie_weights`, for the whole process."""
    before = [vars(transformers.PreTrainedModel)[name] for name in ("init_weights", "tie_weights")]
    inside, most = [0], [0]
    loads = transformers.AutoModelForCausalLM.from_pretrained

    def counted(*args: Any, **options: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        model = loads(*args, **options)
        inside[0] -= 1
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", counted)
    with ThreadPoolExecutor(4) as pool:
        assert all(list(pool.map(lambda _: load_model(pristine, "float32") is not None, range(8))))
    assert most[0] == 1
    assert [vars(transformers.PreTrainedModel)[name] for name in ("init_weights", "tie_weights")] == before
