"""log q, H and features equal their definitions, forward and backward."""

from typing import Any

import numpy as np
import pytest
import torch
from support.token_scores import CAP, score, some_logits

from ray_probe.core.policy import sampling
from ray_probe.core.policy.features import DEFAULT_FEATURES
from ray_probe.core.policy.logits import SamplingRule
from ray_probe.core.policy.token_statistics import token_statistics

RULES = [(1.0, 1.0), (0.7, 0.8), (1.3, 0.8), (0.7, 1e-6), (3.0, 0.95)]


def nucleus(logits_V: torch.Tensor, rule: SamplingRule) -> tuple[torch.Tensor, float]:
    """Return the nucleus by definition, and how near to top_p a mass above comes."""
    if rule.top_p == 1:
        return logits_V > -torch.inf, np.inf
    logits = logits_V.detach().double().numpy()
    levels, index, counts = np.unique(logits, return_inverse=True, return_counts=True)
    mass = counts * np.exp((levels - levels[-1]) / rule.temperature)
    above = np.append(np.cumsum((mass / mass.sum())[::-1])[::-1][1:], 0.0)
    distance = np.abs(above[:-1] - rule.top_p).min(initial=np.inf)
    return torch.from_numpy((above <= rule.top_p)[index] & np.isfinite(logits)), float(distance)


