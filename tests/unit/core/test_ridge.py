"""The ridge is the ridge: the dense solution, R2 and condition number, from sums alone; never a NaN."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from ray_probe.core.estimator.records import Record, Shape, position_bins, record_of_tokens, total
from ray_probe.core.estimator.ridge import ILL_CONDITIONED, fit, residual_sum_squares, solve
from ray_probe.report.caveats import CONDITION_LIMIT

CAP = 40
LAMBDAS = (1e-6, 1e-3, 1.0, 100.0)


def rows(seed: int, features: int, tokens: int = 200, targets: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features of different scales, and targets with a mean, a slope and noise."""
    numbers = np.random.default_rng(seed)
    phi_TD = numbers.normal(size=(tokens, features)) * numbers.uniform(0.3, 3.0, features) + numbers.normal()
    slope_DK = numbers.normal(size=(features, targets))
    return phi_TD, 5.0 + phi_TD @ slope_DK + numbers.normal(size=(tokens, targets))


def record_of(phi_TD: np.ndarray, target_TK: np.ndarray) -> Record:
    return record_of_tokens(phi_TD, target_TK, np.arange(len(phi_TD)) % CAP, CAP)


def dense(phi_TD: np.ndarray, target_TK: np.ndarray, ridge_lambda: float) -> np.ndarray:
    """The same problem as a least-squares one on stacked rows: no normal equations."""
    d = phi_TD.shape[1]
    stacked = np.vstack([phi_TD, np.sqrt(ridge_lambda) * np.eye(d)])
    return np.linalg.lstsq(stacked, np.vstack([target_TK, np.zeros((d, target_TK.shape[1]))]), rcond=None)[0]


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ridge_lambda", LAMBDAS)
@pytest.mark.parametrize("features", [1, 2, 7, 16])
def test_beta_is_the_dense_solution_on_the_concatenated_rows(seed: int, ridge_lambda: float, features: int):
    phi_TD, target_TK = rows(seed, features)
    result = fit(record_of(phi_TD, target_TK), ridge_lambda)
    assert apart(result.beta_EK, dense(phi_TD, target_TK, ridge_lambda)) < 1e-9
    sklearn = Ridge(alpha=ridge_lambda, fit_intercept=False).fit(phi_TD, target_TK[:, 0])
    assert apart(result.beta_EK[:, 0], sklearn.coef_) < 1e-10


@pytest.mark.parametrize("seed", range(5))
def test_shards_merged_in_any_order_give_the_dense_solution(seed: int):
    phi_TD, target_TK = rows(seed, 7, targets=2)
    numbers = np.random.default_rng(seed)
    cuts = np.sort(numbers.choice(np.arange(1, 200), 9, replace=False))
    parts = [record_of(*part) for part in zip(np.split(phi_TD, cuts), np.split(target_TK, cuts), strict=True)]
    shape = Shape(7, 2, position_bins(CAP))
    for order in (np.arange(10), np.arange(10)[::-1], numbers.permutation(10)):
        result = fit(total((parts[i] for i in order), shape), 1e-3)
        assert apart(result.beta_EK, dense(phi_TD, target_TK, 1e-3)) < 1e-9


@pytest.mark.parametrize("ridge_lambda", [1e-3, 1.0])
@pytest.mark.parametrize("design", ["duplicated", "zero column", "fewer rows than features"])
def test_singular_designs_are_fitted_as_sklearn_does(design: str, ridge_lambda: float):
    phi_TD, target_TK = rows(0, 4)
    phi_TD, target_TK = {
        "duplicated": (np.hstack([phi_TD, phi_TD]), target_TK),
        "zero column": (np.hstack([phi_TD, np.zeros((len(phi_TD), 1))]), target_TK),
        "fewer rows than features": (phi_TD[:2], target_TK[:2]),
    }[design]
    result = fit(record_of(phi_TD, target_TK), ridge_lambda)
    sklearn = Ridge(alpha=ridge_lambda, fit_intercept=False, solver="svd").fit(phi_TD, target_TK[:, 0])
    assert apart(result.beta_EK[:, 0], sklearn.coef_) < 1e-9
    assert np.linalg.matrix_rank(phi_TD) < phi_TD.shape[1] and not result.ill_conditioned, "ridge_lambda sees to it"
    if design == "duplicated":
        np.testing.assert_allclose(result.beta_EK[:4], result.beta_EK[4:], rtol=1e-8)
    if design == "zero column":
        assert result.beta_EK[-1, 0] == 0.0


