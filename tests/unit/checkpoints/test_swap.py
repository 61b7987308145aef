"""A swapped checkpoint measures as a loaded one; others are loaded."""

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.adapters import write_adapter
from support.models import probe_config, save_checkpoint, tiny_gpt2, tiny_llama, tiny_model
from support.runs import components_of, gradient_of, processor_of

from ray_probe.checkpoints.headers import weight_headers
from ray_probe.checkpoints.swap import Architecture, Policy, can_swap, load_policy, release, swap_weights
from ray_probe.config import ProbeConfig
from ray_probe.errors import CheckpointError
from ray_probe.rollout.builder import RolloutBuilder
from ray_probe.rollout.rollout import Rollout

CHARACTERS = "abcdef"
WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two of one architecture."""
    parent = tmp_path_factory.mktemp("pair")
    first, second = (save_checkpoint(parent / str(n), tiny_llama(8, seed=n), CHARACTERS) for n in (0, 1))
    return first, second


@pytest.fixture
def second(checkpoints: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the second to be spoilt."""
    return Path(shutil.copytree(checkpoints[1], tmp_path / "second"))


def config_of(directory: Path, adapter: Path | None = None, **model: Any) -> ProbeConfig:
    settings = model | ({} if adapter is None else {"adapter": str(adapter)})
    generation = {"max_new_tokens": 8, "tf_batch_size": 3}
    return probe_config(directory, model=settings, data={"prompts": ["abc", "f"]}, generation=generation)


def brought_in(assembly: RolloutBuilder, directory: Path, adapter: Path | None = None, **model: Any) -> Rollout:
    return assembly.load(config_of(directory, adapter, **model), directory, adapter, "policy")


def measured(rollout: Rollout) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Tokens, log q and gradient: all that a probe's numbers come from."""
    components = components_of(rollout)
    sequences = components.processor.generate(["abc", "f"], 2, [[(b, g) for g in range(2)] for b in range(2)])
    assert sequences.sample_logprobs is not None
    gradient_of(rollout).clear()
    components.accumulate_sum_X(sequences, None)
    model = components.processor.model
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    gradient_of(rollout).clear()
    log_q = [row.tolist() for group in sequences.sample_logprobs for row in group]
    return [sequences.sequences.tolist(), log_q], found