def by_definition(
    logits_RV: torch.Tensor, tokens_T: torch.Tensor, rule: SamplingRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log q in S + {Y} and H of S with plain autograd, the nucleus fixed."""
    log_q, entropies = [], []
    for row_V, token in zip(logits_RV, tokens_T, strict=True):
        scaled_V = row_V / rule.temperature
        keep_V, _ = nucleus(row_V, rule)
        kept = torch.log_softmax(scaled_V[keep_V], dim=-1)
        entropies.append(-(kept.exp() * kept).sum())
        with_token_V = keep_V | (torch.arange(len(row_V)) == token)
        log_q.append(scaled_V[token] - torch.logsumexp(scaled_V[with_token_V], dim=-1))
    return torch.stack(log_q), torch.stack(entropies)


def gradients(
    logits_RV: torch.Tensor, tokens_T: torch.Tensor, rule: SamplingRule, weights_2T: torch.Tensor, features: Any = ()
) -> torch.Tensor:
    logits = logits_RV.clone().requires_grad_()
    statistics = score(logits, tokens_T, rule, features)
    (weights_2T * torch.stack([statistics.log_q_T, statistics.entropy_T])).sum().backward()
    assert logits.grad is not None
    return logits.grad


def some_weights(tokens: int) -> torch.Tensor:
    return torch.randn(2, tokens, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize(("temperature", "top_p"), RULES)
def test_gradcheck_passes(temperature: float, top_p: float):
    rule, tokens_T = SamplingRule(temperature, top_p), torch.tensor([3, 0, 6, 6])

    def both(logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        statistics = score(logits_TV, tokens_T, rule)
        return statistics.log_q_T, statistics.entropy_T

    torch.autograd.gradcheck(both, some_logits(4, 7, seed=1).requires_grad_(), check_batched_grad=False)


@pytest.mark.parametrize(("temperature", "top_p"), RULES)
def test_values_and_gradients_are_those_of_autograd_on_the_definition(temperature: float, top_p: float):
    rule, logits_TV, tokens_T = SamplingRule(temperature, top_p), some_logits(), torch.arange(8)
    weights_2T = some_weights(8)
    definition = logits_TV.clone().requires_grad_()
    expected = by_definition(definition, tokens_T, rule)
    (weights_2T * torch.stack(expected)).sum().backward()
    statistics = score(logits_TV, tokens_T, rule)
    torch.testing.assert_close(statistics.log_q_T, expected[0].detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(statistics.entropy_T, expected[1].detach(), atol=1e-12, rtol=0)
    outside_T = [not nucleus(row, rule)[0][token] for row, token in zip(logits_TV, tokens_T, strict=True)]
    assert statistics.outside_T.tolist() == outside_T
    assert any(outside_T) == (top_p < 1)
    torch.testing.assert_close(gradients(logits_TV, tokens_T, rule, weights_2T), definition.grad, atol=1e-12, rtol=0)


def test_a_token_outside_the_nucleus_is_counted_and_changes_only_its_own_log_q():
    rule, logits_TV = SamplingRule(0.7, 0.8), some_logits()
    inside_T, outside_T = logits_TV.argmax(dim=-1), logits_TV.argmin(dim=-1)
    inside, outside = (score(logits_TV, tokens, rule, DEFAULT_FEATURES) for tokens in (inside_T, outside_T))
    assert not inside.outside_T.any() and outside.outside_T.all()
    assert torch.isfinite(outside.log_q_T).all() and (outside.log_q_T < inside.log_q_T).all()
    assert torch.equal(inside.entropy_T, outside.entropy_T)
    assert torch.equal(inside.features_TD, outside.features_TD)
    entropy_only = torch.tensor([[0.0], [1.0]]).double().expand(2, 8)
    assert torch.equal(
        gradients(logits_TV, inside_T, rule, entropy_only), gradients(logits_TV, outside_T, rule, entropy_only)
    )


@pytest.mark.parametrize("top_p", [0.8, 1.0])
def test_a_token_that_cannot_occur_is_counted_outside_and_spoils_no_gradient(top_p: float):
    rule, logits_TV, tokens_T = SamplingRule(0.7, top_p), some_logits(), torch.arange(8)
    logits_TV[2, 2] = -torch.inf
    statistics = score(logits_TV, tokens_T, rule)
    assert statistics.outside_T[2] and statistics.log_q_T[2] == -torch.inf
    assert torch.isfinite(gradients(logits_TV, tokens_T, rule, some_weights(8))).all()


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.8), (0.7, 1.0), (2.0, 1.0)])
@pytest.mark.parametrize("mask", [-1e9, torch.finfo(torch.float32).min])
def test_logits_masked_with_a_finite_number_take_no_part(mask: float, temperature: float, top_p: float):
    rule, tokens_T, weights_2T = SamplingRule(temperature, top_p), torch.arange(8), some_weights(8)
    logits_TV = some_logits().float()
    masked_TV = torch.cat([logits_TV, torch.full_like(logits_TV, mask)], dim=-1)
    alone, masked = score(logits_TV, tokens_T, rule), score(masked_TV, tokens_T, rule)
    torch.testing.assert_close(masked.log_q_T, alone.log_q_T)
    torch.testing.assert_close(masked.entropy_T, alone.entropy_T)
    gradient_TV = gradients(masked_TV, tokens_T, rule, weights_2T)
    torch.testing.assert_close(gradient_TV[:, :12], gradients(logits_TV, tokens_T, rule, weights_2T))
    assert not gradient_TV[:, 12:].any()


@pytest.mark.parametrize("elements", [1, 12, 40, 10**9])
def test_the_size_of_a_chunk_changes_nothing(monkeypatch: pytest.MonkeyPatch, elements: int):
    rule, logits_TV, tokens_T, weights_2T = SamplingRule(0.7, 0.8), some_logits(), torch.arange(8), some_weights(8)
    before = score(logits_TV, tokens_T, rule, DEFAULT_FEATURES), gradients(logits_TV, tokens_T, rule, weights_2T)
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", elements)
    after = score(logits_TV, tokens_T, rule, DEFAULT_FEATURES), gradients(logits_TV, tokens_T, rule, weights_2T)
    for name, value in vars(before[0]).items():
        torch.testing.assert_close(getattr(after[0], name), value, atol=1e-13, rtol=0)
    torch.testing.assert_close(after[1], before[1], atol=1e-13, rtol=0)


@pytest.mark.parametrize("rows", [[5, 1, 3], [7, 6, 5, 4, 3, 2, 1, 0], [2, 2, 5, 2]])
def test_rows_may_be_left_out_reordered_or_scored_more_than_once(monkeypatch: pytest.MonkeyPatch, rows: list[int]):
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", 2 * 12)
    rule, rows_T = SamplingRule(0.7, 0.8), torch.tensor(rows)
    tokens_T, weights_2T = torch.arange(len(rows)), some_weights(len(rows))
    logits, definition = (some_logits().requires_grad_() for _ in range(2))
    statistics = token_statistics(logits, rows_T, tokens_T, tokens_T, rule, CAP)
    expected = by_definition(definition[rows_T], tokens_T, rule)
    for values, loss in ((expected, definition), ((statistics.log_q_T, statistics.entropy_T), logits)):
        (weights_2T * torch.stack(values)).sum().backward()
        assert loss.grad is not None
    torch.testing.assert_close(statistics.log_q_T, expected[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(statistics.entropy_T, expected[1], atol=1e-12, rtol=0)
    torch.testing.assert_close(logits.grad, definition.grad, atol=1e-12, rtol=0)


def language_model_like(kind: str, rows: int = 6, vocabulary: int = 32_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(17)
    noise = torch.randn(rows, vocabulary, generator=generator)
    rank = torch.argsort(torch.rand(rows, vocabulary, generator=generator), dim=-1)
    zipf = -torch.log1p(rank.float())
    return {"peaked": 3.0 * zipf + 0.5 * noise, "mid": zipf + 3.0 * noise + 20.0, "flat": 0.5 * noise}[kind]


@pytest.mark.parametrize("kind", ["peaked", "mid", "flat"])
@pytest.mark.parametrize("top_p", [0.95, 1.0])
def test_float32_statistics_are_within_1e_5_of_float64_on_rows_like_a_language_model_s(kind: str, top_p: float):
    rule, logits_TV = SamplingRule(0.8, top_p), language_model_like(kind)
    decisive = [t for t, row in enumerate(logits_TV) if nucleus(row, rule)[1] > 1e-6]
    assert len(decisive) >= 3
    logits_TV = logits_TV[decisive]
    tokens_T = logits_TV.topk(3, dim=-1).indices[:, 2]
    weights_2T = some_weights(len(decisive))
    definition = logits_TV.double().requires_grad_()
    expected = by_definition(definition, tokens_T, rule)
    (weights_2T * torch.stack(expected)).sum().backward()
    narrow, wide = (score(logits, tokens_T, rule, DEFAULT_FEATURES) for logits in (logits_TV, logits_TV.double()))
    assert narrow.log_q_T.dtype == narrow.entropy_T.dtype == torch.float32
    for name, value in (("log_q_T", expected[0]), ("entropy_T", expected[1]), ("features_TD", wide.features_TD)):
        torch.testing.assert_close(getattr(narrow, name).double(), value.detach(), atol=1e-5, rtol=0)
    assert definition.grad is not None
    error_TV = gradients(logits_TV, tokens_T, rule, weights_2T).double() - definition.grad
    assert error_TV.norm() < 1e-5 * definition.grad.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_float32_statistics_and_gradients_in_their_own_dtype(dtype: torch.dtype):
    rule, logits_TV, tokens_T = SamplingRule(0.7, 0.8), some_logits().to(dtype), torch.arange(8)
    half, wide = (score(logits, tokens_T, rule, DEFAULT_FEATURES) for logits in (logits_TV, logits_TV.double()))
    for name in ("log_q_T", "entropy_T", "features_TD"):
        assert getattr(half, name).dtype == torch.float32
        torch.testing.assert_close(getattr(half, name).double(), getattr(wide, name), atol=1e-5, rtol=1e-6)
    assert torch.equal(half.outside_T, wide.outside_T)
    weights_2T = some_weights(8)
    gradient_TV = gradients(logits_TV, tokens_T, rule, weights_2T)
    assert gradient_TV.dtype == dtype
    torch.testing.assert_close(
        gradient_TV.double(), gradients(logits_TV.double(), tokens_T, rule, weights_2T), atol=1e-2, rtol=1e-2
    )


def test_asking_for_features_changes_no_bit_of_values_or_gradients():
    rule, logits_TV, tokens_T, weights_2T = SamplingRule(0.7, 0.8), some_logits(), torch.arange(8), some_weights(8)
    without, asked = score(logits_TV, tokens_T, rule), score(logits_TV, tokens_T, rule, DEFAULT_FEATURES)
    assert without.features_TD is None and asked.features_TD is not None
    for name in ("log_q_T", "entropy_T", "outside_T"):
        assert torch.equal(getattr(without, name), getattr(asked, name))
    gradient_TV = gradients(logits_TV, tokens_T, rule, weights_2T)
    assert torch.equal(gradients(logits_TV, tokens_T, rule, weights_2T, DEFAULT_FEATURES), gradient_TV)


def test_features_and_the_outside_mark_carry_no_gradient_and_the_rest_only_where_the_logits_do():
    rule, tokens_T = SamplingRule(0.7, 0.8), torch.arange(8)
    with_graph = score(some_logits().requires_grad_(), tokens_T, rule, DEFAULT_FEATURES)
    assert with_graph.log_q_T.requires_grad and with_graph.entropy_T.requires_grad
    assert with_graph.features_TD is not None
    assert not with_graph.features_TD.requires_grad and not with_graph.outside_T.requires_grad
    without = score(some_logits(), tokens_T, rule)
    assert not without.log_q_T.requires_grad and not without.entropy_T.requires_grad


@pytest.mark.parametrize(("used", "unused"), [("log_q_T", 1), ("entropy_T", 0)])
def test_backward_works_from_one_output_alone(used: str, unused: int):
    rule, tokens_T = SamplingRule(0.7, 0.8), torch.arange(8)
    logits = some_logits().requires_grad_()
    getattr(score(logits, tokens_T, rule), used).sum().backward()
    weights_2T = torch.ones(2, 8, dtype=torch.float64)
    weights_2T[unused] = 0.0
    assert torch.equal(logits.grad, gradients(some_logits(), tokens_T, rule, weights_2T))


@pytest.mark.parametrize(("logits", "top_p"), [([3.0], 1.0), ([3.0], 0.5), ([0.0, 90.0, 1.0], 0.9)])
def test_a_nucleus_of_one_token_has_no_gradient(logits: list[float], top_p: float):
    logits_TV, rule = torch.tensor([logits]), SamplingRule(0.05, top_p)
    tokens_T = logits_TV.argmax(dim=-1)
    statistics = score(logits_TV, tokens_T, rule)
    assert statistics.log_q_T.item() == statistics.entropy_T.item() == 0.0
    assert not gradients(logits_TV, tokens_T, rule, torch.ones(2, 1)).any()


def test_a_second_derivative_is_refused_rather_than_wrong():
    logits = some_logits().requires_grad_()
    statistics = score(logits, torch.arange(8), SamplingRule(0.7, 0.8))
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(statistics.entropy_T.sum(), logits, create_graph=True)
