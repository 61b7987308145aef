"""The nucleus fits its definition, and the sampler draws from q and nothing else."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import stats
from support.full_tables import Policy, entropy, sample, sampling_policy

from ray_probe.core.policy import sampling
from ray_probe.core.policy.logits import SamplingRule
from ray_probe.core.policy.sampling import sample_rows

LAST_UNIFORM = 1.0 - 2.0**-53


def oracle_nucleus(logits_V: torch.Tensor, temperature: float, top_p: float) -> tuple[np.ndarray, float]:
    """Return the nucleus in long double, and how near to top_p a mass above comes."""
    logits = logits_V.double().numpy()
    possible = np.isfinite(logits)
    if top_p == 1:
        return possible, np.inf
    mass = np.exp((logits.astype(np.longdouble) - logits.max()) / temperature)
    mass /= mass.sum()
    levels, index = np.unique(logits, return_inverse=True)
    above = np.array([mass[logits > level].sum() for level in levels])[index]
    return possible & (above <= top_p), float(np.abs(above - top_p)[logits < logits.max()].min(initial=np.inf))


def assert_same_nucleus(logits_TV: torch.Tensor, rule: SamplingRule, nearest: float) -> int:
    """Compare rows whose boundary is not nearer than `nearest`; return their number."""
    keep_TV, compared = sampling_policy(logits_TV, rule).keep_TV.numpy(), 0
    for row, keep in zip(logits_TV, keep_TV, strict=True):
        expected, distance = oracle_nucleus(row, rule.temperature, rule.top_p)
        if distance > nearest:
            assert (keep == expected).all(), (rule, keep.sum(), expected.sum(), distance)
            compared += 1
    return compared


def random(rows: int, vocabulary: int) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary), dtype=torch.float64)


def peaked(rows: int, vocabulary: int) -> torch.Tensor:
    ranks = torch.argsort(random(rows, vocabulary), dim=-1).double()
    return -4.0 * torch.log1p(ranks)


KINDS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "random": lambda rows, vocabulary: 3.0 * random(rows, vocabulary),
    "peaked": peaked,
    "flat": lambda rows, vocabulary: 1e-3 * random(rows, vocabulary),
    "constant": lambda rows, vocabulary: torch.full((rows, vocabulary), 2.5, dtype=torch.float64),
    "one-hot": lambda rows, vocabulary: 30.0 * torch.nn.functional.one_hot(torch.arange(rows) % vocabulary).double(),
    "tied integers": lambda rows, vocabulary: (2.0 * random(rows, vocabulary)).round(),
    "tied bfloat16": lambda rows, vocabulary: (2.0 * random(rows, vocabulary)).bfloat16(),
}
TOP_P = (1e-6, 0.1, 0.5, 0.8, 0.95, 0.999, 1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocabulary", "rows"), [(1, 1), (2, 4), (17, 8), (300, 8), (3000, 2)])
def test_the_nucleus_is_the_definition(kind: str, vocabulary: int, rows: int):
    logits_TV = KINDS[kind](rows, vocabulary)
    for top_p in TOP_P:
        assert assert_same_nucleus(logits_TV, SamplingRule(1.0, top_p), 1e-12) == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.05, 0.7, 5.0])
def test_the_nucleus_is_the_definition_at_any_temperature(temperature: float, dtype: torch.dtype):
    nearest = 1e-12 if dtype == torch.float64 else 1e-6
    for kind in ("random", "peaked", "flat", "tied integers"):
        logits_TV = KINDS[kind](16, 200).to(dtype)
        for top_p in TOP_P:
            assert assert_same_nucleus(logits_TV, SamplingRule(temperature, top_p), nearest) >= 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("vocabulary", "top_p"), [(17, 0.5), (300, 0.9), (3000, 0.99)])
def test_a_boundary_as_near_as_1e_11_falls_on_the_right_side(vocabulary: int, top_p: float, dtype: torch.dtype):
    logits_V = random(1, vocabulary)[0].mul(2**12).round().div(2**12).to(dtype)
    keep_V, _ = oracle_nucleus(logits_V, 1.0, top_p)
    last = logits_V[torch.from_numpy(keep_V)].min()
    above = float(torch.softmax(logits_V.double(), dim=-1)[logits_V > last].sum())
    for nudged, kept in ((above + 1e-11, True), (above - 1e-11, False)):
        keep_1V = sampling_policy(logits_V[None], SamplingRule(1.0, nudged)).keep_TV
        assert keep_1V[0, logits_V == last].all() == kept
        assert keep_1V.sum() == (logits_V >= last if kept else logits_V > last).sum()


@st.composite
def logits_rows(draw: st.DrawFn) -> torch.Tensor:
    """Draw a row with ties, -inf entries and huge ranges."""
    scale = draw(st.sampled_from([0.0, 1e-3, 0.5, 1.0, 30.0, 1e4]))
    extremes = st.sampled_from([-np.inf, -3.4e38, -1e30, -1e9, 1e30, 3e38])
    levels = st.one_of(st.integers(-8, 8).map(lambda level: level * scale), extremes)
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    row_V = torch.tensor(draw(st.lists(levels, min_size=1, max_size=40)), dtype=dtype)
    assume(row_V.max() > -torch.inf)
    return row_V


def oracle_entropy(logits_V: torch.Tensor, temperature: float, keep_V: np.ndarray) -> float:
    scaled = logits_V.double().numpy()[keep_V].astype(np.longdouble)
    weight = np.exp((scaled - scaled.max()) / temperature)
    q = weight / weight.sum()
    return float(-(q[q > 0] * np.log(q[q > 0])).sum())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    logits_V=logits_rows(),
    temperature=st.floats(0.05, 5.0),
    top_p=st.one_of(st.sampled_from([1e-6, 0.5, 1.0]), st.floats(1e-6, 1.0)),
    uniform=st.one_of(st.sampled_from([0.0, LAST_UNIFORM]), st.floats(0.0, LAST_UNIFORM)),
)
@example(torch.tensor([0.0, -3.4e38, 1.0]), 1.0, 1.0, 0.5)
@example(torch.tensor([3e38, 0.0, 3e38]), 0.05, 0.9, LAST_UNIFORM)
@example(torch.tensor([-torch.inf, 0.0]), 1.0, 1.0, 0.0)
def test_any_row_of_logits_gives_a_distribution_on_its_nucleus_and_a_token_of_it(
    logits_V: torch.Tensor, temperature: float, top_p: float, uniform: float
):
    exact = logits_V.dtype == torch.float64
    rule = SamplingRule(temperature, top_p)
    expected, distance = oracle_nucleus(logits_V, temperature, top_p)
    assume(distance > (1e-12 if exact else 1e-5))
    policy = sampling_policy(logits_V[None], rule)
    q_V, keep_V = policy.q_TV[0], policy.keep_TV[0].numpy()
    absent = expected & ~keep_V
    assert (keep_V <= expected).all()
    assert not absent.any() or (top_p == 1 and (policy.scaled_TV[0].numpy()[absent] == -np.inf).all())
    assert q_V.dtype == (torch.float64 if exact else torch.float32)
    assert torch.isfinite(q_V).all() and not q_V[~policy.keep_TV[0]].any()
    assert q_V.sum().item() == pytest.approx(1.0, abs=1e-12 if exact else 1e-6)
    assert entropy(policy).item() == pytest.approx(
        oracle_entropy(logits_V, temperature, expected), abs=1e-9 if exact else 1e-5
    )
    token_T, log_q_T = sample(policy, torch.tensor([uniform], dtype=torch.float64))
    assert keep_V[token_T.item()] and q_V[token_T.item()] > 0
    assert log_q_T.exp().item() == pytest.approx(q_V[token_T.item()].item(), rel=1e-5)


def test_top_p_of_one_keeps_every_token_where_a_float32_sum_would_drop_some():
    row_V = (0.5 * random(1, 151_936)).float()
    policy = sampling_policy(row_V, SamplingRule(1.0, 1.0))
    assert policy.keep_TV.all()
    assert policy.q_TV.sum().item() == pytest.approx(1.0, abs=1e-5)
    mass_V = np.sort(torch.softmax(row_V[0], dim=-1).numpy())[::-1]
    above_V = np.cumsum(mass_V, dtype=np.float32) - mass_V
    assert (above_V > 1.0).sum() > 0, "the control no longer shows the trap"


def test_the_nucleus_agrees_with_transformers_away_from_ties_and_boundaries():
    from transformers.generation.logits_process import TopPLogitsWarper

    logits_TV = (3.0 * random(50, 800)).float()
    compared = 0
    for temperature, top_p in ((1.0, 0.9), (0.7, 0.95), (1.3, 0.2)):
        keep_TV = sampling_policy(logits_TV, SamplingRule(temperature, top_p)).keep_TV
        warped_TV = TopPLogitsWarper(top_p)(None, logits_TV / temperature)
        for row, keep_V, warped_V in zip(logits_TV, keep_TV, warped_TV, strict=True):
            _, distance = oracle_nucleus(row, temperature, top_p)
            if distance > 1e-6 and len(row.unique()) == len(row):
                assert torch.equal(keep_V, warped_V > -torch.inf)
                compared += 1
    assert compared > 100


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.5, 0.6])
def test_ties_stay_together(top_p: float):
    logits_TV = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0, -2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    policy = sampling_policy(logits_TV, SamplingRule(0.7, top_p))
    assert policy.keep_TV[0].tolist() == [False, True, True, False, True, False, True]
    assert policy.keep_TV[1].all()
    assert torch.equal(policy.q_TV[0][policy.keep_TV[0]], torch.full((4,), 0.25))


@pytest.mark.parametrize("logits", [[0.0, 60.0, 1.0], [-torch.inf, 2.0, -torch.inf], [5.0]])
@pytest.mark.parametrize("top_p", [1e-6, 0.9])
def test_a_nucleus_of_one_token_has_probability_one_and_no_entropy(logits: list[float], top_p: float):
    policy = sampling_policy(torch.tensor([logits]), SamplingRule(1.0, top_p))
    assert policy.keep_TV.sum() == 1 and policy.q_TV.max() == 1.0
    assert policy.log_norm_T.item() == 0.0 and entropy(policy).item() == 0.0
    _, log_q_T = sample(policy, torch.tensor([0.5], dtype=torch.float64))
    assert log_q_T.item() == 0.0


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.9), (0.7, 1.0), (2.0, 1.0)])
@pytest.mark.parametrize("mask", [-1e9, torch.finfo(torch.float32).min])
def test_a_logit_masked_with_a_finite_number_weighs_as_little_as_minus_infinity(
    mask: float, temperature: float, top_p: float
):
    logits_TV = random(4, 30).float()
    logits_TV[:, 20:] = mask
    masked = sampling_policy(logits_TV, SamplingRule(temperature, top_p))
    alone = sampling_policy(logits_TV[:, :20], SamplingRule(temperature, top_p))
    torch.testing.assert_close(masked.q_TV[:, :20], alone.q_TV)
    assert not masked.q_TV[:, 20:].any()
    torch.testing.assert_close(entropy(masked), entropy(alone), atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0])
def test_an_offset_common_to_all_logits_costs_no_digits(temperature: float):
    logits_TV = (0.3 * random(8, 500) + 300).float()
    narrow = sampling_policy(logits_TV, SamplingRule(temperature, 1.0))
    wide = sampling_policy(logits_TV.double(), SamplingRule(temperature, 1.0))
    likely_TV = wide.q_TV > 1e-6
    gap_TV = (narrow.scaled_TV - narrow.log_norm_T[:, None]) - (wide.scaled_TV - wide.log_norm_T[:, None])
    assert gap_TV[likely_TV].abs().max() < 3e-6


def test_a_nucleus_found_once_is_not_searched_for_again_and_is_the_same():
    logits_TV = random(6, 40).bfloat16()
    first = sampling_policy(logits_TV, SamplingRule(0.7, 0.8))
    again = sampling_policy(logits_TV, SamplingRule(0.7, 0.8), first.threshold_T)
    for name, value in vars(first).items():
        assert torch.equal(value, getattr(again, name)), name
    assert torch.equal(first.keep_TV, first.scaled_TV >= first.threshold_T[:, None])


def test_the_policy_carries_no_gradient_and_is_float32_or_wider():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        policy = sampling_policy(torch.zeros(1, 3, dtype=dtype, requires_grad=True), SamplingRule(1.0, 0.9))
        for name in ("scaled_TV", "q_TV", "log_norm_T", "threshold_T"):
            value = getattr(policy, name)
            assert not value.requires_grad
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def repeated(logits_V: torch.Tensor, rule: SamplingRule, rows: int) -> Policy:
    policy = sampling_policy(logits_V[None], rule)
    return Policy(**{name: value.expand(rows, *value.shape[1:]) for name, value in vars(policy).items()})


@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.9, 1.0])
def test_the_ends_of_the_unit_interval_fall_inside_the_nucleus(top_p: float):
    for kind in KINDS:
        logits_TV = KINDS[kind](6, 50).clone()
        logits_TV[:, [0, 1, -1]] = -torch.inf
        policy = sampling_policy(logits_TV, SamplingRule(0.7, top_p))
        for uniform, end, least in ((0.0, 0, 0.0), (LAST_UNIFORM, -1, 1e-12)):
            token_T, _ = sample(policy, torch.full((6,), uniform, dtype=torch.float64))
            for token, q_V in zip(token_T.tolist(), policy.q_TV, strict=True):
                assert token == torch.nonzero(q_V > least).flatten()[end]


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_the_sampler_inverts_the_cumulative_sum_of_q(top_p: float):
    draws, logits_V = 20_000, 2.0 * random(1, 40)[0]
    logits_V[::7] = -torch.inf
    policy = repeated(logits_V, SamplingRule(0.8, top_p), draws)
    token_T, log_q_T = sample(policy, (torch.arange(draws).double() + 0.5) / draws)
    counts_V = torch.bincount(token_T, minlength=40)
    assert (token_T.diff() >= 0).all()
    assert (counts_V - draws * policy.q_TV[0]).abs().max() <= 1.0
    assert not counts_V[~policy.keep_TV[0]].any() and not counts_V[::7].any()
    torch.testing.assert_close(log_q_T, policy.q_TV[0][token_T].log(), atol=1e-12, rtol=0)


def test_samples_pass_a_chi_square_test_against_the_exact_q():
    draws, logits_V = 50_000, 1.5 * random(1, 30)[0].float()
    uniform_T = torch.from_numpy(np.random.default_rng(5).random(draws))
    token_T, _ = sample(repeated(logits_V, SamplingRule(0.9, 0.9), draws), uniform_T)
    keep_V, _ = oracle_nucleus(logits_V, 0.9, 0.9)
    weight_V = np.where(keep_V, np.exp(logits_V.double().numpy() / 0.9), 0.0)
    q_V = weight_V / weight_V.sum()
    counts_V = np.bincount(token_T.numpy(), minlength=30)
    assert 5 < keep_V.sum() < 30 and not counts_V[~keep_V].any()
    assert stats.chisquare(counts_V[keep_V], draws * q_V[keep_V]).pvalue > 1e-3


def test_a_row_is_sampled_alike_alone_and_among_others():
    logits_TV = 2.0 * random(5, 60).float()
    uniform_T = torch.linspace(0.0, 0.99, 5, dtype=torch.float64)
    rule = SamplingRule(0.8, 0.9)
    together_T, log_q_T = sample(sampling_policy(logits_TV, rule), uniform_T)
    for t in range(5):
        token_1, log_q_1 = sample(sampling_policy(logits_TV[t : t + 1], rule), uniform_T[t : t + 1])
        assert token_1.item() == together_T[t].item()
        torch.testing.assert_close(log_q_1[0], log_q_T[t], atol=1e-6, rtol=0)


@pytest.mark.parametrize("elements", [1, 30, 10**9])
def test_sampling_in_row_chunks_changes_no_bit(monkeypatch: pytest.MonkeyPatch, elements: int):
    rule, logits_TV = SamplingRule(0.7, 0.8), torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    uniform_T = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tokens_T, log_q_T = sample(sampling_policy(logits_TV, rule), uniform_T)
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", elements)
    chunked = sample_rows(logits_TV, rule, uniform_T)
    assert torch.equal(chunked[0], tokens_T) and torch.equal(chunked[1], log_q_T)