def assert_same_bits(ours: Rollout, theirs: Rollout) -> None:
    (tokens, gradient), (expected, reference) = measured(ours), measured(theirs)
    assert tokens == expected
    assert gradient.keys() == reference.keys() and gradient
    assert all(torch.equal(value, reference[name]) for name, value in gradient.items())


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(directory: Path, change: Callable[[Tensors], object]) -> None:
    tensors = safetensors.torch.load_file(directory / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


# The same answer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_probe_after_a_swap_is_bit_identical_to_one_after_a_fresh_load(checkpoints: tuple[Path, Path], dtype: str):
    live = RolloutBuilder()
    for step, directory in enumerate([*checkpoints, checkpoints[0]]):
        rollout = brought_in(live, directory, dtype=dtype)
        assert live.way == ("swapped" if step else "loaded")
        assert_same_bits(rollout, brought_in(RolloutBuilder(), directory, dtype=dtype))


@pytest.mark.parametrize("architecture", ["llama_tied", "gpt2", "gemma2", "opt", "qwen2"])
def test_tied_heads_and_other_architectures_are_swapped_too(tmp_path: Path, architecture: str):
    pair = [save_checkpoint(tmp_path / str(n), tiny_model(architecture, 16, seed=n), CHARACTERS) for n in (0, 1)]
    live = RolloutBuilder()
    brought_in(live, pair[0])
    rollout = brought_in(live, pair[1])
    assert live.way == "swapped"
    assert_same_bits(rollout, brought_in(RolloutBuilder(), pair[1]))


def test_another_dtype_in_the_files_is_cast_as_loading_casts_it(checkpoints: tuple[Path, Path], tmp_path: Path):
    half = save_checkpoint(tmp_path / "half", tiny_llama(8, seed=1).to(torch.bfloat16), CHARACTERS)
    live = RolloutBuilder()
    brought_in(live, checkpoints[0])
    rollout = brought_in(live, half)
    assert live.way == "swapped"
    assert_same_bits(rollout, brought_in(RolloutBuilder(), half))


def test_a_checkpoint_in_several_files_is_swapped(checkpoints: tuple[Path, Path], tmp_path: Path):
    sharded = Path(shutil.copytree(checkpoints[1], tmp_path / "sharded"))
    (sharded / WEIGHTS).unlink()
    tiny_llama(8, seed=1).save_pretrained(sharded, max_shard_size="8KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    live = RolloutBuilder()
    brought_in(live, checkpoints[0])
    rollout = brought_in(live, sharded)
    assert live.way == "swapped"
    assert_same_bits(rollout, brought_in(RolloutBuilder(), checkpoints[1]))


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_weights_and_adapter_are_swapped_together(
    checkpoints: tuple[Path, Path], tmp_path: Path, saved: list[str] | None
):
    adapters = [
        write_adapter(tmp_path / f"adapter{n}", checkpoint, seed=n, modules_to_save=saved, lora_dropout=0.5)
        for n, checkpoint in enumerate(checkpoints)
    ]
    live = RolloutBuilder()
    brought_in(live, checkpoints[0], adapters[0])
    rollout = brought_in(live, checkpoints[1], adapters[1], trainable="adapter")
    assert live.way == "swapped"
    assert_same_bits(rollout, brought_in(RolloutBuilder(), checkpoints[1], adapters[1], trainable="adapter"))


def test_gradients_of_the_checkpoint_before_are_gone(checkpoints: tuple[Path, Path]):
    live = RolloutBuilder()
    model = processor_of(brought_in(live, checkpoints[0])).model
    model(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()
    assert processor_of(brought_in(live, checkpoints[1])).model is model
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_trainable_parameters_are_those_of_the_new_configuration(checkpoints: tuple[Path, Path]):
    live = RolloutBuilder()
    brought_in(live, checkpoints[0], trainable="mlp")
    assert len(brought_in(live, checkpoints[1]).layout.names) == 21
    assert live.way == "swapped"


def test_what_lies_in_the_directory_later_does_not_reach_the_model(checkpoints: tuple[Path, Path], second: Path):
    live = RolloutBuilder()
    for way in ("loaded", "swapped"):
        rollout = brought_in(live, second)
        assert live.way == way
        before = measured(rollout)[0]
        with (second / WEIGHTS).open("r+b") as file:  # as a trainer that overwrites its checkpoint does
            file.seek(-4000, os.SEEK_END)
            file.write(b"\1" * 4000)
        assert measured(rollout)[0] == before
        shutil.copy(checkpoints[1] / WEIGHTS, second / WEIGHTS)


# What is loaded instead


def another_config(path: Path) -> None:
    edit_json(path / "config.json", rms_norm_eps=1e-2)


def other_eos(path: Path) -> None:
    edit_json(path / "generation_config.json", eos_token_id=[0, 3])


@pytest.mark.parametrize("change", [another_config, other_eos])
def test_another_architecture_or_end_of_responses_is_loaded(
    checkpoints: tuple[Path, Path], second: Path, change: Callable[[Path], None]
):
    change(second)
    live = RolloutBuilder()
    brought_in(live, checkpoints[0])
    rollout = brought_in(live, second)
    assert live.way == "loaded"
    assert_same_bits(rollout, brought_in(RolloutBuilder(), second))


def test_what_does_not_change_the_model_does_not_hinder_a_swap(checkpoints: tuple[Path, Path], second: Path):
    edit_json(second / "config.json", transformers_version="5.0.0", dtype="float16", _name_or_path="elsewhere")
    live = RolloutBuilder()
    brought_in(live, checkpoints[0])
    brought_in(live, second)
    assert live.way == "swapped"


def test_another_dtype_adapter_or_shape_is_loaded(checkpoints: tuple[Path, Path], tmp_path: Path):
    live, (first, last) = RolloutBuilder(), checkpoints
    larger = save_checkpoint(tmp_path / "larger", tiny_llama(16), CHARACTERS)
    one, other = (write_adapter(tmp_path / f"a{alpha}", first, lora_alpha=alpha) for alpha in (4, 8))
    steps: list[tuple[Path, Path | None, str]] = [
        (first, None, "float32"), (last, None, "bfloat16"), (larger, None, "bfloat16"), (first, one, "float32"),
        (last, other, "float32"), (first, None, "float32"),
    ]  # fmt: skip
    for directory, adapter, dtype in steps:
        rollout = brought_in(live, directory, adapter, dtype=dtype)
        assert live.way == "loaded"
        assert_same_bits(rollout, brought_in(RolloutBuilder(), directory, adapter, dtype=dtype))


def without_prefix(directory: Path, seed: int) -> Path:
    """Write a GPT-2 as on the hub: tensors without the prefix `transformer.`."""
    save_checkpoint(directory, tiny_gpt2(8, torch.float32, seed=seed), CHARACTERS)
    edit_weights(directory, lambda t: [t.update({k.removeprefix("transformer."): t.pop(k)}) for k in list(t)])
    return directory


def renamed(directory: Path, seed: int) -> Path:
    """GPT-NeoX, whose head has another name in the files than in the model."""
    return save_checkpoint(directory, tiny_model("gpt_neox", 8, seed=seed), CHARACTERS)


@pytest.mark.parametrize("make", [without_prefix, renamed])
def test_tensors_that_transformers_renames_on_loading_are_loaded(tmp_path: Path, make: Callable[[Path, int], Path]):
    pair = [make(tmp_path / str(seed), seed) for seed in (0, 1)]
    live = RolloutBuilder()
    brought_in(live, pair[0])
    rollout = brought_in(live, pair[1])
    assert live.way == "loaded"
    assert_same_bits(rollout, brought_in(RolloutBuilder(), pair[1]))


@pytest.mark.parametrize("rebuilt", [["a conversion"], None])
def test_tensors_that_transformers_rebuilt_or_may_have_rebuilt_are_not_swapped(
    checkpoints: tuple[Path, Path], rebuilt: list[str] | None
):
    architecture = Architecture.of(checkpoints[0], None, "float32", "cpu")
    policy, headers = load_policy(checkpoints[0], None, architecture), weight_headers(checkpoints[1])
    assert can_swap(policy, architecture, headers)
    policy.model._weight_conversions = rebuilt
    assert not can_swap(policy, architecture, headers)


def test_a_head_stored_beside_the_embeddings_that_it_is_tied_to_is_left_to_loading(tmp_path: Path):
    pair = [save_checkpoint(tmp_path / str(n), tiny_model("llama_tied", 8, seed=n), CHARACTERS) for n in (0, 1)]
    edit_weights(pair[1], lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    live = RolloutBuilder()
    brought_in(live, pair[0])
    brought_in(live, pair[1])
    assert live.way == "loaded"


def test_the_old_model_is_gone_before_the_new_one_is_loaded(
    checkpoints: tuple[Path, Path], second: Path, monkeypatch: pytest.MonkeyPatch
):
    another_config(second)
    live = RolloutBuilder()
    model = processor_of(brought_in(live, checkpoints[0])).model
    seen: list[int] = []

    def load(*arguments: Any) -> Policy:
        seen.append(sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())))
        return load_policy(*arguments)

    monkeypatch.setattr("ray_probe.rollout.builder.load_policy", load)
    brought_in(live, second)
    assert seen == [0]


# Failures


def nan(path: Path) -> None:
    edit_weights(path, lambda t: t["model.norm.weight"].fill_(torch.nan))


def missing(path: Path) -> None:
    edit_weights(path, lambda t: t.pop("lm_head.weight"))


def unexpected(path: Path) -> None:
    edit_weights(path, lambda t: t.update(extra=torch.ones(2)))


def reshaped(path: Path) -> None:
    edit_weights(path, lambda t: t.update({"lm_head.weight": torch.ones(9, 16)}))


def truncated(path: Path) -> None:
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-1000])


