"""The memory forecast is near the measured peak; a refusal names both numbers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from support.adapters import write_adapter
from support.architectures import tiny
from support.models import probe_config, save_checkpoint, tiny_experts, tiny_llama, tiny_model
from support.runs import components_of
from torch.profiler import ProfilerActivity, profile

from ray_probe.checkpoints.inspection import inspect_checkpoint
from ray_probe.checkpoints.memory_forecast import CHUNK_BYTES, MemoryDemand, check_fits, estimate, size
from ray_probe.config import ProbeConfig
from ray_probe.errors import ClusterError
from ray_probe.model.sequences import pack_sequences
from ray_probe.rollout.builder import build_rollout

DEMO = Path(__file__).parents[3] / "configs" / "models" / "tiny"
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers
PROMPT, CAP, MICRO_BATCH = 16, 48, 8


def config_of(checkpoint: Path, model: dict[str, Any] | None = None, **generation: Any) -> ProbeConfig:
    batches = {"max_new_tokens": CAP, "tf_batch_size": MICRO_BATCH, "gen_batch_size": MICRO_BATCH} | generation
    return probe_config(checkpoint, model=model or {}, data={"prompts": ["1"]}, generation=batches)


def demand_of(config: ProbeConfig, longest_prompt: int = PROMPT) -> MemoryDemand:
    found = inspect_checkpoint(config.model, hashed=False)
    return estimate(config, found.directory, found.config, longest_prompt, found.adapter)


def measured_scoring(config: ProbeConfig) -> int:
    """Return the peak bytes of a second micro-batch, when `.grad` exists."""
    components = components_of(build_rollout(config, Path(config.model.path), "policy"))
    model = components.processor.model
    rows = model.get_input_embeddings().weight.shape[0]
    prompts, responses = (torch.randint(2, rows, (MICRO_BATCH, width)).tolist() for width in (PROMPT, CAP))
    sequences = pack_sequences(prompts, [[response] for response in responses])
    components.accumulate_sum_X(sequences, None)
    held = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        components.accumulate_sum_X(sequences, None)
    now = peak = held
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_forecast_for_the_demo_is_within_a_factor_of_two_of_the_measured_peak(dtype: str):
    config = config_of(DEMO, {"dtype": dtype})
    demand, measured = demand_of(config), measured_scoring(config)
    assert 0.5 < (demand.gradients // 2 + demand.activations + demand.logits) / measured < 2


def test_the_forecast_holds_for_grouped_heads_and_an_adapter_alone(tmp_path: Path):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    special = {"num_key_value_heads": 1, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=500, **shape, **special))
    checkpoint = save_checkpoint(tmp_path / "c", model, "abcdef")
    adapter = write_adapter(tmp_path / "a", checkpoint)
    for chosen in ({}, {"adapter": str(adapter), "trainable": "adapter"}):
        config = config_of(checkpoint, chosen)
        demand, measured = demand_of(config), measured_scoring(config)
        assert 0.5 < (demand.gradients // 2 + demand.activations + demand.logits) / measured < 2


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("gemma4_text", {"head_dim": 32, "global_head_dim": 64, "sliding_window": 64}),
        ("deepseek_v3", {"qk_nope_head_dim": 32, "v_head_dim": 32, "moe_intermediate_size": 128}),
    ],
)
def test_the_forecast_holds_for_shapes_that_differ_by_layer_and_for_latent_keys(
    tmp_path: Path, name: str, heads: dict[str, Any]
):
    model = tiny(name, hidden_size=128, intermediate_size=384, **heads)
    config = config_of(save_checkpoint(tmp_path / "c", model, "abcdef"))
    demand, measured = demand_of(config), measured_scoring(config)
    assert 0.5 < (demand.gradients // 2 + demand.activations + demand.logits) / measured < 2


def test_layers_that_differ_are_counted_one_by_one(tmp_path: Path):
    def held(name: str, **settings: Any) -> tuple[int, int]:
        demand = demand_of(config_of(save_checkpoint(tmp_path / name, tiny("gemma4_text", **settings), "abcdef")))
        assert not demand.unknown
        return demand.held_a_position, demand.activations

    narrow, wide = held("narrow", head_dim=8, global_head_dim=8), held("wide", head_dim=16, global_head_dim=16)
    both = held("both", head_dim=8, global_head_dim=16)
    assert both == tuple((few + many) // 2 for few, many in zip(narrow, wide, strict=True))
    assert narrow[0] < wide[0]


@pytest.mark.parametrize("name", ["llama", "gemma4_text", "deepseek_v3", "gpt2", "qwen3_next"])
def test_the_cache_is_forecast_layer_by_layer(tmp_path: Path, name: str):
    """A window must hold the whole row; states of fixed size are left out."""
    model = tiny(name, **({"sliding_window": 64} if name == "gemma4_text" else {}))
    checkpoint = save_checkpoint(tmp_path / "c", model, "abcdef")
    cache = model(input_ids=torch.arange(PROMPT)[None], use_cache=True).past_key_values
    tables = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    held = sum(table.nbytes for table in tables if table is not None) // PROMPT
    one, two = (demand_of(config_of(checkpoint, max_new_tokens=1, gen_batch_size=rows)).cache for rows in (1, 2))
    logits = CHUNK_BYTES * model.config.vocab_size
    copies = (two - one - logits) // (PROMPT + 1) - held
    assert 0 < copies < 4 * 4 * 4 * (16 + 16 + 8), "of one layer's queries, keys and values: four heads in float32"


class Shapeless:
    """A configuration that does not tell how large the model is."""

    def get_text_config(self) -> "Shapeless":
        return self

    @property
    def num_hidden_layers(self) -> int:
        raise NotImplementedError("ask each layer\nfor its own")


def test_a_forecast_that_cannot_be_made_is_a_warning():
    config = config_of(DEMO)
    known, found = demand_of(config), inspect_checkpoint(config.model, hashed=False)
    demand = estimate(config, found.directory, Shapeless(), PROMPT)
    assert (demand.weights, demand.gradients) == (known.weights, known.gradients)
    assert demand.total == demand.weights + demand.gradients
    assert demand.unknown == "Shapeless does not tell its shape: ask each layer for its own"
    assert demand.note().startswith("warning: memory of an actor: weights ") and "\n" not in demand.note()
    assert demand.note().endswith(f", without activations, logits and cache ({demand.unknown})")
    assert known.note() == f"memory of an actor: {known.line()}"
    check_fits(demand, demand.total, "a device")
    with pytest.raises(ClusterError, match="without activations"):
        check_fits(demand, demand.total - 1, "a device")
def test_the_copies_of_fused_experts_that_a_lora_makes_are_counted_once_for_each_micro_batch(tmp_path: Path):
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_local_experts": 8}
    model = tiny_experts("Mixtral", 64, **shape)
    checkpoint = save_checkpoint(tmp_path / "c", model, "abcdef")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = write_adapter(tmp_path / "a", checkpoint, target_modules=[], target_parameters=experts)
    config = config_of(checkpoint, {"adapter": str(adapter), "trainable": "adapter"})
    demand, measured = demand_of(config), measured_scoring(config)
    assert demand.held_a_batch == sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    assert 0.5 < (demand.gradients // 2 + demand.activations + demand.logits) / measured < 2
    recomputed = config.estimator.model_copy(update={"activation_checkpointing": True})
    assert demand_of(config.model_copy(update={"estimator": recomputed})).held_a_batch == 0


def test_a_large_vocabulary_is_no_table_of_logits_in_forecast_or_in_fact(tmp_path: Path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=60_000, **shape, **special))
    config = config_of(save_checkpoint(tmp_path / "c", model, "abcdef"))
    demand, measured = demand_of(config), measured_scoring(config)
    assert 0.5 < (demand.gradients // 2 + demand.activations + demand.logits) / measured < 2
    table = 4 * config.generation.tf_batch_size * CAP * 60_000
    assert measured - demand.gradients // 2 < table, (
        "which logits, their gradient and their tables would take several times"
    )


@pytest.mark.parametrize(("dtype", "weights", "gradients"), [("float32", 4, 8), ("bfloat16", 2, 8), ("float64", 8, 16)])
def test_weights_are_counted_in_the_configured_dtype_and_gradients_in_two_wide_buffers(
    tmp_path: Path, dtype: str, weights: int, gradients: int
):
    model = tiny_llama(8)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    demand = demand_of(config_of(save_checkpoint(tmp_path / "c", model, "abcdef"), {"dtype": dtype}))
    assert (demand.weights, demand.gradients) == (numbers * weights, numbers * gradients)


def test_tied_and_sharded_weights_are_counted_once(tmp_path: Path):
    model = tiny_model("llama_tied", 16)
    checkpoint = save_checkpoint(tmp_path / "c", model, "abcdef")
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="8KB")
    assert demand_of(config_of(checkpoint)).weights == 4 * sum(p.numel() for p in model.parameters())


def test_gradients_are_counted_for_the_trainable_part_alone(tmp_path: Path):
    model = tiny_llama(8)
    checkpoint = save_checkpoint(tmp_path / "c", model, "abcdef")
    adapter = write_adapter(tmp_path / "a", checkpoint)
    own = sum(p.numel() for p in peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True).parameters()
              if p.requires_grad)  # fmt: skip
    head = demand_of(config_of(checkpoint, {"trainable": "lm_head"}))
    assert head.gradients == 8 * model.lm_head.weight.numel()
    with_adapter = demand_of(config_of(checkpoint, {"adapter": str(adapter), "trainable": "adapter"}))
    assert with_adapter.gradients == 8 * own
    assert with_adapter.weights == head.weights + 4 * own


def test_batches_and_lengths_count_where_they_are_used():
    small = demand_of(config_of(DEMO))
    assert demand_of(config_of(DEMO, tf_batch_size=16)).activations == 2 * small.activations
    assert demand_of(config_of(DEMO, gen_batch_size=80)).cache == 10 * small.cache
    longer = demand_of(config_of(DEMO), longest_prompt=PROMPT + PROMPT + CAP)
    assert longer.activations == 2 * small.activations and longer.logits == small.logits


def test_sampling_and_scoring_take_turns():
    assert MemoryDemand(10, 20, 30, 5, 40, 1).total == 70
    assert MemoryDemand(10, 20, 30, 5, 4, 1).total == 65


def test_the_line_is_the_sum_that_people_can_check():
    demand = MemoryDemand(3_100_000_000, 12_400_000_000, 4_000_000_000, 500_000_000, 1_000_000, 1)
    assert demand.line() == "weights 3.1 GB + gradients 2 x 6.2 GB + activations 4 GB + logits 500 MB = 20 GB"
    assert "key-value cache 9 GB" in MemoryDemand(1, 2, 3, 4, 9_000_000_000, 1).line()
    assert [size(n) for n in (999, 1500, 2.5e6, 80e9, 1.25e12)] == ["999 B", "1.5 kB", "2.5 MB", "80 GB", "1.25 TB"]


def test_what_does_not_fit_ends_with_exit_4_and_names_need_device_and_remedy():
    demand = MemoryDemand(14_000_000_000, 56_000_000_000, 20_000_000_000, 2_000_000_000, 1, 1)
    check_fits(demand, 92_000_000_000, "NVIDIA H100")
    with pytest.raises(
        ClusterError, match=r"needs .*= 92 GB, and NVIDIA A100 has 80 GB; .*model\.trainable: adapter"
    ) as caught:
        check_fits(demand, 80_000_000_000, "NVIDIA A100")
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)


def test_forecast_and_node_cache_need_no_torch():
    modules = "ray_probe.checkpoints.memory_forecast, ray_probe.checkpoints.node_cache"
    code = f"import sys, {modules}; print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
