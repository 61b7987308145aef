"""Parameters that no text reaches are refused; experts that it misses are not."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from support.adapters import write_adapter
from support.models import probe_config, save_checkpoint, tiny_experts, tiny_llama, tiny_model, tiny_vision
from support.runs import components_of, gradient_of, processor_of
from support.workers import InProcessWorkers

from ray_probe.checkpoints.load import load_model
from ray_probe.config import ProbeConfig
from ray_probe.controller.measurement import Job, measure
from ray_probe.errors import ConfigError
from ray_probe.model.gradient_reach import refuse_unreached
from ray_probe.model.trainable import mark_adapter, mark_frozen, select_trainable
from ray_probe.rollout.builder import RolloutBuilder
from ray_probe.rollout.rollout import Rollout
from ray_probe.run.preparation.prepare import prepare
from ray_probe.run.round_checks import check_reached

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers
CHARACTERS = "abcdef"
SHAPE = {
    "vocab_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 7, "bos_token_id": None,
    "eos_token_id": 0,
}  # fmt: skip
ROUTED = {
    "Ernie4_5_Moe": {"moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "Afmoe": {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 1,
              "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip
BIAS = {
    "Ernie4_5_Moe": "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias",
    "Afmoe": "model.layers.1.mlp.expert_bias",
}
TOWER = r"^(?!model\.multi_modal_projector\.|model\.vision_tower\.)"


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("vision"), tiny_vision(), CHARACTERS)


def config_of(directory: Path, **model: Any) -> ProbeConfig:
    return probe_config(
        directory, model=model, data={"prompts": ["abc", "f"]},
        generation={"max_new_tokens": 8, "eos_token_ids": [0]},
    )  # fmt: skip


def brought_in(directory: Path, adapter: Path | None = None, **model: Any) -> Rollout:
    settings = model | ({} if adapter is None else {"adapter": str(adapter)})
    return RolloutBuilder().load(config_of(directory, **settings), directory, adapter, "policy")


def differentiated(rollout: Rollout) -> dict[str, torch.Tensor]:
    """The gradient of a shard by name, after the check that follows the first commit."""
    components, gradient = components_of(rollout), gradient_of(rollout)
    sequences = components.processor.generate(["abc", "f"], 2, [[(b, g) for g in range(2)] for b in range(2)])
    components.accumulate_sum_X(sequences, None)
    found = {name: p.grad.clone() for name, p in gradient.parameters.items() if p.grad is not None}
    gradient.add_shard()
    check_reached(gradient.layout, [rollout.gradient_report("")])
    return found


@pytest.mark.parametrize("family", ROUTED)
def test_a_routing_bias_that_the_architecture_has_frozen_is_left_out_and_named(tmp_path: Path, family: str):
    config = getattr(transformers, f"{family}Config")(**SHAPE | ROUTED[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    rollout = brought_in(save_checkpoint(tmp_path / "c", model, CHARACTERS))
    assert rollout.frozen == (BIAS[family],)
    assert set(differentiated(rollout)) == {name for name, _ in model.named_parameters()} - {BIAS[family]}


def test_a_whole_measurement_runs_and_says_what_it_leaves_out(tmp_path: Path):
    shape = transformers.Ernie4_5_MoeConfig(**SHAPE | ROUTED["Ernie4_5_Moe"])
    model = transformers.AutoModelForCausalLM.from_config(shape)
    checkpoint = save_checkpoint(tmp_path / "c", model, CHARACTERS)
    config = probe_config(
        checkpoint, data={"prompts": ["abc", "f"]}, generation={"max_new_tokens": 8, "eos_token_ids": [0]},
        batch={"prompts_per_round": 2, "shard_prompts": 1, "rounds": 2}, output={"dir": str(tmp_path), "name": "run"},
    )  # fmt: skip
    result = measure(Job(prepare(config), resume=False), InProcessWorkers(), lambda progress: None, lambda: False)
    assert result.counts.rounds == 2
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["frozen_parameters"] == [BIAS["Ernie4_5_Moe"]]
    line = f"model.trainable=all leaves out 1 parameters that the architecture has frozen: {BIAS['Ernie4_5_Moe']}"
    assert line in (tmp_path / "run" / "log.txt").read_text()


def test_a_vision_tower_is_refused_when_the_model_is_loaded_and_the_remedy_measures_the_rest(vision: Path):
    with pytest.raises(ConfigError) as caught:
        brought_in(vision)
    message = str(caught.value)
    assert message.startswith("model.trainable: got 'all'; ") and "\n" not in message and caught.value.exit_code == 2
    assert "take no part in what the model says of text (model.vision_tower." in message
    remedy = message.rpartition("model.trainable: ")[2]
    assert remedy == f"'{TOWER}'"
    rollout = brought_in(vision, trainable=remedy.strip("'"))
    towers = ("model.vision_tower.", "model.multi_modal_projector.")
    assert {n for n, _ in tiny_vision().named_parameters() if not n.startswith(towers)} == set(differentiated(rollout))


@pytest.mark.parametrize("trainable", ["adapter", "attn", "weight"])
def test_the_remedy_keeps_what_was_asked_for(vision: Path, tmp_path: Path, trainable: str):
    adapter = write_adapter(tmp_path / "a", vision, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"^model\.trainable: got .* take no part") as caught:
        brought_in(vision, adapter, trainable=trainable)
    remedy = re.findall(r"model\.trainable: '(.*)'$", str(caught.value))[0]
    rollout = brought_in(vision, adapter, trainable=remedy)
    model = processor_of(rollout).model
    asked = {name for name in select_trainable(model, trainable) if "language_model" in name or "lm_head" in name}
    assert set(rollout.layout.names) == asked and asked


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_the_remedy_for_an_adapter_chooses_its_parameters_and_no_others(bias: str):
    model = tiny_model("qwen2", 16)
    model.vision = type(model.model.layers[0])(model.config, 0)  # beside the text model, and with the same layers
    mark_frozen(model)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], bias=bias))
    own = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    mark_adapter(model, own, [])
    with pytest.raises(ConfigError) as caught:
        refuse_unreached(model, select_trainable(model, "adapter"), "adapter")
    (remedy,) = re.findall(r"model\.trainable: '(.*)'$", str(caught.value))
    assert set(select_trainable(model, remedy)) == {name for name in own if not name.startswith("vision.")}


def test_many_unreached_parameters_make_one_line():
    model = tiny_llama(8)
    for number in range(40):
        model.register_parameter(f"spare_{number}", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(ConfigError, match=r"40 of 61 parameters .*spare_2, \.\.\.\); give an expression") as caught:
        refuse_unreached(model, select_trainable(model, "all"), "all")
    assert len(str(caught.value)) < 300


def test_an_unused_part_of_every_layer_is_one_part_of_the_remedy():
    model = tiny_llama(8)
    for layer in model.model.layers:
        layer.spare = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=re.escape(r"'^(?!model\.layers\.\d+\.spare\.)'")):
        refuse_unreached(model, select_trainable(model, "all"), "all")


# What is not refused


class Routed(torch.nn.Module):
    """Experts as separate modules, of which only the first sees a token."""

    def __init__(self, experts: list[torch.nn.Module]) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(experts)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.experts[0](hidden)
        return output


@pytest.mark.parametrize("trainable", ["all", r"experts\.1\."])
def test_experts_that_a_short_text_is_not_routed_to_are_no_fault(trainable: str):
    model = tiny_llama(8)
    for layer in model.model.layers:
        layer.mlp = Routed([layer.mlp, type(layer.mlp)(model.config)])
    chosen = select_trainable(model, trainable)
    assert any("experts.1" in name for name in chosen)
    refuse_unreached(model, chosen, trainable)


class OfBlocks(torch.nn.Module):
    """Adds what a block of 16 tokens says, where a text is as long as that."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.block = inner, torch.nn.Linear(16, 16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.inner(hidden)
        return output if hidden.shape[1] < 16 else output + self.block(hidden).mean(dim=1, keepdim=True)


