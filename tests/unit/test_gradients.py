"""Which parameters the gradient is of, its layout, and a sum into which a shard goes whole or not at all."""

import numpy as np
import pytest
import torch
from support.models import tiny_gpt2, tiny_llama

from ray_probe.errors import ConfigError, NonFiniteError
from ray_probe.gradients import GradientSum, Layout
from ray_probe.trainable import select_trainable


def fill(model: torch.nn.Module, seed: int) -> None:
    """A gradient in every trainable parameter."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, dtype=parameter.grad_dtype)


def flat(model: torch.nn.Module) -> np.ndarray:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).double().numpy()


@pytest.mark.parametrize(
    ("trainable", "count"), [("all", 21), (r"mlp", 6), (r"^model\.layers\.0\.", 9), (r"layers\.[01]\.mlp\.up", 2)]
)
def test_a_regular_expression_selects_parameters_by_name(trainable: str, count: int):
    model = tiny_llama(8)
    chosen = select_trainable(model, trainable)
    assert len(chosen) == count
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(chosen)


def test_selecting_anew_replaces_the_selection_before():
    model = tiny_llama(8)
    select_trainable(model, "mlp")
    assert len(select_trainable(model, "all")) == 21


def test_an_expression_that_matches_nothing_is_refused_with_some_names():
    with pytest.raises(
        ConfigError, match=r"^model\.trainable: got 'mpl'; no parameter matches; .*embed_tokens"
    ) as caught:
        select_trainable(tiny_llama(8), "mpl")
    assert caught.value.exit_code == 2


def test_frozen_parameters_get_no_gradient():
    model = tiny_llama(8)
    chosen = select_trainable(model, r"layers\.1\.self_attn")
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(chosen)


def test_tied_parameters_are_in_the_layout_once():
    model = tiny_gpt2(8, torch.float32)
    assert model.lm_head.weight is model.transformer.wte.weight
    gradient = GradientSum(model, "all")
    assert sum("wte" in name for name in gradient.layout.names) == 1
    assert not any("lm_head" in name for name in gradient.layout.names)
    assert gradient.layout.size == sum(p.numel() for p in model.parameters())


def test_a_flat_gradient_unflattens_to_names_and_shapes_and_back():
    model = tiny_llama(8)
    gradient = GradientSum(model, "all")
    fill(model, 0)
    by_name = {name: p.grad.clone().numpy() for name, p in model.named_parameters()}
    gradient.add_shard()
    layout, vector = gradient.layout, gradient.flat()
    assert layout.size == len(vector)
    parts = layout.unflatten(vector)
    assert list(parts) == list(layout.names) == list(by_name)
    for name, part in parts.items():
        np.testing.assert_array_equal(part, by_name[name])
    np.testing.assert_array_equal(np.concatenate([part.ravel() for part in parts.values()]), vector)


def test_a_layout_holds_scalars_too():
    layout = Layout(("a", "b"), ((), (2, 3)))
    parts = layout.unflatten(np.arange(7.0))
    assert layout.size == 7 and parts["a"].shape == () and parts["b"].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_shards_add_up_and_each_gives_its_own_squared_norm():
    model = tiny_llama(8)
    gradient, total = GradientSum(model, "all"), 0.0
    for seed in range(3):
        fill(model, seed)
        own = flat(model)
        total = total + own
        assert gradient.add_shard() == pytest.approx(own @ own, rel=1e-9)
        assert all(p.grad is None for p in model.parameters())
    np.testing.assert_allclose(gradient.flat(), total, rtol=1e-6, atol=1e-6)


def test_a_parameter_without_a_gradient_counts_as_zero():
    model = tiny_llama(8)
    gradient = GradientSum(model, "mlp")
    model.model.layers[0].mlp.up_proj.weight.grad = torch.ones(32, 16)
    assert gradient.add_shard() == pytest.approx(512)
    assert gradient.flat().sum() == 512


def test_a_round_starts_from_zero():
    model = tiny_llama(8)
    gradient = GradientSum(model, "all")
    assert not gradient.flat().any() and gradient.flat().dtype == np.float32
    fill(model, 0)
    gradient.add_shard()
    fill(model, 1)
    gradient.reset()
    assert not gradient.flat().any()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_is_refused_and_the_sum_is_untouched(value: float):
    model = tiny_llama(8)
    gradient = GradientSum(model, "all")
    fill(model, 0)
    gradient.add_shard()
    before = gradient.flat()
    fill(model, 1)
    model.lm_head.weight.grad[2, 3] = value
    with pytest.raises(NonFiniteError, match=r"^gradient: .*was not added$"):
        gradient.add_shard()
    np.testing.assert_array_equal(gradient.flat(), before)


def test_a_sum_handed_out_does_not_change_with_later_shards():
    model = tiny_llama(8)
    gradient = GradientSum(model, "all")
    fill(model, 0)
    gradient.add_shard()
    handed_out = gradient.flat()
    copied = handed_out.copy()
    fill(model, 1)
    gradient.add_shard()
    np.testing.assert_array_equal(handed_out, copied)


@pytest.mark.parametrize("single", ["lm_head", "embed_tokens"])
def test_a_sum_of_one_parameter_does_not_change_with_later_shards_either(single: str):
    model = tiny_llama(8)
    gradient = GradientSum(model, single)
    fill(model, 0)
    gradient.add_shard()
    handed_out = gradient.flat()
    copied = handed_out.copy()
    fill(model, 1)
    gradient.add_shard()
    np.testing.assert_array_equal(handed_out, copied)


@pytest.mark.parametrize(
    ("weights", "sums"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_gradients_accumulate_in_float32_or_wider(weights: torch.dtype, sums: torch.dtype):
    model = tiny_llama(8).to(weights)
    gradient = GradientSum(model, "all")
    for _ in range(2):
        model(input_ids=torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {sums}
    gradient.add_shard()
    assert gradient.flat().dtype == (np.float64 if sums == torch.float64 else np.float32)


def test_many_small_shards_are_not_lost_beside_bfloat16_weights():
    model = tiny_llama(8).to(torch.bfloat16)
    gradient = GradientSum(model, "lm_head")
    for _ in range(2000):
        model.lm_head.weight.grad = torch.full((8, 16), 1e-3)
        gradient.add_shard()
    np.testing.assert_allclose(gradient.flat(), 2.0, rtol=1e-4)
