"""Every rung finds the nucleus of the definition, for any row of logits."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import token_scores
from support.full_tables import sampling_policy, summarize
from support.oracle import nucleus, row_gradient, row_statistics, scaled_row

from ray_probe.core.policy import logits, sampling
from ray_probe.core.policy.features import DEFAULT_FEATURES
from ray_probe.core.policy.logits import SamplingRule, quick_exponentials
from ray_probe.core.policy.nucleus import search
from ray_probe.core.policy.row_summary import RowSummary
from ray_probe.core.policy.sampling import sample_rows
from ray_probe.core.policy.summarize import SummaryScratch, fill
from ray_probe.core.policy.token_statistics import TokenStatistics

NAMES = ("H", "top1", "margin", "head_mass", "two_point_entropy", "logit_var")


def score(logits_TV: torch.Tensor, tokens_T: torch.Tensor, rule: SamplingRule) -> TokenStatistics:
    return token_scores.score(logits_TV, tokens_T, rule, DEFAULT_FEATURES)


def assert_is_the_oracle_s(
    statistics: TokenStatistics, t: int, logits_V: torch.Tensor, token: int, rule: SamplingRule, atol: float
) -> None:
    expected = row_statistics(logits_V, token, rule.temperature, rule.top_p)
    assert bool(statistics.outside_T[t]) == bool(expected["outside"])
    # A logit far below the others is known to its own rounding, however small its share.
    assert statistics.log_q_T[t].item() == pytest.approx(expected["log_q"], abs=atol, rel=1e-6)
    assert statistics.features_TD is not None
    for name in NAMES:
        value = statistics.features_TD[t, DEFAULT_FEATURES.index(name)].item()
        assert value == pytest.approx(expected[name], abs=atol, rel=1e-6), name
    assert statistics.entropy_T[t].item() == pytest.approx(expected["H"], abs=atol)


def gaussian(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def zipf(rows: int, vocabulary: int, power: float) -> torch.Tensor:
    return -power * torch.log1p(torch.argsort(gaussian(rows, vocabulary, 5), dim=-1).float())


KINDS = {
    "peaked": lambda: zipf(6, 5003, 3.0),
    "a hundred kept": lambda: zipf(6, 5003, 1.1) + gaussian(6, 5003),
    "flat": lambda: 0.5 * gaussian(6, 5003),
    "constant": lambda: torch.zeros(3, 5003),
    "two levels": lambda: (gaussian(4, 5003) > 0.5).float(),
    "bfloat16": lambda: (2.0 * gaussian(6, 5003)).bfloat16(),
    "one token": lambda: torch.nn.functional.one_hot(torch.arange(4) * 700, 5003).float() * 40.0,
    "mostly impossible": lambda: gaussian(4, 5003).masked_fill(gaussian(4, 5003, 1) < 1.0, -torch.inf),
    "huge range": lambda: 1e4 * gaussian(4, 5003),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rungs", [(64, 512), (2, 5), (16, 4096)])
def test_every_rung_and_the_histogram_find_the_nucleus_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, kind: str, rungs: tuple[int, int]
):
    monkeypatch.setattr(search, "RUNGS", rungs)
    monkeypatch.setattr(search, "RUNG_SHARE", 1)
    logits_TV, compared = KINDS[kind](), 0
    for temperature, top_p in ((0.05, 0.5), (0.8, 0.95), (1.0, 1e-6), (5.0, 0.3), (1.0, 0.999)):
        summary = summarize(logits_TV.float(), SamplingRule(temperature, top_p))
        for t, row in enumerate(logits_TV):
            scaled_V = scaled_row(row, temperature)
            keep_V, distance = nucleus(scaled_V, top_p)
            if distance > 1e-12:
                assert (scaled_V >= summary.threshold_T[t].double().item()).tolist() == keep_V.tolist()
                assert summary.kept_T[t] == keep_V.sum()
                compared += 1
    assert compared >= 4 * len(logits_TV)


@pytest.mark.parametrize("nudge", [1e-11, -1e-11])
def test_a_row_in_doubt_on_the_last_rung_is_decided_exactly_and_not_lost(nudge: float):
    logits_TV = torch.full((3, 20_000), -10.0)
    logits_TV[:, :300] = -torch.rand(3, 300, generator=torch.Generator().manual_seed(3)).mul(4096).round() / 4096
    for t, row in enumerate(logits_TV):
        levels, counts = np.unique(row.double().numpy(), return_counts=True)
        mass = (counts * np.exp(levels))[::-1]
        above = mass[:200].sum() / mass.sum()
        summary = summarize(logits_TV - logits_TV.amax(dim=-1, keepdim=True), SamplingRule(1.0, above + nudge))
        kept = counts[::-1][: 201 if nudge > 0 else 200].sum()
        assert len(summary.kept_T) == 3 and summary.kept_T[t] == kept


def test_memory_used_again_leaves_no_trace_in_later_rows():
    scratch, rule = SummaryScratch(), SamplingRule(0.8, 0.95)
    for kind in ("flat", "peaked", "a hundred kept", "flat", "constant"):
        logits_TV = KINDS[kind]().float()
        used, fresh = RowSummary.empty(len(logits_TV), logits_TV.dtype, logits_TV.device), summarize(logits_TV, rule)
        fill(used, logits_TV, rule, scratch)
        for name, value in vars(fresh).items():
            assert torch.equal(getattr(used, name), value), (kind, name)


@st.composite
def rows_of_logits(draw: st.DrawFn) -> torch.Tensor:
    """Draw rows with ties, -inf, huge ranges; short, or long enough for every rung."""
    scale = draw(st.sampled_from([0.0, 1e-3, 0.5, 1.0, 30.0, 1e4]))
    levels = st.one_of(st.integers(-8, 8).map(lambda level: level * scale), st.sampled_from([-np.inf, -1e9, -3.4e38]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    pattern_K = torch.tensor(draw(st.lists(levels, min_size=1, max_size=40)), dtype=torch.float64)
    repeats = draw(st.sampled_from([1, 1, 30, 90]))
    row_V = pattern_K.repeat(repeats)
    if repeats > 1:
        spread = draw(st.sampled_from([0.0, 0.01, 1.0]))
        row_V = row_V + spread * gaussian(1, len(row_V), draw(st.integers(0, 9)))[0].double()
    row_V = row_V.to(dtype)
    assume(row_V.max() > -torch.inf)
    return row_V


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    logits_V=rows_of_logits(),
    temperature=st.floats(0.05, 5.0),
    top_p=st.one_of(st.sampled_from([1e-6, 0.5, 0.95, 1.0]), st.floats(1e-6, 1.0)),
    place=st.floats(0.0, 1.0, exclude_max=True),
    uniform=st.floats(0.0, 1.0, exclude_max=True),
)
def test_any_row_has_the_oracle_s_statistics_and_gradient_and_a_token_of_its_nucleus(
    logits_V: torch.Tensor, temperature: float, top_p: float, place: float, uniform: float
):
    exact = logits_V.dtype == torch.float64
    rule, scaled_V = SamplingRule(temperature, top_p), scaled_row(logits_V, temperature)
    keep_V, distance = nucleus(scaled_V, top_p)
    assume(distance > 1e-12)
    sampled_T, *_ = sample_rows(logits_V[None], rule, torch.tensor([uniform], dtype=torch.float64))
    assert keep_V[sampled_T.item()]
    possible = np.flatnonzero(scaled_V > -1e30)
    token = int(possible[int(place * len(possible))])
    logits = logits_V[None].clone().requires_grad_()
    statistics = score(logits, torch.tensor([token]), rule)
    assert_is_the_oracle_s(statistics, 0, logits_V, token, rule, 1e-9 if exact else 1e-5)
    (0.7 * statistics.log_q_T + 1.3 * statistics.entropy_T).sum().backward()
    assert logits.grad is not None
    if logits_V.dtype != torch.bfloat16:
        expected_V = row_gradient(logits_V, token, temperature, top_p, (0.7, 1.3))
        error_V = logits.grad[0].double() - expected_V
        assert (
            error_V.norm() <= (1e-9 if exact else 3e-6) * expected_V.norm() + (1e-10 if exact else 1e-6) / temperature
        )


def test_top_p_of_one_counts_every_token_of_a_flat_row():
    logits_TV = 0.5 * gaussian(2, 151_936)
    statistics = score(logits_TV, torch.tensor([5, 151_935]), SamplingRule(1.0, 1.0))
    assert not statistics.outside_T.any()
    for t, token in enumerate((5, 151_935)):
        assert_is_the_oracle_s(statistics, t, logits_TV[t], token, SamplingRule(1.0, 1.0), 1e-5)


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_low_temperature_makes_no_number_that_arithmetic_is_slow_on(top_p: float):
    logits_TV = torch.linspace(0.0, -6.0, 4000).repeat(2, 1)
    weight_TV = torch.empty_like(logits_TV)
    quick_exponentials(logits_TV, logits_TV[:, :1], 0.05, weight_TV)
    assert (weight_TV > torch.finfo(torch.float32).tiny).all()
    assert (weight_TV < 1e-34).any() and (weight_TV == 1).any()
    rule, tokens_T = SamplingRule(0.05, top_p), torch.tensor([0, 1])
    statistics = score(logits_TV, tokens_T, rule)
    for t in range(2):
        assert_is_the_oracle_s(statistics, t, logits_TV[t], t, rule, 1e-5)


def test_bfloat16_ties_at_the_boundary_are_kept_whole():
    logits_TV, tied = (0.5 * gaussian(8, 32_000)).bfloat16(), 0
    rule = SamplingRule(0.8, 0.95)
    for t, row in enumerate(logits_TV):
        keep_V, _ = nucleus(scaled_row(row, rule.temperature), rule.top_p)
        threshold = row[torch.from_numpy(keep_V)].min()
        level = torch.nonzero(row == threshold).flatten()
        tied += len(level) > 1
        token_2 = level[[0, -1]]
        statistics = score(logits_TV[[t, t]], token_2, rule)
        assert not statistics.outside_T.any()
        for k, token in enumerate(token_2.tolist()):
            assert_is_the_oracle_s(statistics, k, row, token, rule, 1e-5)
    assert tied == len(logits_TV)


@pytest.mark.parametrize("kind", ["peaked", "a hundred kept", "flat"])
def test_a_token_outside_the_nucleus_is_added_to_it_for_its_own_log_q(kind: str):
    logits_TV, rule = KINDS[kind](), SamplingRule(0.8, 0.95)
    tokens_T = logits_TV.argmin(dim=-1)
    statistics = score(logits_TV, tokens_T, rule)
    assert statistics.outside_T.all()
    for t, token in enumerate(tokens_T.tolist()):
        assert_is_the_oracle_s(statistics, t, logits_TV[t], token, rule, 1e-5)


@pytest.mark.parametrize("kind", ["peaked", "a hundred kept", "flat", "bfloat16"])
@pytest.mark.parametrize("top_p", [0.95, 1.0])
@pytest.mark.parametrize(("chunk", "tile"), [(1, 100), (5003, 256), (7000, 1 << 19), (1 << 30, 600)])
def test_sizes_of_chunks_and_tiles_change_no_result_beyond_1e_6(
    monkeypatch: pytest.MonkeyPatch, kind: str, top_p: float, chunk: int, tile: int
):
    logits_TV, rule = KINDS[kind](), SamplingRule(0.8, top_p)

    def everything() -> list[torch.Tensor]:
        logits = logits_TV.clone().requires_grad_()
        statistics = score(logits, torch.arange(6), rule)
        (statistics.log_q_T.sum() + statistics.entropy_T.sum()).backward()
        uniform_T = torch.linspace(0.0, 0.99, 6, dtype=torch.float64)
        return [*vars(statistics).values(), logits.grad, *sample_rows(logits_TV, rule, uniform_T)[:2]]

    before = everything()
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setitem(logits.TILE_ELEMENTS, "cpu", tile)
    for one, other in zip(before, everything(), strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_p", [0.5, 0.95, 1.0])
def test_long_rows_are_sampled_as_the_cumulative_sum_in_the_order_of_the_vocabulary_says(kind: str, top_p: float):
    rule, rows = SamplingRule(0.9, top_p), 200
    logits_TV = KINDS[kind]()
    for row in logits_TV[:2]:
        uniform_T = torch.cat([torch.linspace(0.0, 1.0, rows - 1).double()[:-1], torch.tensor([0.0, 1.0 - 2.0**-53])])
        tokens_T, log_q_T, _ = sample_rows(row.expand(rows, -1), rule, uniform_T)
        policy = sampling_policy(row[None], rule)
        cdf_V = policy.q_TV[0].double().cumsum(0)
        below_T, upto_T = torch.cat([cdf_V.new_zeros(1), cdf_V])[tokens_T], cdf_V[tokens_T]
        point_T = uniform_T * cdf_V[-1]
        assert policy.keep_TV[0, tokens_T].all() and (policy.q_TV[0, tokens_T] > 0).all()
        assert (point_T >= below_T - 1e-6).all() and (point_T <= upto_T + 1e-6).all()
        torch.testing.assert_close(log_q_T, policy.q_TV[0, tokens_T].log(), atol=3e-6, rtol=1e-6)
