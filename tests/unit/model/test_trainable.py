"""Which parameters the gradient is of, and how wide it accumulates."""

from typing import Any

import pytest
import torch
from support.models import tiny_llama

from ray_probe.errors import ConfigError
from ray_probe.model.trainable import adapter_parameters, frozen_out, mark_adapter, mark_frozen, select_trainable


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


def test_adapter_is_a_word_of_its_own_and_no_expression():
    model = tiny_llama(8)
    model.adapter_norm = torch.nn.LayerNorm(2)
    with pytest.raises(ConfigError, match=r"^model\.trainable: got 'adapter'; there is no adapter"):
        select_trainable(model, "adapter")


def test_the_parameters_of_an_adapter_are_those_that_were_marked():
    model = tiny_llama(8)
    own = {f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1)}
    mark_adapter(model, own, ["lm_head.weight"])
    assert adapter_parameters(model) == own
    assert set(select_trainable(model, "adapter")) == own


def test_a_parameter_that_an_adapter_stands_in_for_is_never_chosen():
    model = tiny_llama(8)
    mark_adapter(model, ["model.norm.weight"], ["lm_head.weight"])
    assert "lm_head.weight" not in select_trainable(model, "all")
    assert not model.lm_head.weight.requires_grad
    with pytest.raises(ConfigError, match="no parameter matches"):
        select_trainable(model, "lm_head")


def with_frozen_norm() -> Any:
    model = tiny_llama(8)
    model.model.norm.weight.requires_grad_(False)
    return model


def test_what_the_architecture_has_frozen_is_left_out_and_named():
    model = with_frozen_norm()
    for _ in range(2):  # selecting makes all else require no gradient, which is not taken for frozen the next time
        assert len(select_trainable(model, "all")) == 20
        assert frozen_out(model, "all") == ("model.norm.weight",)
    assert frozen_out(model, "mlp") == ()
    assert not model.model.norm.weight.requires_grad


def test_frozen_parameters_are_known_though_an_adapter_freezes_everything():
    model = with_frozen_norm()
    mark_frozen(model)
    model.requires_grad_(False)
    assert len(select_trainable(model, "all")) == 20


def test_an_expression_that_matches_frozen_parameters_alone_is_refused():
    with pytest.raises(ConfigError, match=r"^model\.trainable: .*the architecture has frozen \(model\.norm\.weight\)"):
        select_trainable(with_frozen_norm(), r"model\.norm")


def test_a_head_that_is_tied_to_a_replaced_embedding_is_chosen_under_its_own_name():
    model = tiny_llama(8, tie_word_embeddings=True)
    mark_adapter(model, [], ["model.embed_tokens.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert set(select_trainable(model, "lm_head")) == {"lm_head.weight"}


def test_unselected_parameters_get_no_gradient():
    model = tiny_llama(8)
    chosen = select_trainable(model, r"layers\.1\.self_attn")
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(chosen)


@pytest.mark.parametrize(
    ("weights", "gradients"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_gradients_accumulate_in_float32_or_wider(weights: torch.dtype, gradients: torch.dtype):
    model = tiny_llama(8).to(weights)
    select_trainable(model, "all")
    for _ in range(2):
        model(input_ids=torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {gradients}


def test_small_gradients_are_not_lost_beside_large_ones_under_bfloat16_weights():
    model = tiny_llama(8).to(torch.bfloat16)
    (name,) = select_trainable(model, "lm_head")
    weight = model.get_parameter(name)
    (weight.float().sum() * 256).backward()
    for _ in range(64):
        weight.sum().backward()
    assert weight.grad.unique().tolist() == [256 + 64]  # bfloat16 would stay at 256