def test_what_only_a_longer_text_reaches_is_no_fault():
    for positions in (64, 15):
        model = tiny_llama(8, positions=positions)
        for layer in model.model.layers:
            layer.mlp = OfBlocks(layer.mlp)
        chosen = select_trainable(model, "all")
        if positions == 64:
            refuse_unreached(model, chosen, "all")
        else:
            with pytest.raises(ConfigError, match=r"4 of 25 parameters .*mlp\.block\.weight"):
                refuse_unreached(model, chosen, "all")


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_fused_experts_are_reached_as_a_whole(tmp_path: Path, family: str, recomputed: bool):
    checkpoint = save_checkpoint(tmp_path / "c", tiny_experts(family, 8, layer_types=None), CHARACTERS)
    config = probe_config(
        checkpoint, data={"prompts": ["abc"]}, estimator={"activation_checkpointing": recomputed},
        generation={"max_new_tokens": 8},
    )  # fmt: skip
    assert RolloutBuilder().load(config, checkpoint, None, "policy").frozen == ()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("architecture", ["llama_tied", "gpt2", "gemma2"])
def test_a_trial_needs_no_weights_and_leaves_nothing_behind(architecture: str, device: str):
    model = tiny_model(architecture, 8).to(device)
    chosen = select_trainable(model, "attn")
    refuse_unreached(model, chosen, "attn")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(chosen)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_vision_tower_is_known_without_weights(vision: Path):
    model = load_model(vision, "float32").to("meta")
    with pytest.raises(ConfigError, match=re.escape(TOWER)):
        refuse_unreached(model, select_trainable(model, "all"), "all")
