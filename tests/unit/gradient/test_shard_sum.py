"""Which parameters the gradient is of, its layout, and a sum into which a shard goes whole or not at all."""

import numpy as np
import pytest
import torch
from support.models import tiny_gpt2, tiny_llama

from ray_probe.errors import NonFiniteError
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.gradient.shard_sum import GradientSum


def fill(model: torch.nn.Module, seed: int) -> None:
    """A gradient in every trainable parameter."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, dtype=parameter.grad_dtype)


def summed(gradient: GradientSum) -> np.ndarray:
    """The whole sum in one bucket."""
    return gradient.bucket(0, gradient.layout.size)


def flat(model: torch.nn.Module) -> np.ndarray:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).double().numpy()


def test_tied_parameters_are_in_the_layout_once():
    model = tiny_gpt2(8, torch.float32)
    assert model.lm_head.weight is model.transformer.wte.weight
    gradient = GradientSum(model, "all")
    assert sum("wte" in name for name in gradient.layout.names) == 1
    assert not any("lm_head" in name for name in gradient.layout.names)
    assert gradient.layout.size == sum(p.numel() for p in model.parameters())


def test_the_layout_says_where_each_parameter_lies_in_the_flat_gradient():
    model = tiny_llama(8)
    gradient = GradientSum(model, "all")
    fill(model, 0)
    by_name = {name: p.grad.clone().numpy() for name, p in model.named_parameters()}
    gradient.add_shard()
    layout, vector = gradient.layout, summed(gradient)
    assert layout.size == len(vector)
    assert [name for name, *_ in layout.ranges()] == list(layout.names) == list(by_name)
    for name, shape, start, stop in layout.ranges():
        np.testing.assert_array_equal(vector[start:stop].reshape(shape), by_name[name])


def test_a_layout_holds_scalars_too():
    layout = ParameterLayout(("a", "b"), ((), (2, 3)))
    assert layout.size == 7
    assert list(layout.ranges()) == [("a", (), 0, 1), ("b", (2, 3), 1, 7)]


@pytest.mark.parametrize("numbers", [1, 2, 3, 6, 7, 8, 100])
def test_buckets_tile_the_flat_gradient(numbers: int):
    buckets = ParameterLayout(("a", "b"), ((), (2, 3))).buckets(numbers)
    assert [place for start, stop in buckets for place in range(start, stop)] == list(range(7))
    assert all(0 < stop - start <= numbers for start, stop in buckets)


@pytest.mark.parametrize("numbers", [1, 7, 100, 1000, 10**6])
@pytest.mark.parametrize("turned", [False, True])
def test_buckets_put_together_are_the_sum(numbers: int, turned: bool):
    model = tiny_llama(8)
    if turned:  # memory that is not in the order of the flat gradient
        model.lm_head.weight = torch.nn.Parameter(torch.randn(16, 8).T)
    gradient = GradientSum(model, "lm_head|norm" if numbers == 1 else "all")
    assert not gradient.bucket(3, 9).any()
    fill(model, 0)
    if turned:
        model.lm_head.weight.grad = torch.randn(16, 8).T
    expected = flat(model)
    gradient.add_shard()
    buckets = [gradient.bucket(start, stop) for start, stop in gradient.layout.buckets(numbers)]
    np.testing.assert_array_equal(np.concatenate(buckets), expected.astype(np.float32))


def test_shards_add_up_and_each_gives_its_own_squared_norm():
    model = tiny_llama(8)
    gradient, total = GradientSum(model, "all"), 0.0
    for seed in range(3):
        fill(model, seed)
        own = flat(model)
        total = total + own
        assert gradient.add_shard() == pytest.approx(own @ own, rel=1e-9)
        assert all(p.grad is None for p in model.parameters())
    np.testing.assert_allclose(summed(gradient), total, rtol=1e-6, atol=1e-6)


def test_a_parameter_that_a_shard_did_not_reach_counts_as_zero_and_is_told_until_one_does():
    model = tiny_llama(8)
    gradient = GradientSum(model, "mlp")
    names = gradient.layout.names
    assert gradient.unreached == tuple(range(6))
    model.model.layers[0].mlp.up_proj.weight.grad = torch.ones(32, 16)
    assert gradient.add_shard() == pytest.approx(512)
    assert summed(gradient).sum() == 512
    assert [name for place, name in enumerate(names) if place not in gradient.unreached] == [
        "model.layers.0.mlp.up_proj.weight"
    ]
    model.model.layers[1].mlp.up_proj.weight.grad = torch.zeros(32, 16)
    gradient.add_shard()
    assert len(gradient.unreached) == 4, "what was reached stays reached; a gradient of zero is one"
    gradient.reset()
    assert gradient.unreached == tuple(range(6))


def test_a_shard_that_is_refused_reaches_nothing():
    model = tiny_llama(8)
    gradient = GradientSum(model, "mlp")
    model.model.layers[0].mlp.up_proj.weight.grad = torch.full((32, 16), torch.nan)
    with pytest.raises(NonFiniteError):
        gradient.add_shard()
    assert gradient.unreached == tuple(range(6))


def test_a_round_starts_from_zero():
    model = tiny_llama(8)
    gradient = GradientSum(model, "all")
    assert not summed(gradient).any() and summed(gradient).dtype == np.float32
    fill(model, 0)
    gradient.add_shard()
    fill(model, 1)
    gradient.reset()
    assert not summed(gradient).any()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_is_refused_and_the_sum_is_untouched(value: float):
    model = tiny_llama(8)
    gradient = GradientSum(model, "all")
    fill(model, 0)
    gradient.add_shard()
    before = summed(gradient)
    fill(model, 1)
    model.lm_head.weight.grad[2, 3] = value
    with pytest.raises(NonFiniteError, match=r"^gradient: .*was not added$"):
        gradient.add_shard()
    np.testing.assert_array_equal(summed(gradient), before)


def test_a_sum_handed_out_does_not_change_with_later_shards():
    model = tiny_llama(8)
    gradient = GradientSum(model, "all")
    fill(model, 0)
    gradient.add_shard()
    handed_out = summed(gradient)
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
    handed_out = summed(gradient)
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
    assert summed(gradient).dtype == (np.float64 if sums == torch.float64 else np.float32)


def test_many_small_shards_are_not_lost_beside_bfloat16_weights():
    model = tiny_llama(8).to(torch.bfloat16)
    gradient = GradientSum(model, "lm_head")
    for _ in range(2000):
        model.lm_head.weight.grad = torch.full((8, 16), 1e-3)
        gradient.add_shard()
    np.testing.assert_allclose(summed(gradient), 2.0, rtol=1e-4)
