"""Targets and advantages are the spec's formulas, and the loss climbs the entropy of whole responses."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_probe.core.estimator.loss import response_loss
from ray_probe.core.estimator.targets import Estimator, advantages, baseline_target, future_sum

ESTIMATORS: tuple[Estimator, ...] = ("rb_residual", "naive")


def some_response(tokens: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entropies, surprisals and mu_hat."""
    numbers = np.random.default_rng(tokens)
    return numbers.uniform(0, 3, tokens), numbers.exponential(size=tokens), numbers.normal(size=tokens)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_future_sum_adds_what_comes_strictly_later(values: list[float]):
    expected = [sum(values[j + 1 :]) for j in range(len(values))]
    np.testing.assert_allclose(future_sum(np.array(values)), expected, rtol=1e-12, atol=1e-7)


def test_future_sum_adds_float32_values_in_float64():
    values = np.full(100_000, 0.1, np.float32)
    future = future_sum(values)
    assert future.dtype == np.float64
    assert future[0] == pytest.approx(99_999 * float(np.float32(0.1)), rel=1e-12)


def test_the_target_is_the_future_entropy_or_for_naive_the_future_surprisal():
    entropy_T, surprisal_T, _ = some_response()
    np.testing.assert_allclose(
        baseline_target(entropy_T, surprisal_T, "rb_residual"), [entropy_T[j + 1 :].sum() for j in range(6)]
    )
    np.testing.assert_allclose(
        baseline_target(entropy_T, surprisal_T, "naive"), [surprisal_T[j + 1 :].sum() for j in range(6)]
    )


@pytest.mark.parametrize("tokens", [1, 2, 6])
def test_advantages_are_the_return_to_go_less_the_entropy_and_mu_hat(tokens: int):
    entropy_T, surprisal_T, mu_hat_T = some_response(tokens)
    for estimator, rewards_T in (("rb_residual", entropy_T), ("naive", surprisal_T)):
        expected = [rewards_T[j:].sum() - (entropy_T[j] + mu_hat_T[j]) for j in range(tokens)]
        np.testing.assert_allclose(
            advantages(entropy_T, surprisal_T, mu_hat_T, estimator), expected, atol=1e-12, rtol=1e-12
        )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_inputs_are_left_as_they_were(estimator: Estimator):
    before, after = some_response(), some_response()
    advantages(*after, estimator)[:] = 0.0
    baseline_target(after[0], after[1], estimator)[:] = 0.0
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_loss_is_the_score_plus_the_pathwise_term_in_float64():
    entropy_T, surprisal_T, advantage_T = some_response()
    log_q_T, entropies = torch.tensor(-surprisal_T).float(), torch.tensor(entropy_T).float()
    loss = response_loss(log_q_T, entropies, advantage_T)
    score = float(advantage_T @ log_q_T.double().numpy())
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert loss.item() == pytest.approx(score + float(entropies.double().sum()), rel=1e-12)
    assert response_loss(log_q_T, None, advantage_T).item() == pytest.approx(score, rel=1e-12)


def test_gradient_flows_through_the_score_and_the_pathwise_term_only():
    entropy_T, surprisal_T, mu_hat_T = some_response()
    advantage_T = advantages(entropy_T, surprisal_T, mu_hat_T, "rb_residual")
    log_q_T = torch.tensor(-surprisal_T, requires_grad=True)
    entropies = torch.tensor(entropy_T, requires_grad=True)
    response_loss(log_q_T, entropies, advantage_T).backward()
    np.testing.assert_array_equal(log_q_T.grad, advantage_T)
    np.testing.assert_array_equal(entropies.grad, np.ones(6))


def test_advantages_that_could_carry_a_gradient_are_refused():
    log_q_T, _, advantage_T = (torch.tensor(values) for values in some_response())
    with pytest.raises(TypeError):
        response_loss(log_q_T, None, advantage_T.requires_grad_())  # type: ignore[arg-type]


SLOPES = torch.tensor([[0.3, -1.0, 0.4], [1.5, 0.2, -0.7], [-0.4, 0.9, 2.0], [0.1, 0.1, -2.5]], dtype=torch.float64)


def steps(theta: torch.Tensor, response: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log q of the tokens and entropies: the first token's logits, then those of the state that it leads to."""
    log_q_2V = torch.log_softmax(theta * SLOPES[[0, 1 + response[0]]], dim=-1)
    return log_q_2V[torch.arange(2), torch.tensor(response)], -(log_q_2V.exp() * log_q_2V).sum(dim=-1)


def response_entropy(theta: float) -> float:
    """J: the expected sum of entropies over the nine responses of two tokens."""
    parameter = torch.tensor(theta, dtype=torch.float64)
    pairs = (steps(parameter, response) for response in itertools.product(range(3), repeat=2))
    return sum(float(log_q.sum().exp() * entropies.sum()) for log_q, entropies in pairs)


@pytest.mark.parametrize("theta", [-0.8, 0.6, 1.7])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_expected_gradient_is_the_finite_difference_of_entropy_and_points_uphill(
    estimator: Estimator, theta: float
):
    parameter = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    for response in itertools.product(range(3), repeat=2):
        log_q_T, entropy_T = steps(parameter, response)
        surprisal, entropies = -log_q_T.detach().numpy(), entropy_T.detach().numpy()
        advantage_T = advantages(entropies, surprisal, np.array([0.3, -0.2]), estimator)
        pathwise = entropy_T if estimator == "rb_residual" else None
        (log_q_T.detach().sum().exp() * response_loss(log_q_T, pathwise, advantage_T)).backward()
    assert parameter.grad is not None
    slope = parameter.grad.item()
    difference = (response_entropy(theta + 1e-5) - response_entropy(theta - 1e-5)) / 2e-5
    assert slope == pytest.approx(difference, rel=1e-6)
    assert response_entropy(theta + 1e-2 * slope) > response_entropy(theta)
