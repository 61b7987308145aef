"""Faults of weights, adapter or `model.trainable` are found before loading."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from support.adapters import write_adapter
from support.models import probe_config, save_checkpoint, tiny_llama, tiny_model, tiny_vision

import ray_probe.checkpoints.load
from ray_probe.checkpoints.inspection import inspect_checkpoint
from ray_probe.config import ProbeConfig
from ray_probe.errors import CheckpointError, ClusterError, ConfigError, ProbeError
from ray_probe.rollout.loader import check_fits_here
from ray_probe.run.preparation.prepare import prepare

CHARACTERS = "abcdef"
WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]


def config_of(checkpoint: Path, **sections: Any) -> ProbeConfig:
    generation = {"max_new_tokens": 8, "eos_token_ids": [0]} | sections.pop("generation", {})
    return probe_config(checkpoint, data={"prompts": ["abc"]}, generation=generation, **sections)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ProbeConfig]:
    """A config on a checkpoint `c`; loading its weights fails the test."""
    checkpoint = save_checkpoint(tmp_path / "c", tiny_llama(8), CHARACTERS)

    def build(**sections: Any) -> ProbeConfig:
        return config_of(checkpoint, **sections)

    monkeypatch.setattr(ray_probe.checkpoints.load, "load_model", None)
    return build


def edit(file: Path, change: Callable[[Tensors], object]) -> None:
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def refused(config: ProbeConfig, error: type[ProbeError] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        prepare(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_named(config, tmp_path: Path, dtype: torch.dtype):
    def spoil(tensors: Tensors) -> None:
        tensors |= {name: value.to(dtype) for name, value in tensors.items()}
        tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = -torch.inf
        tensors["model.norm.weight"][0] = torch.nan

    edit(tmp_path / "c" / WEIGHTS, spoil)
    message = refused(config())
    assert "NaN or infinity in 2 tensors: model.layers.1.mlp.up_proj.weight, model.norm.weight; export" in message
    assert inspect_checkpoint(config().model, hashed=False).fingerprint == "", "a quick look reads no weight"


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ],
)
def test_an_old_mask_of_minus_infinity_that_is_no_parameter_is_no_fault(
    tmp_path: Path, architecture: str, name: str
):
    checkpoint = save_checkpoint(tmp_path / "c", tiny_model(architecture, 16), CHARACTERS)
    edit(checkpoint / WEIGHTS, lambda t: t.update({name: torch.tensor(-torch.inf, dtype=torch.float16)}))
    assert prepare(config_of(checkpoint))


SPOILT: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda t: t.pop("model.norm.weight"), "1 tensors are missing: model.norm.weight"),
    "unexpected": (lambda t: t.update(extra=torch.ones(2)), "1 tensors are unexpected: extra"),
    "of another shape": (
        lambda t: t.update({"lm_head.weight": torch.ones(9, 16)}), "1 tensors are mismatched: lm_head.weight"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILT)
def test_a_tensor_that_does_not_fit_the_model_is_named(config, tmp_path: Path, kind: str):
    change, says = SPOILT[kind]
    edit(tmp_path / "c" / WEIGHTS, change)
    assert says in refused(config())


def test_token_ids_past_the_embeddings_are_named(config, tmp_path: Path):
    file = tmp_path / "c" / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["model"]["vocab"]["X"] = 99
    file.write_text(json.dumps(raw))
    assert "its tokenizer has ids up to 99, the embeddings have 8 rows (99 'X'); resize them" in refused(config())


def test_eos_ids_past_the_embeddings_are_named(config):
    message = refused(config(generation={"eos_token_ids": [0, 8]}), ConfigError)
    assert message == "generation.eos_token_ids: got [0, 8]; need ids below the 8 tokens of the model"


def test_a_model_without_a_key_value_cache_is_named(tmp_path: Path):
    shape = transformers.OpenAIGPTConfig(vocab_size=8, n_positions=32, n_embd=8, n_layer=1, n_head=2)
    checkpoint = save_checkpoint(tmp_path / "c", transformers.OpenAIGPTLMHeadModel(shape), CHARACTERS)
    message = refused(config_of(checkpoint))
    assert message.startswith("model.path: got 'OpenAIGPTLMHeadModel'; need a decoder-only model")


def test_an_expression_that_chooses_nothing_is_refused(config):
    assert "no parameter matches; there are model.embed_tokens" in refused(config(model={"trainable": "x"}), ProbeError)


@pytest.mark.parametrize("trainable", ["all", "adapter"])
def test_what_no_text_reaches_is_refused(tmp_path: Path, trainable: str):
    checkpoint = save_checkpoint(tmp_path / "c", tiny_vision(), CHARACTERS)
    adapter = write_adapter(tmp_path / "a", checkpoint, target_modules=["q_proj"])
    message = refused(config_of(checkpoint, model={"adapter": str(adapter), "trainable": trainable}), ConfigError)
    assert message.startswith(f"model.trainable: got '{trainable}'; ") and "(model.vision_tower." in message
    rest = r"^model\.language_model\.layers\.\d+\.self_attn\.q_proj\.lora_"
    assert prepare(config_of(checkpoint, model={"adapter": str(adapter), "trainable": rest}))


# An adapter


def test_an_adapter_that_is_not_finite_is_named(config, tmp_path: Path):
    adapter = write_adapter(tmp_path / "a", tmp_path / "c")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit(adapter / ADAPTER_WEIGHTS, lambda t: t[name].fill_(torch.nan))
    message = refused(config(model={"adapter": str(adapter)}))
    assert message.startswith("model.adapter: ") and f"NaN or infinity in 1 tensors: {name}; save it again" in message


@pytest.mark.parametrize("zero", ["lora_A", "lora_B"])
def test_an_adapter_with_a_zero_factor_is_inert(config, tmp_path: Path, zero: str):
    adapter = write_adapter(tmp_path / "a", tmp_path / "c", use_rslora=True)
    edit(adapter / ADAPTER_WEIGHTS, lambda t: [value.zero_() for name, value in t.items() if zero in name])
    message = refused(config(model={"adapter": str(adapter)}))
    assert "it is inert" in message and message.endswith("train it for a step, or leave model.adapter null")


def test_an_adapter_whose_files_do_not_tell_is_left_to_loading(config, tmp_path: Path):
    for name, kind in (("magnitude", {"use_dora": True}), ("trained", {"modules_to_save": ["lm_head"]})):
        adapter = write_adapter(tmp_path / name, tmp_path / "c", moved="modules_to_save", **kind)
        assert prepare(config(model={"adapter": str(adapter)}))


# Sizes


def test_a_checkpoint_larger_than_memory_is_looked_through(tmp_path: Path):
    shape = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
        eos_token_id=0, bos_token_id=None, pad_token_id=None, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    checkpoint = save_checkpoint(tmp_path / "c", tiny_llama(8), CHARACTERS)
    shape.save_pretrained(checkpoint)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shape)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (checkpoint / WEIGHTS).open("wb") as file:  # a hole on the disk
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    assert end > 150e9
    config = config_of(checkpoint, model={"dtype": "bfloat16"})
    assert inspect_checkpoint(config.model, hashed=False).config.num_hidden_layers == 80


def test_memory_of_this_machine_is_compared_before_its_ray_is_started(config):
    huge = config(generation={"gen_batch_size": 10**9})
    demand = prepare(huge).memory
    with pytest.raises(ClusterError, match=r"^memory: an actor needs .* an actor's share of node .* has ") as caught:
        check_fits_here(huge, demand)
    assert caught.value.exit_code == 4
    check_fits_here(config(cluster={"address": "auto"}, generation={"gen_batch_size": 10**9}), demand)
