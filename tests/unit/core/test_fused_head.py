"""The fused head equals token statistics of all its logits, without that table."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ray_probe.core.policy import differentiable_scores, head_gradient, head_products, logits, sampling
from ray_probe.core.policy.features import DEFAULT_FEATURES
from ray_probe.core.policy.fused_head import fused_token_statistics, score_and_keep
from ray_probe.core.policy.lm_head import Adapter, Head
from ray_probe.core.policy.logits import SamplingRule
from ray_probe.core.policy.token_statistics import TokenStatistics, token_statistics

CAP = 64
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.3},
    "capped": {"softcap": 5.0},
    "adapted": {"adapter": True},
    "all of it": {"bias": True, "scale": 1.7, "softcap": 8.0, "adapter": True},
}


class Case:
    """Hidden states, a head, tokens; a small `spread` makes wide nuclei."""

    def __init__(
        self, vocabulary: int, tokens: int = 24, hidden: int = 12, spread: float = 5.0, bias: bool = False,
        scale: float = 1.0, softcap: float | None = None, adapter: bool = False, dtype: torch.dtype = torch.float64,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(vocabulary)

        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        spread_T1 = torch.logspace(-1, 0, tokens)[:, None].double() * spread
        self.hidden_TD = (leaf(tokens, hidden).detach() * spread_T1).to(dtype).requires_grad_()
        self.weight_VD = leaf(vocabulary, hidden)
        self.bias_V = leaf(vocabulary) if bias else None
        self.low = Adapter(leaf(3, hidden), leaf(vocabulary, 3), 0.4) if adapter else None
        self.scale, self.softcap = scale, softcap
        self.tokens_T = torch.randint(vocabulary, (tokens,), generator=generator)
        self.position_T = torch.arange(tokens)
        self.weights_2T = torch.randn(2, tokens, generator=generator, dtype=torch.float64)

    def leaves(self) -> dict[str, Tensor]:
        found = {"hidden": self.hidden_TD, "weight": self.weight_VD, "bias": self.bias_V}
        if self.low is not None:
            found |= {"down": self.low.down_ED, "up": self.low.up_VE}
        return {name: leaf for name, leaf in found.items() if leaf is not None}

    def head(self, accumulate_into_grad: bool = False) -> Head:
        return Head(self.weight_VD, self.bias_V, self.scale, self.softcap, self.low, accumulate_into_grad)

    def logits(self) -> Tensor:
        logits_TV = self.hidden_TD @ self.weight_VD.t()
        if self.low is not None:
            logits_TV = logits_TV + self.low.scaling * (self.hidden_TD @ self.low.down_ED.t()) @ self.low.up_VE.t()
        if self.bias_V is not None:
            logits_TV = logits_TV + self.bias_V
        logits_TV = self.scale * logits_TV
        return logits_TV if self.softcap is None else self.softcap * torch.tanh(logits_TV / self.softcap)

    def of_logits(self, rule: SamplingRule) -> TokenStatistics:
        arguments = (self.position_T, self.tokens_T, self.position_T, rule, CAP, DEFAULT_FEATURES)
        return token_statistics(self.logits(), *arguments)

    def fused(self, rule: SamplingRule, accumulate_into_grad: bool = False) -> TokenStatistics:
        arguments = (self.tokens_T, self.position_T, rule, CAP, DEFAULT_FEATURES)
        return fused_token_statistics(self.hidden_TD, self.head(accumulate_into_grad), *arguments)

    def gradients(self, say: Callable[[], TokenStatistics]) -> dict[str, Tensor | None]:
        statistics = say()
        loss = (self.weights_2T * torch.stack([statistics.log_q_T, statistics.entropy_T])).sum()
        learned = {name: leaf for name, leaf in self.leaves().items() if leaf.requires_grad}
        found = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
        return dict.fromkeys(self.leaves()) | dict(zip(learned, found, strict=True))


def assert_near(one: Tensor | None, other: Tensor | None, relative: float) -> None:
    assert one is not None and other is not None and one.dtype == other.dtype
    assert (one - other).norm() <= relative * other.norm()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every loop over blocks, tiles and pieces run more than once."""
    monkeypatch.setattr(head_products, "BLOCK_ELEMENTS", 8 * 1000)
    monkeypatch.setitem(head_products.MOST_ROWS, "cpu", 10)
    monkeypatch.setattr(differentiable_scores, "PIECE", 100)
    monkeypatch.setitem(head_gradient.OUTER_ELEMENTS, "cpu", 64)
    monkeypatch.setitem(logits.TILE_ELEMENTS, "cpu", 2560)
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", 3000)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocabulary", "spread"), [(7, 1.0), (50, 3.0), (3001, 3.0), (3001, 0.2)])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_statistics_and_gradients_are_those_of_all_logits(kind: str, vocabulary: int, spread: float, top_p: float):
    case, rule = Case(vocabulary, spread=spread, **KINDS[kind]), SamplingRule(0.8, top_p)
    fused, expected = case.fused(rule), case.of_logits(rule)
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(fused, name), value, atol=1e-10, rtol=1e-10)
    whole = case.gradients(lambda: case.of_logits(rule))
    for name, gradient in case.gradients(lambda: case.fused(rule)).items():
        assert_near(gradient, whole[name], 1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocabulary", "spread"), [(50, 3.0), (3001, 3.0), (3001, 0.2)])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_what_was_found_without_a_graph_serves_for_one_to_the_bit(
    kind: str, vocabulary: int, spread: float, top_p: float, monkeypatch: pytest.MonkeyPatch
):
    case, rule = Case(vocabulary, spread=spread, **KINDS[kind]), SamplingRule(0.8, top_p)
    arguments = (case.hidden_TD, case.head(), case.tokens_T, case.position_T, rule, CAP, DEFAULT_FEATURES)
    anew = case.gradients(lambda: case.fused(rule))
    statistics, cached = score_and_keep(*arguments)
    tensors = (*cached.outputs, *cached.for_backward)
    assert not statistics.log_q_T.requires_grad and cached.bytes == sum(t.numel() * t.element_size() for t in tensors)
    monkeypatch.setattr(differentiable_scores, "search", None)  # no second search
    for _ in range(2):
        again = fused_token_statistics(*arguments, cached)
        for name, value in vars(statistics).items():
            assert torch.equal(getattr(again, name), value), name
        for name, gradient in case.gradients(lambda: fused_token_statistics(*arguments, cached)).items():
            assert gradient is not None and torch.equal(gradient, anew[name]), name  # type: ignore[arg-type]
    assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("spread", [3.0, 0.2])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_blocks_tiles_and_pieces_change_nothing(spread: float, top_p: float):
    case, rule = Case(1001, spread=spread, **KINDS["all of it"]), SamplingRule(0.8, top_p)
    expected = case.of_logits(rule)
    for name, value in vars(case.fused(rule)).items():
        torch.testing.assert_close(value, getattr(expected, name), atol=1e-10, rtol=1e-10)
    whole = case.gradients(lambda: case.of_logits(rule))
    for name, gradient in case.gradients(lambda: case.fused(rule)).items():
        assert_near(gradient, whole[name], 1e-10)