SPOILT = {
    nan: "NaN or infinity in 1 tensors: model.norm.weight",
    missing: "1 tensors are missing: lm_head.weight",
    unexpected: "1 tensors are unexpected: extra",
    reshaped: "1 tensors are mismatched: lm_head.weight",
    truncated: "truncated or damaged",
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda function: function.__name__)
def test_a_spoilt_checkpoint_is_refused_and_the_next_one_measures_as_ever(
    checkpoints: tuple[Path, Path], second: Path, spoil: Callable[[Path], None]
):
    spoil(second)
    live = RolloutBuilder()
    brought_in(live, checkpoints[0])
    with pytest.raises(CheckpointError, match=rf"^model\.path: .*{SPOILT[spoil]}") as caught:
        brought_in(live, second)
    assert "\n" not in str(caught.value)
    rollout = brought_in(live, checkpoints[1])
    assert_same_bits(rollout, brought_in(RolloutBuilder(), checkpoints[1]))


def test_a_spoilt_adapter_is_refused_and_nothing_half_swapped_is_kept(checkpoints: tuple[Path, Path], tmp_path: Path):
    adapters = [write_adapter(tmp_path / f"a{n}", checkpoints[n], seed=n) for n in (0, 1)]
    file = adapters[1] / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({k: v for k, v in tensors.items() if "layers.1" not in k}, file)
    live = RolloutBuilder()
    brought_in(live, checkpoints[0], adapters[0])
    with pytest.raises(CheckpointError, match=r"^model\.adapter: .*parameters are not in it"):
        brought_in(live, checkpoints[1], adapters[1])
    brought_in(live, checkpoints[0], adapters[0])
    assert live.way == "loaded"


