"""Each feature fits its definition and does not depend on the sampled token."""

import dataclasses

import numpy as np
import pytest
import torch
from support.full_tables import entropy, sampling_policy

from ray_probe.core.columns import LOGIT_COLUMNS
from ray_probe.core.policy.features import DEFAULT_FEATURES, REGISTRY, PrefixView, compute_features
from ray_probe.core.policy.logits import SamplingRule
from ray_probe.core.policy.token_statistics import token_statistics
from ray_probe.errors import ConfigError

CAP = 64
RULES = [(temperature, top_p) for temperature in (0.2, 1.0, 3.0) for top_p in (1e-6, 0.5, 0.9, 1.0)]


def some_logits(rows: int = 12, vocabulary: int = 50) -> torch.Tensor:
    """Return rows from flat to peaked, with ties and with an impossible token."""
    spread = torch.logspace(-2, 1.2, rows, dtype=torch.float64)[:, None]
    logits_TV = spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits_TV[1] = logits_TV[1].mul(100).round()
    logits_TV[2, 7] = -torch.inf
    return logits_TV


def view_of(logits_TV: torch.Tensor, rule: SamplingRule) -> PrefixView:
    policy = sampling_policy(logits_TV, rule)
    return PrefixView(policy, entropy(policy), torch.arange(len(logits_TV)), CAP)


def by_definition(logits_V: np.ndarray, position: int, rule: SamplingRule) -> dict[str, float]:
    """Return the features of one prefix by definition, in float64."""
    a = logits_V / rule.temperature
    p = np.exp(a - a.max())
    p /= p.sum()
    above = np.array([p[logits_V > logit].sum() for logit in logits_V])
    kept = np.isfinite(a) & ((above <= rule.top_p) if rule.top_p < 1 else True)
    q = p[kept] / p[kept].sum()
    two_points = np.array([p[kept].sum(), p[~kept].sum()])
    largest = np.sort(a[kept])[::-1]
    log_normaliser = a.max() + np.log(np.exp(a[kept] - a.max()).sum())
    return {
        "H": log_normaliser - q @ a[kept],
        "top1": q.max(),
        "margin": largest[0] - largest[1] if len(largest) > 1 else 0.0,
        "head_mass": two_points[0] if rule.top_p < 1 else 1.0,
        "two_point_entropy": -sum(mass * np.log(mass) for mass in two_points if mass > 0) if rule.top_p < 1 else 0.0,
        "logit_var": q @ a[kept] ** 2 - (q @ a[kept]) ** 2,
        "pos_frac": position / CAP,
    }


@pytest.mark.parametrize(("temperature", "top_p"), RULES)
@pytest.mark.parametrize("name", DEFAULT_FEATURES)
def test_a_feature_is_its_definition(name: str, temperature: float, top_p: float):
    rule, logits_TV = SamplingRule(temperature, top_p), some_logits()
    value_T = compute_features([name], view_of(logits_TV, rule))[:, 0]
    expected_T = [by_definition(row.numpy(), j, rule)[name] for j, row in enumerate(logits_TV)]
    np.testing.assert_allclose(value_T.numpy(), expected_T, atol=1e-9, rtol=1e-9)


def test_the_functions_and_the_registry_of_columns_name_the_same_features_in_the_same_order():
    assert tuple(REGISTRY) == DEFAULT_FEATURES == LOGIT_COLUMNS


def test_features_are_selected_and_ordered_by_name():
    view = view_of(some_logits(), SamplingRule(1.0, 0.9))
    all_TD = compute_features(DEFAULT_FEATURES, view)
    chosen = ["pos_frac", "H", "logit_var", "H"]
    columns = [DEFAULT_FEATURES.index(name) for name in chosen]
    assert torch.equal(compute_features(chosen, view), all_TD[:, columns])


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ConfigError, match="'entropy'") as caught:
        compute_features(["H", "entropy"], view_of(some_logits(), SamplingRule(1.0, 0.9)))
    assert ", ".join(DEFAULT_FEATURES) in str(caught.value)


