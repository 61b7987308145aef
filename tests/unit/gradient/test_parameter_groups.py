"""Every parameter falls into one group that a reader knows; what no pattern knows is named after its module."""

import pytest
from support.models import tiny_experts, tiny_model

from ray_probe.gradient.parameter_groups import group_of, parameter_groups


def layered(*kinds: str) -> set[str]:
    return {f"layer {layer} {kind}" for layer in range(2) for kind in kinds}


SEPARATE = layered("q", "k", "v", "o", "mlp", "norms")
FUSED = layered("qkv", "o", "mlp", "norms")
EXPECTED = {
    "llama": SEPARATE | {"embedding", "norms", "head"},
    "qwen2": SEPARATE | {"embedding", "norms", "head"},
    "mistral": SEPARATE | {"embedding", "norms", "head"},
    "llama_tied": SEPARATE | {"embedding and head", "norms"},
    "gemma2": SEPARATE | {"embedding and head", "norms"},
    "gpt2": FUSED | {"embedding and head", "embedding", "norms"},
    "opt": SEPARATE | {"embedding and head", "embedding", "norms"},
    "gpt_neox": FUSED | {"embedding", "norms", "head"},
    "bloom": FUSED | {"embedding and head", "norms"},
}


@pytest.mark.parametrize("architecture", EXPECTED)
def test_the_groups_of_an_architecture(architecture: str):
    model = tiny_model(architecture, 8)
    groups = parameter_groups(model)
    assert list(groups) == [name for name, _ in model.named_parameters()]
    assert set(groups.values()) == EXPECTED[architecture]


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe", "GptOss"])
def test_router_and_experts_are_the_mlp(family: str):
    groups = parameter_groups(tiny_experts(family, 8))
    others = layered() if family != "GptOss" else {f"model.layers.{layer}.self_attn" for layer in range(2)}
    assert set(groups.values()) == EXPECTED["llama"] | others
    assert {group for name, group in groups.items() if ".mlp." in name} == layered("mlp")


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.11.self_attn.q_norm.weight", "layer 11 norms"),
        ("model.layers.0.post_attention_layernorm.weight", "layer 0 norms"),
        ("transformer.h.3.attn.attention.k_proj.weight", "layer 3 k"),
        ("model.layers.2.self_attn.qkv_proj.weight", "layer 2 qkv"),
        ("model.layers.2.self_attn.kv_a_proj_with_mqa.weight", "layer 2 kv"),
        ("model.layers.7.mlp.experts.5.q.weight", "layer 7 mlp"),
        ("transformer.word_embeddings_layernorm.weight", "norms"),
        ("backbone.layers.1.mixer.in_proj.weight", "backbone.layers.1.mixer.in_proj"),
        ("backbone.layers.1.mixer.A_log", "backbone.layers.1.mixer"),
        ("scale", "scale"),
    ],
)
def test_the_group_of_a_name(name: str, group: str):
    assert group_of(name) == group
