"""Kinds of LoRA that train more than linear factors, each with a tiny model."""

from typing import Any

import torch

from support.models import tiny_experts, tiny_llama, tiny_model

QUERY = {"target_modules": ["q_proj"]}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MODELS = {
    "llama": lambda seed: tiny_llama(8, seed=seed),
    "llama_tied": lambda seed: tiny_model("llama_tied", 8, seed),
    "qwen2": lambda seed: with_biases(tiny_model("qwen2", 16, seed)),
    "mixtral": lambda seed: tiny_experts("Mixtral", 8, seed),
    "gpt_oss": lambda seed: tiny_experts(
        "GptOss", 8, seed, layer_types=["sliding_attention", "full_attention"], sliding_window=4
    ),
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "one fused expert weight": ("mixtral", QUERY | {"target_parameters": EXPERTS[:1]}),
    "both fused expert weights": ("mixtral", {"target_modules": [], "target_parameters": EXPERTS}),
    "fused experts with biases": ("gpt_oss", QUERY | {"target_parameters": EXPERTS, "bias": "lora_only"}),
    "tokens": ("llama", QUERY | {"trainable_token_indices": [5, 3]}),
    "tokens of a tied head": ("llama_tied", QUERY | {"trainable_token_indices": {"embed_tokens": [5, 3]}}),
    "tokens of embedding and head": (
        "llama", QUERY | {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [2]}}),
    "an embedding and its tied head": (
        "llama_tied", QUERY | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "an embedding without its tied head": ("llama_tied", QUERY | {"modules_to_save": ["embed_tokens"]}),
    "a LoRA on embedding and tied head": (
        "llama_tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "biases of the LoRA's layers": ("qwen2", QUERY | {"bias": "lora_only"}),
    "all biases": ("qwen2", QUERY | {"bias": "all"}),
    "biases that are not there": ("llama", QUERY | {"bias": "lora_only"}),
}  # fmt: skip


def with_biases(model: Any) -> Any:
    own = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=own)
    return model


def copied(settings: dict[str, Any]) -> dict[str, Any]:
    """Without the lists themselves: peft changes them."""
    return {key: list(value) if isinstance(value, list) else value for key, value in settings.items()}
