"""Recomputed layers give the same numbers, hold less, and stay in eval mode."""

import pytest
import torch
from support.models import ARCHITECTURES, tiny_model

from ray_probe.errors import ConfigError
from ray_probe.model.activation_checkpointing import set_recompute

IDS = torch.arange(3, 15).reshape(2, 6)


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def saved_numbers(model: torch.nn.Module) -> int:
    """Numbers that the graph of a forward pass keeps."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = model(input_ids=IDS, use_cache=False).logits
    assert held.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recomputed_layers_give_the_same_gradient(architecture: str) -> None:
    model = tiny_model(architecture, 24).eval()
    plain = gradients(model)
    set_recompute(model, True)
    for before, after in zip(plain, gradients(model), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-7)
    assert not any(module.training for module in model.modules()), "no dropout comes along"


def test_recomputed_layers_hold_less_and_the_setting_can_be_taken_back() -> None:
    model = tiny_model("llama", 24).eval()
    plain = saved_numbers(model)
    set_recompute(model, True)
    set_recompute(model, True)
    assert saved_numbers(model) < 0.7 * plain
    with torch.no_grad():
        assert model(input_ids=IDS).past_key_values is not None, "sampling keeps its cache"
    set_recompute(model, False)
    assert saved_numbers(model) == plain


def test_a_model_without_layers_is_told() -> None:
    with pytest.raises(ConfigError, match=r"^estimator.activation_checkpointing: got True; Linear has no layers"):
        set_recompute(torch.nn.Linear(2, 2), True)