@pytest.mark.parametrize("top_p", [0.8, 1.0])
def test_gradcheck_passes(top_p: float):
    case, rule = Case(9, tokens=4, hidden=3, spread=1.0, **KINDS["all of it"]), SamplingRule(0.7, top_p)
    assert case.low is not None and case.bias_V is not None

    def say(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        hidden_TD, weight_VD, bias_V, down_ED, up_VE = leaves
        head = Head(weight_VD, bias_V, case.scale, case.softcap, Adapter(down_ED, up_VE, 0.4))
        statistics = fused_token_statistics(hidden_TD, head, case.tokens_T, case.position_T, rule, CAP)
        return statistics.log_q_T, statistics.entropy_T

    torch.autograd.gradcheck(say, tuple(case.leaves().values()), check_batched_grad=False)


@pytest.mark.parametrize("spread", [3.0, 0.2])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_float32_is_within_1e_5_of_float64_and_gradients_within_3e_6(spread: float, top_p: float):
    wide, narrow = (Case(3001, spread=spread, dtype=dtype) for dtype in (torch.float64, torch.float32))
    with torch.no_grad():
        wide.hidden_TD.copy_(narrow.hidden_TD)
        wide.weight_VD.copy_(narrow.weight_VD)
    rule = SamplingRule(0.8, top_p)
    expected, fused = wide.fused(rule), narrow.fused(rule)
    assert torch.equal(fused.outside_T, expected.outside_T)
    for name in ("log_q_T", "entropy_T", "features_TD"):
        torch.testing.assert_close(getattr(fused, name).double(), getattr(expected, name), atol=1e-5, rtol=1e-6)
    exact = wide.gradients(lambda: wide.fused(rule))
    for name, gradient in narrow.gradients(lambda: narrow.fused(rule)).items():
        assert gradient is not None and gradient.dtype == torch.float32
        assert_near(gradient.double(), exact[name], 3e-6)


@pytest.mark.parametrize("spread", [3.0, 0.2])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_the_weight_s_gradient_is_added_to_the_table_that_is_given(spread: float, top_p: float):
    case, rule = Case(3001, spread=spread), SamplingRule(0.8, top_p)
    expected = case.gradients(lambda: case.fused(rule))
    table_VD = case.weight_VD.grad = torch.ones_like(case.weight_VD)
    found = case.gradients(lambda: case.fused(rule, accumulate_into_grad=True))
    assert found["weight"] is None
    assert_near(found["hidden"], expected["hidden"], 1e-12)
    assert_near(table_VD.detach() - 1.0, expected["weight"], 1e-10)
    case.gradients(lambda: case.fused(rule, accumulate_into_grad=True))
    assert expected["weight"] is not None
    assert_near(table_VD.detach() - 1.0, 2.0 * expected["weight"], 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_weight_s_grad_is_created_in_its_grad_dtype_where_there_is_none(dtype: torch.dtype):
    case, wide = Case(300, dtype=dtype), torch.promote_types(dtype, torch.float32)
    case.weight_VD.grad_dtype = wide
    case.gradients(lambda: case.fused(SamplingRule(0.8, 0.9), accumulate_into_grad=True))
    assert case.weight_VD.grad is not None and case.weight_VD.grad.dtype == wide and case.weight_VD.grad.any()


def test_a_weight_that_is_no_leaf_has_no_grad_to_accumulate_into():
    case = Case(50)
    head = Head(2.0 * case.weight_VD, accumulate_into_grad=True)
    arguments = (case.tokens_T, case.position_T, SamplingRule(0.8, 0.9), CAP)
    with pytest.raises(AssertionError, match="leaf"):
        fused_token_statistics(case.hidden_TD, head, *arguments).entropy_T.sum().backward()


@pytest.mark.parametrize("learned", ["hidden", "weight", "bias", "down", "up"])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_only_what_requires_a_gradient_gets_one(learned: str, top_p: float):
    case, rule = Case(700, **KINDS["all of it"]), SamplingRule(0.8, top_p)
    whole = case.gradients(lambda: case.fused(rule))
    for name, leaf in case.leaves().items():
        leaf.requires_grad_(name == learned)
    for name, gradient in case.gradients(lambda: case.fused(rule)).items():
        assert (gradient is None) == (name != learned)
    assert_near(case.gradients(lambda: case.fused(rule))[learned], whole[learned], 1e-12)


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_without_gradient_the_statistics_are_the_same_bits_and_carry_no_graph(top_p: float):
    case, rule = Case(3001), SamplingRule(0.8, top_p)
    with_graph = case.fused(rule)
    with torch.no_grad():
        without = case.fused(rule)
    assert with_graph.log_q_T.requires_grad and with_graph.entropy_T.requires_grad
    assert not without.log_q_T.requires_grad and not without.entropy_T.requires_grad
    for name, value in vars(without).items():
        assert torch.equal(value, getattr(with_graph, name))


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_bfloat16_states_give_float32_statistics_and_gradients_in_their_own_dtype(top_p: float):
    case, rule = Case(3001, hidden=64, spread=0.5, dtype=torch.bfloat16), SamplingRule(0.8, top_p)
    statistics = case.fused(rule)
    expected = case.of_logits(rule)
    assert statistics.log_q_T.dtype == statistics.entropy_T.dtype == torch.float32
    torch.testing.assert_close(statistics.entropy_T, expected.entropy_T, atol=1e-2, rtol=1e-2)
    whole = case.gradients(lambda: case.of_logits(rule))
    case.weight_VD.grad_dtype = torch.float32
    table_VD = case.weight_VD.grad = torch.zeros(case.weight_VD.shape)
    fused = case.gradients(lambda: case.fused(rule, accumulate_into_grad=True))
    assert fused["weight"] is None and whole["weight"] is not None
    assert_near(fused["hidden"], whole["hidden"], 2e-2)
    assert_near(table_VD, whole["weight"].float(), 2e-2)


def test_a_second_derivative_is_refused_rather_than_wrong():
    case = Case(50)
    statistics = case.fused(SamplingRule(0.8, 0.9))
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(statistics.entropy_T.sum(), case.hidden_TD, create_graph=True)


class LargestTable(TorchDispatchMode):
    """Records the most elements of a created tensor, except for known shapes."""

    def __init__(self, known: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.known = known
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) not in self.known:
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("spread", [3.0, 0.2])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_no_table_grows_with_tokens_times_vocabulary(spread: float, top_p: float):
    sizes = []
    for tokens in (40, 160):
        case, rule = Case(1000, tokens=tokens, spread=spread), SamplingRule(0.8, top_p)
        with LargestTable({(1000, 12), (12, 1000), (tokens, 12)}) as seen:
            case.gradients(lambda case=case, rule=rule: case.fused(rule))
        sizes.append(seen.elements)
    assert sizes[0] < 40 * 1000 / 2 and sizes[1] < 160 * 1000 / 5