def test_a_swap_that_fails_half_way_leaves_a_model_that_cannot_be_used(checkpoints: tuple[Path, Path], second: Path):
    architecture = Architecture.of(checkpoints[0], None, "float32", "cpu")
    policy = load_policy(checkpoints[0], None, architecture)
    headers = weight_headers(second)
    assert can_swap(policy, architecture, headers)
    shutil.copy(save_checkpoint(second.parent / "wider", tiny_llama(16), CHARACTERS) / WEIGHTS, second / WEIGHTS)
    with pytest.raises(CheckpointError, match="has changed while it was read"):
        swap_weights(policy, second, headers, None)
    assert all(parameter.numel() == 0 for parameter in policy.model.parameters())
    with pytest.raises(RuntimeError):
        policy.model(input_ids=torch.tensor([[1, 2]]))


# Memory


def test_a_released_model_gives_its_memory_back_though_it_is_referred_to():
    model = tiny_llama(8)
    model(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()
    release(model)
    assert not any(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    assert all(parameter.grad is None for parameter in model.parameters())


def tensors_alive() -> tuple[int, int]:
    """How many tensors there are, and their bytes."""
    gc.collect()
    found = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    return len(found), sum(tensor.nbytes for tensor in found)


def test_twenty_swaps_leave_no_tensor_behind(checkpoints: tuple[Path, Path], tmp_path: Path):
    adapters = [write_adapter(tmp_path / f"a{n}", checkpoint, seed=n) for n, checkpoint in enumerate(checkpoints)]
    live, counts = RolloutBuilder(), []
    for step in range(21):
        rollout = brought_in(live, checkpoints[step % 2], adapters[step % 2])
        if step in (2, 20):
            measured(rollout)
            counts.append(tensors_alive())
        del rollout  # as an actor lets go of it
    assert live.way == "swapped"
    assert counts[0] == counts[1]