def exact_ridge(phi_TD: np.ndarray, target_T: np.ndarray, ridge_lambda: float) -> np.ndarray:
    """The ridge solution on the rows in rational arithmetic, rounded once: a reference without any error."""
    rows, target = [[Fraction(x) for x in row] for row in phi_TD.tolist()], [Fraction(x) for x in target_T.tolist()]
    d = len(rows[0])
    system = [
        [sum(row[i] * row[j] for row in rows) + (Fraction(ridge_lambda) if i == j else 0) for j in range(d)]
        + [sum(row[i] * r for row, r in zip(rows, target, strict=True))]
        for i in range(d)
    ]
    for i in range(d):  # Gauss-Jordan; every pivot of a positive definite matrix is positive
        system[i] = [x / system[i][i] for x in system[i]]
        for k in range(d):
            if k != i:
                system[k] = [a - system[k][i] * b for a, b in zip(system[k], system[i], strict=True)]
    return np.array([float(row[d]) for row in system])


def conditioned(seed: int, condition: float, tokens: int = 60, features: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose Gram matrix has this condition number, in directions that are none of its axes."""
    numbers = np.random.default_rng(seed)
    left = np.linalg.qr(numbers.normal(size=(tokens, features)))[0]
    right = np.linalg.qr(numbers.normal(size=(features, features)))[0]
    phi_TD = left * np.logspace(2, 2 - np.log10(condition) / 2, features) @ right.T
    return phi_TD, phi_TD @ numbers.normal(size=(features, 1)) + 0.1 * numbers.normal(size=(tokens, 1))


@pytest.mark.parametrize(
    ("condition", "tolerance"), [(1e2, 1e-12), (1e4, 1e-11), (1e6, 1e-9), (1e8, 1e-8), (1e10, 1e-5)]
)
def test_beta_is_exact_to_what_the_condition_number_leaves(condition: float, tolerance: float):
    tiny = 2.0**-30
    for seed in range(4):
        phi_TD, target_TK = conditioned(seed, condition)
        result = fit(record_of(phi_TD, target_TK), tiny)
        assert result.condition_number == pytest.approx(condition, rel=0.2)
        assert apart(result.beta_EK[:, 0], exact_ridge(phi_TD, target_TK[:, 0], tiny)) < tolerance


def test_beta_of_many_shards_is_exact_too():
    tiny = 2.0**-30
    phi_TD, target_TK = conditioned(0, 1e8, tokens=320)
    parts = [record_of(*part) for part in zip(np.split(phi_TD, 32), np.split(target_TK, 32), strict=True)]
    result = fit(total(parts, Shape(6, 1, position_bins(CAP))), tiny)
    assert apart(result.beta_EK[:, 0], exact_ridge(phi_TD, target_TK[:, 0], tiny)) < 1e-8


def test_what_is_flagged_is_what_the_report_warns_of():
    assert ILL_CONDITIONED == CONDITION_LIMIT == 1e12


def test_no_token_means_no_fit():
    assert fit(Record.zero(Shape(3, 1, 4)), 1e-3) is None


@pytest.mark.parametrize("ridge_lambda", LAMBDAS)
def test_condition_number_is_numpys(ridge_lambda: float):
    record = record_of(*rows(1, 7))
    result = fit(record, ridge_lambda)
    expected = np.linalg.cond(record.gram_DD + ridge_lambda * np.eye(7), 2)
    assert result.condition_number == pytest.approx(expected, rel=1e-9)
    assert not result.ill_conditioned


@pytest.mark.parametrize(("scale", "flagged"), [(1e3, False), (1e6, True)])
def test_past_1e12_the_fit_is_made_all_the_same_and_flagged(scale: float, flagged: bool):
    phi_TD, target_TK = rows(2, 3)
    phi_TD[:, 2] *= scale
    phi_TD[:, 0] = 0.0
    result = fit(record_of(phi_TD, target_TK), 1e-3)
    assert result.ill_conditioned is flagged is (result.condition_number > 1e12)
    assert np.isfinite(result.beta_EK).all()


def duplicated(seed: int) -> Record:
    """Columns that depend on each other, so large that their rounding passes lambda."""
    phi_TD, target_TK = rows(seed, 3)
    return record_of(1e5 * np.hstack([phi_TD, phi_TD, phi_TD[:, :1] + phi_TD[:, 1:2]]), target_TK)


def test_the_condition_number_is_finite_where_rounding_leaves_none_of_lambda():
    # how far below 0 an eigenvalue falls, and whether the solve succeeds all the same, depends on the kind of CPU
    below = [record for record in map(duplicated, range(20)) if np.linalg.eigvalsh(record.gram_DD)[0] < -1e-3]
    solved = [result for record in below if (result := fit(record, 1e-3)) is not None]
    assert solved, "the case in question"
    phi_TD, target_TK = rows(3, 3)
    zero_column = record_of(np.hstack([phi_TD, np.zeros((len(phi_TD), 1))]), target_TK)
    for result in (*solved, fit(zero_column, 5e-324)):
        assert np.isfinite(result.condition_number) and result.ill_conditioned


@pytest.mark.parametrize("seed", range(3))
def test_r2_is_the_centred_share_of_the_variance_explained(seed: int):
    phi_TD, target_TK = rows(seed, 5, targets=2)
    result = fit(record_of(phi_TD, target_TK), 0.1)
    residual = target_TK - phi_TD @ result.beta_EK
    spread = target_TK - target_TK.mean(axis=0)
    expected = 1.0 - (residual**2).sum(axis=0) / (spread**2).sum(axis=0)
    assert result.r2_K == pytest.approx(tuple(expected), rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1e8 / 3])
def test_a_constant_target_has_no_r2(value: float):
    phi_TD, _ = rows(0, 3, tokens=1000)
    assert fit(record_of(phi_TD, np.full((1000, 1), value)), 1e-3).r2_K == (None,)


def test_the_closed_form_of_the_residual_is_the_direct_sum_for_any_beta():
    phi_TD, target_TK = rows(4, 6, targets=3)
    record = record_of(phi_TD, target_TK)
    for beta_EK in (fit(record, 1e-3).beta_EK, np.random.default_rng(0).normal(size=(6, 3)), np.zeros((6, 3))):
        direct = ((target_TK - phi_TD @ beta_EK) ** 2).sum(axis=0)
        np.testing.assert_allclose(residual_sum_squares(record, beta_EK), direct, rtol=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["gram_DD", "cross_DK", "target_sum_K", "target_gram_KK"])
def test_no_nan_ever_comes_out(name: str, value: float):
    record = record_of(*rows(0, 3))
    spoilt = np.array(getattr(record, name))
    spoilt.flat[0] = value
    with np.errstate(invalid="ignore"):
        result = fit(replace(record, **{name: spoilt}), 1e-3)
    if name in ("gram_DD", "cross_DK"):
        assert result is None
    else:
        assert np.isfinite(result.beta_EK).all() and np.isfinite(result.condition_number)
        assert result.r2_K == (None,)


def test_a_failed_solve_is_none_and_a_good_one_cannot_be_changed():
    assert solve(np.zeros((2, 2)), np.ones((2, 1)), 0.0) is None
    assert solve(np.eye(2), np.array([[np.nan], [1.0]]), 1.0) is None
    with pytest.raises(ValueError, match="read-only"):
        solve(np.eye(2), np.ones((2, 1)), 1.0)[0] = 1.0
