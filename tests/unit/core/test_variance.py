"""Reported standard errors are right; the gradient's noise and the closed form are the direct sums.

The policy is a table: types of prompts, each with every response it can give, as probability, total entropy and
length. So what the errors describe can be sampled by the ten thousand, and the estimates' means are known exactly.
"""

import numpy as np
import pytest

from ray_probe.core.estimator.records import Record, Shape, record_of_tokens, with_prompts
from ray_probe.core.estimator.ridge import fit
from ray_probe.core.estimator.variance import clustered_ratio, gradient_noise, in_sample_mean_squares
from ray_probe.run.estimates import entropy_estimate
from ray_probe.run.totals import Totals, merged

# probability, total entropy (nats), length (tokens) of each response
POLICY = np.array([
    [[0.5, 0.4, 1], [0.2, 1.9, 3], [0.2, 3.0, 5], [0.1, 4.1, 8]],
    [[0.1, 0.7, 1], [0.3, 3.5, 4], [0.3, 5.2, 6], [0.3, 6.0, 8]],
    [[0.7, 0.1, 1], [0.1, 0.3, 2], [0.1, 1.0, 6], [0.1, 2.2, 8]],
    [[0.2, 2.0, 2], [0.3, 2.9, 3], [0.3, 4.4, 6], [0.2, 5.0, 8]],
    [[0.4, 1.2, 4], [0.3, 1.3, 5], [0.2, 1.7, 6], [0.1, 2.5, 8]],
])  # fmt: skip
PROMPTS, RESPONSES = 128, 4
REPLICATES, CHUNK = 20_000, 1000
TOLERANCE = 0.05

Draw = tuple[np.ndarray, np.ndarray]


def exact() -> tuple[float, float]:
    """Entropy per sequence and per token, nats, by enumeration."""
    probability, entropy, length = np.moveaxis(POLICY, 2, 0)
    per_sequence = (probability * entropy).sum(axis=1).mean()
    return per_sequence, per_sequence / (probability * length).sum(axis=1).mean()


def drawn(numbers: np.random.Generator, replicates: int, visits: int = 1) -> Draw:
    """Total entropy and length [replicate, visit, prompt, response]; a prompt keeps its type over its visits."""
    types = numbers.integers(0, len(POLICY), (replicates, 1, PROMPTS, 1))
    uniforms = numbers.random((replicates, visits, PROMPTS, RESPONSES))
    ends = np.cumsum(POLICY[:, :, 0], axis=1)[types]
    chosen = (uniforms[..., None] >= ends[..., :-1]).sum(axis=-1)
    return POLICY[types, chosen, 1], POLICY[types, chosen, 2]


