"""A split LM head gives the model's own logits, or is not split."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ray_probe.core.policy.head_products import Products
from ray_probe.core.policy.lm_head import Head
from ray_probe.core.policy.logits import Buffer
from ray_probe.model.head import find_head

SIZES = {
    "vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "mistral": {"tie_word_embeddings": True}, "qwen3": {"head_dim": 4}, "phi": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma2": {"head_dim": 4, "query_pre_attn_scalar": 4, "final_logit_softcapping": 30.0},
    "gemma3_text": {"head_dim": 4}, "cohere": {"logit_scale": 0.25}, "granite": {"logits_scaling": 3.0},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16}, "gpt_neox": {}, "bloom": {"n_head": 4, "n_layer": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}, "falcon": {}, "olmo2": {},
}  # fmt: skip


def a_model(name: str, **settings: Any) -> Any:
    torch.manual_seed(3)
    config = CONFIG_MAPPING[name](**(SIZES | ARCHITECTURES[name] | settings))
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)  # larger than at the start of training: what is scaled or capped shows
    return model


@torch.no_grad()
def logits_of(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    return Products.of(hidden.flatten(0, 1), head).logits(slice(None), slice(None)).unflatten(0, (2, -1))


def test_few_hidden_states_meet_the_weight_a_strip_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(2500, 16, generator=own), torch.randn(2500, generator=own)
    hidden = torch.randn(2, 5, 16, generator=own)
    exact = (hidden.double() @ weight.double().T + bias).float()
    for few in (64, 0):
        monkeypatch.setattr("ray_probe.core.policy.head_products.FEW_ROWS", few)
        torch.testing.assert_close(logits_of(Head(weight, bias), hidden), exact)


def ids() -> torch.Tensor:
    return torch.tensor([[5, 17, 31, 8, 90], [3, 3, 44, 61, 12]])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trunk_and_head_give_the_models_logits(name: str) -> None:
    model = a_model(name)
    head, reason = find_head(model)
    assert head is not None, reason
    whole = model(input_ids=ids(), use_cache=False).logits
    hidden, _ = head.hidden(input_ids=ids(), use_cache=False)
    torch.testing.assert_close(logits_of(head.matrices(), hidden), whole)
    with torch.no_grad():
        torch.testing.assert_close(head.logits(hidden[0], Buffer()), whole[0])


@pytest.mark.parametrize(("name", "field"), [("gemma2", "final_logit_softcapping"), ("cohere", "logit_scale")])
def test_what_is_done_to_logits_and_not_known_is_noticed(
    name: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = a_model(name)
    monkeypatch.setattr("ray_probe.model.head.SOFT_CAPS", ())
    monkeypatch.setattr("ray_probe.model.head.SCALES", {})
    head, reason = find_head(model)
    assert head is None
    assert "does more to its logits than a linear head" in reason and "\n" not in reason


def test_a_cap_that_only_large_logits_reach_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model("gemma2")
    for parameter in model.parameters():
        parameter.data *= 0.03
    monkeypatch.setattr("ray_probe.model.head.SOFT_CAPS", ())
    assert find_head(model)[0] is None


def test_a_lora_on_the_head_is_part_of_its_matrices() -> None:
    model = a_model("llama")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], lora_alpha=6))
    wrapped.eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    head, reason = find_head(model)
    assert head is not None, reason
    assert head.matrices().adapter is not None
    with torch.no_grad():
        whole = model(input_ids=ids(), use_cache=False).logits
        hidden, _ = head.hidden(input_ids=ids(), use_cache=False)
        torch.testing.assert_close(logits_of(head.matrices(), hidden), whole)
    assert head.matrices().adapter.down_ED is head.linear.lora_A["default"].weight, "the parameter itself"


def test_two_loras_on_a_head_are_left_to_the_model() -> None:
    model = a_model("llama")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]), adapter_name="first")
    wrapped.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"]))
    wrapped.base_model.set_adapter(["first", "second"])
    assert find_head(model)[0] is None


def test_a_head_that_is_no_linear_layer_is_said_to_be_none() -> None:
    model = a_model("llama")
    model.set_output_embeddings(torch.nn.Sequential(torch.nn.Linear(16, 97, bias=False)))
    head, reason = find_head(model)
    assert head is None and reason == "the head of LlamaForCausalLM is no linear layer over a trunk"