def test_features_are_detached_even_from_a_view_with_a_graph():
    view = view_of(some_logits(), SamplingRule(1.0, 0.9))
    with_graph = dataclasses.replace(view, entropy_T=view.entropy_T.clone().requires_grad_())
    assert not compute_features(DEFAULT_FEATURES, with_graph).requires_grad


def test_head_mass_is_exactly_one_and_its_entropy_exactly_zero_when_top_p_is_one():
    logits_TV = 5 * torch.randn(4, 30_000, generator=torch.Generator().manual_seed(1))
    values_TD = compute_features(["head_mass", "two_point_entropy"], view_of(logits_TV, SamplingRule(0.7, 1.0)))
    assert torch.equal(values_TD, torch.tensor([1.0, 0.0]).expand(4, 2))


@pytest.mark.parametrize("logits", [[0.0, 200.0, 1.0], [-torch.inf, 2.0, -torch.inf], [4.0]])
def test_a_nucleus_of_one_token_has_finite_features_and_margin_zero(logits: list[float]):
    view = view_of(torch.tensor([logits]), SamplingRule(0.05, 0.9))
    values = dict(zip(DEFAULT_FEATURES, compute_features(DEFAULT_FEATURES, view)[0].tolist(), strict=True))
    assert values == {
        "H": 0, "top1": 1, "margin": 0, "head_mass": 1, "two_point_entropy": 0, "logit_var": 0, "pos_frac": 0
    }  # fmt: skip


@pytest.mark.parametrize("mask", [-1e9, torch.finfo(torch.float32).min])
def test_logits_masked_with_a_finite_number_leave_the_features_alone(mask: float):
    logits_TV = some_logits().float()[3:, :]
    masked_TV = torch.cat([logits_TV, torch.full_like(logits_TV, mask)], dim=-1)
    for temperature, top_p in ((0.7, 0.9), (0.7, 1.0), (2.0, 1.0)):
        rule = SamplingRule(temperature, top_p)
        alone_TD = compute_features(DEFAULT_FEATURES, view_of(logits_TV, rule))
        torch.testing.assert_close(compute_features(DEFAULT_FEATURES, view_of(masked_TV, rule)), alone_TD)


def test_pos_frac_divides_by_the_cap_whatever_the_number_of_tokens():
    for rows in (1, 3, 12):
        view = view_of(some_logits()[:rows], SamplingRule(1.0, 0.9))
        assert compute_features(["pos_frac"], view)[:, 0].tolist() == [j / CAP for j in range(rows)]


def features_of(logits_TV: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
    rows_T = torch.arange(len(logits_TV))
    statistics = token_statistics(logits_TV, rows_T, tokens_T, rows_T, SamplingRule(0.8, 0.9), CAP, DEFAULT_FEATURES)
    assert statistics.features_TD is not None
    return statistics.features_TD


def test_features_do_not_depend_on_the_sampled_tokens():
    logits_TV = some_logits()
    first_TD = features_of(logits_TV, torch.zeros(12, dtype=torch.int64))
    for token in (1, 7, 49):
        assert torch.equal(features_of(logits_TV, torch.full((12,), token)), first_TD)


def test_features_do_not_depend_on_what_follows():
    logits_TV, tokens_T = some_logits(), torch.arange(12)
    whole_TD = features_of(logits_TV, tokens_T)
    for length in (1, 5, 11):
        other_TV = logits_TV.clone()
        other_TV[length:] = -3 * other_TV[length:].roll(1, dims=-1).nan_to_num(neginf=0.0)
        assert torch.equal(features_of(other_TV, tokens_T)[:length], whole_TD[:length])
        torch.testing.assert_close(
            features_of(logits_TV[:length], tokens_T[:length]), whole_TD[:length], atol=1e-12, rtol=0
        )


def test_a_feature_function_is_shown_neither_tokens_nor_a_realised_length():
    assert {field.name for field in dataclasses.fields(PrefixView)} == {"policy", "entropy_T", "position_T", "cap"}