def clusters(draw: Draw, by: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entropy, responses and tokens of each cluster [replicate, cluster]."""
    kept = {"response": 4, "visit": 3, "prompt": 2}[by]
    columns = [draw[0], np.ones(draw[0].shape), draw[1]]
    if by == "prompt":
        columns = [np.swapaxes(column, 1, 2) for column in columns]
    sums = [column.reshape(*column.shape[:kept], -1).sum(axis=-1) for column in columns]
    return tuple(column.reshape(len(column), -1) for column in sums)  # type: ignore[return-value]


def estimates(draw: Draw, by: str) -> np.ndarray:
    """Per sequence and per token: estimate and reported standard error [replicate, entropy, 2]."""
    entropy, responses, tokens = clusters(draw, by)
    return np.stack(
        [np.stack(clustered_ratio(entropy, size), axis=-1) for size in (responses, tokens)],
        axis=1,
    )


def replicated(by: str, visits: int = 1, replicates: int = REPLICATES) -> np.ndarray:
    numbers = np.random.default_rng(20260101)
    chunks = [estimates(drawn(numbers, CHUNK, visits), by) for _ in range(replicates // CHUNK)]
    return np.concatenate(chunks)


def reported_over_true(results: np.ndarray) -> np.ndarray:
    """Mean squared reported error over the empirical variance of the estimates, for each entropy."""
    ratio: np.ndarray = (results[..., 1] ** 2).mean(axis=0) / results[..., 0].var(axis=0, ddof=1)
    return ratio


def test_reported_standard_errors_are_right():
    results = replicated("prompt")
    assert len(results) >= 20_000
    assert reported_over_true(results) == pytest.approx(1.0, abs=TOLERANCE)
    assert results[..., 0].mean(axis=0) == pytest.approx(exact(), rel=2e-3)


def test_control_errors_of_independent_responses_are_wrong():
    assert (np.abs(reported_over_true(replicated("response")) - 1.0) > 3 * TOLERANCE).all()


def test_a_prompt_that_comes_back_in_several_rounds_is_one_cluster():
    assert reported_over_true(replicated("prompt", visits=3)) == pytest.approx(1.0, abs=TOLERANCE)


def test_control_a_prompt_in_every_round_taken_for_a_new_one_is_wrong():
    assert (np.abs(reported_over_true(replicated("visit", visits=3)) - 1.0) > 3 * TOLERANCE).all()


def rounds_of(draw: Draw) -> list[np.ndarray]:
    """Prompt rows (responses, entropy, tokens) [P, 3] of each visit of the first replicate."""
    entropy, length = draw[0][0], draw[1][0]
    return [
        np.stack([np.full(PROMPTS, RESPONSES), h.sum(axis=1), t.sum(axis=1)], axis=1)
        for h, t in zip(entropy, length, strict=True)
    ]


def test_the_results_entropies_are_these_numbers():
    draw = drawn(np.random.default_rng(1), 1, visits=3)
    orders = (range(PROMPTS), range(PROMPTS - 1, -1, -1), range(PROMPTS))
    parts = [
        Totals(bins_3B=np.zeros((3, 1)), prompts={i: rows[i] for i in order})
        for order, rows in zip(orders, rounds_of(draw), strict=True)
    ]
    reported = entropy_estimate(merged(parts))
    [[(sequence, sequence_se), (token, token_se)]] = estimates(draw, "prompt")
    expected = {
        "per_sequence": sequence,
        "per_sequence_se": sequence_se,
        "per_token": token,
        "per_token_se": token_se,
    }
    assert {name: getattr(reported, name) for name in expected} == pytest.approx(expected, rel=1e-12)
    assert reported.clusters == PROMPTS
    assert len(merged(parts).prompts) == PROMPTS


def test_records_give_the_same_clusters():
    draw = drawn(np.random.default_rng(2), 1, visits=3)
    record = Record.zero(Shape(1, 1, 1))
    for rows in rounds_of(draw):
        record = record + with_prompts(Record.zero(Shape(1, 1, 1)), np.arange(PROMPTS), rows)
    responses, entropy, tokens = record.prompt_rows_P3.T
    from_records = [clustered_ratio(entropy, size) for size in (responses, tokens)]
    np.testing.assert_allclose(from_records, estimates(draw, "prompt")[0], rtol=1e-12)


def test_one_cluster_has_a_ratio_and_no_error():
    ratio, error = clustered_ratio(np.array([3.0]), np.array([4.0]))
    assert ratio == 0.75 and np.isnan(error)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 5, 2, 8), (3, 1)])
def test_gradient_noise_is_the_direct_formulas(sizes: tuple[int, ...]):
    gradients = np.random.default_rng(0).normal(1.0, 2.0, size=(len(sizes), 30))
    noise = gradient_noise(float((gradients.sum(axis=0) ** 2).sum()), (gradients**2).sum(axis=1), np.array(sizes))
    n = sum(sizes)
    pairs = [(s, t) for s in range(len(sizes)) for t in range(len(sizes)) if s != t]
    cross = sum(gradients[s] @ gradients[t] for s, t in pairs) / sum(sizes[s] * sizes[t] for s, t in pairs)
    mean = gradients.sum(axis=0) / n
    assert noise.norm_raw == pytest.approx(np.linalg.norm(mean))
    assert noise.norm_sq_debiased == pytest.approx(cross)
    assert noise.norm_debiased == (pytest.approx(np.sqrt(cross)) if cross > 0 else None)
    assert noise.trace_cov == pytest.approx(n * (mean @ mean - cross))
    assert noise.snr == pytest.approx(cross / (mean @ mean - cross))


def test_equal_shards_give_the_sample_covariance():
    gradients = np.random.default_rng(1).normal(0.3, 1.0, size=(6, 20))
    noise = gradient_noise(float((gradients.sum(axis=0) ** 2).sum()), (gradients**2).sum(axis=1), np.full(6, 4.0))
    covariance_of_mean = np.cov(gradients.T / 4.0) / 6
    assert noise.trace_cov == pytest.approx(24 * np.trace(covariance_of_mean))


def test_one_shard_leaves_the_noise_open():
    noise = gradient_noise(36.0, np.array([36.0]), np.array([3.0]))
    assert vars(noise) == {
        "norm_raw": 2.0, "norm_debiased": None, "norm_sq_debiased": None, "trace_cov": None, "snr": None,
    }  # fmt: skip


def test_a_squared_norm_below_zero_has_no_root():
    apart = gradient_noise(0.0, np.array([4.0, 4.0]), np.array([1.0, 1.0]))
    assert (apart.norm_raw, apart.norm_debiased, apart.norm_sq_debiased, apart.snr) == (0.0, None, -4.0, -1.0)


def test_no_noise_means_no_ratio_to_it():
    same = gradient_noise(16.0, np.array([4.0, 4.0]), np.array([1.0, 1.0]))
    assert (same.norm_debiased, same.norm_sq_debiased, same.trace_cov, same.snr) == (2.0, 4.0, 0.0, None)


def test_the_in_sample_mean_squares_are_the_direct_ones():
    numbers = np.random.default_rng(3)
    phi_TD, r_T, position_T = numbers.normal(size=(50, 4)), numbers.normal(3.0, size=50), np.arange(50) % 8
    record = record_of_tokens(phi_TD, r_T[:, None], position_T, 8)
    means_B = numbers.normal(3.0, size=8)
    ridge = fit(record, 0.1)
    assert ridge is not None
    found = in_sample_mean_squares(record, means_B, ridge.beta_EK)
    mu_hats = {
        "none": 0.0, "constant": r_T.mean(), "residual_mu": means_B[position_T],
        "regression": phi_TD @ ridge.beta_EK[:, 0],
    }  # fmt: skip
    assert found == pytest.approx({mode: ((r_T - mu_hat) ** 2).mean() for mode, mu_hat in mu_hats.items()}, rel=1e-12)
    without_beta = in_sample_mean_squares(record, means_B, None)
    assert without_beta == found | {"regression": found["residual_mu"]}, "what stands in for beta"
    assert set(in_sample_mean_squares(Record.zero(record.shape), means_B, None).values()) == {None}
