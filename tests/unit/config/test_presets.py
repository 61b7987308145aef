"""The presets load, fill a GPU's decode batch, keep every actor busy, and fit the memory that they name."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from support.deployment import ROOT
from transformers import Qwen2Config, Qwen2ForCausalLM

from ray_probe.checkpoints.memory_forecast import estimate
from ray_probe.config import ProbeConfig, load_config
from ray_probe.data.prompts import load_prompts

LONGEST_PROMPT = 100  # tokens; the demo's sums in a chat template have fewer
NAMES = ["gpu_1", "gpu_8", "cluster_1p5b"]
# As in the config.json of the checkpoints that the presets name.
QWEN = {
    "Qwen/Qwen2.5-0.5B-Instruct": {
        "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_hidden_layers": 24
    },
    "Qwen/Qwen2.5-1.5B-Instruct": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_hidden_layers": 28
    },
}  # fmt: skip


def preset(name: str) -> ProbeConfig:
    return load_config(ROOT / "configs" / f"{name}.yaml")


def qwen(name: str) -> Qwen2Config:
    return Qwen2Config(vocab_size=151936, num_key_value_heads=2, tie_word_embeddings=True, **QWEN[name])


def write_headers(directory: Path, config: Qwen2Config) -> None:
    """A checkpoint of these shapes whose weights are a hole in the file."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    header, end = {}, 0
    for name, value in model.named_parameters():
        start, end = end, end + 2 * value.numel()
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize("name", NAMES)
def test_a_shard_fills_the_decode_batch_and_every_actor_has_two_a_round(name: str) -> None:
    config = preset(name)
    batch = config.batch
    assert batch.shard_prompts * batch.responses_per_prompt >= config.generation.gen_batch_size
    assert batch.prompts_per_round % batch.shard_prompts == 0
    shards = batch.prompts_per_round // batch.shard_prompts
    assert shards >= 2 * max(config.cluster.actors, config.cluster.slots)
    assert shards >= 8  # fewer make the de-biased norm too large


@pytest.mark.parametrize("name", NAMES)
def test_the_run_ends_before_a_prompt_comes_twice(name: str) -> None:
    config = preset(name)
    prompts = load_prompts(str(ROOT / "configs/prompts/tiny.jsonl"), config.data.field)
    assert str(config.data.prompts).endswith("configs/prompts/tiny.jsonl")
    assert config.batch.rounds is not None
    assert config.batch.rounds * config.batch.prompts_per_round <= len(prompts)


@pytest.mark.parametrize("name", NAMES)
def test_an_actor_fits_the_gpu_that_the_preset_names_and_needs_what_it_says(name: str, tmp_path: Path) -> None:
    config, text = preset(name), (ROOT / "configs" / f"{name}.yaml").read_text()
    write_headers(tmp_path, qwen(config.model.path))
    needed = estimate(config, tmp_path, qwen(config.model.path), LONGEST_PROMPT)
    (has_gb,) = re.findall(r"GPUs? of (\d+) GB", text)
    (said_gb,) = re.findall(r"= (\d+) GB", text.replace("\n  #", ""))
    assert needed.total / 1e9 == pytest.approx(float(said_gb), rel=0.05)
    assert needed.total / 1e9 < 0.7 * float(has_gb)  # a forecast, and allocators take some on top


@pytest.mark.parametrize("name", ["gpu_8", "cluster_1p5b"])
def test_what_is_said_to_fit_24_gb_does(name: str, tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml", ["generation.tf_batch_size=2"])
    write_headers(tmp_path, qwen(config.model.path))
    needed = estimate(config, tmp_path, qwen(config.model.path), LONGEST_PROMPT)
    assert (needed.total - needed.gradients) / 1e9 < 0.7 * 24
