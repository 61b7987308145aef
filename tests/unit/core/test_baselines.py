"""Every mode under every fit against a slow reference that reads the spec's words on dense rows."""

import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from ray_probe.core.estimator.baselines import MODES, BaselineRule, Fit, Mode, ShardBaseline, mu_hat_by_mode
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.records import Record, record_of_tokens, total, with_prompts
from ray_probe.errors import ConfigError

CAP = 6
DECAY = 0.7
LAMBDA = 0.05
FITS: tuple[Fit, ...] = ("leave_one_out", "in_sample", "lagged")
RELATIVE = 1e-9

# Longest response of each shard in each round: the last positions are never seen, seen first in a later round, seen
# only by a shard that is left out, or seen in one round and not in the next.
LONGEST = ((2, 3, 3), (5, 3, 2), (2, 2, 4), (1, 5, 5))


@dataclass
class Shard:
    """A shard as dense rows, one a token."""

    phi_TD: np.ndarray
    r_T: np.ndarray
    position_T: np.ndarray

    def record(self) -> Record:
        record = record_of_tokens(self.phi_TD, self.r_T[:, None], self.position_T, CAP)
        return with_prompts(record, np.array([0]), np.array([[1.0, 0.0, len(self.r_T)]]))


Round = list[Shard]


def rule(mode: Mode = "regression", fit: Fit = "leave_one_out") -> BaselineRule:
    return BaselineRule(mode, fit, LAMBDA, DECAY, ("a", "b", "c"), CAP)


def some_shard(numbers: np.random.Generator, longest: int) -> Shard:
    lengths = [longest, *numbers.integers(1, longest + 1, 2)]
    tokens = sum(lengths)
    position_T = np.concatenate([np.arange(length) for length in lengths])
    return Shard(numbers.normal(size=(tokens, 3)), 9.0 - position_T + numbers.normal(size=tokens), position_T)


def some_rounds(seed: int = 0) -> list[Round]:
    numbers = np.random.default_rng(seed)
    return [[some_shard(numbers, longest) for longest in shards] for shards in LONGEST]


def published(rounds: list[Round], a_rule: BaselineRule) -> list[PublishedFit]:
    """The fit before any round, and after each."""
    fits = [PublishedFit.empty(a_rule, "policy")]
    for shards in rounds:
        fits.append(fits[-1].after_round(total((shard.record() for shard in shards), a_rule.shape)))
    return fits


def baseline_of(rounds: list[Round], number: int, shard: Shard, a_rule: BaselineRule) -> ShardBaseline:
    """What the shard of that round is given: the fit before its round with `lagged`, else the fit after it."""
    fits = published(rounds, a_rule)
    return fits[number].for_shard(None) if a_rule.fit == "lagged" else fits[number + 1].for_shard(shard.record())


def data_of(rounds: list[Round], number: int, own: Shard, fit: Fit) -> list[Round]:
    """The rounds that a shard's baseline may use."""
    if fit == "lagged":
        return rounds[:number]
    this = [shard for shard in rounds[number] if fit == "in_sample" or shard is not own]
    return [*rounds[:number], this]


def reference(mode: Mode, rounds: list[Round], position: int, phi_D: np.ndarray) -> float:
    """`mu_hat` of one token from dense rows: docs/specification.md, "Baselines", word by word."""
    shards = [shard for shards in rounds for shard in shards]
    r_T = np.concatenate([np.zeros(0), *(shard.r_T for shard in shards)])
    if mode == "none" or len(r_T) == 0:
        return 0.0
    if mode == "constant":
        return float(sum(r_T) / len(r_T))
    if mode == "regression":
        phi_TD = np.vstack([shard.phi_TD for shard in shards])
        stacked = np.vstack([phi_TD, np.sqrt(LAMBDA) * np.eye(phi_TD.shape[1])])
        beta_D = np.linalg.lstsq(stacked, np.append(r_T, np.zeros(phi_TD.shape[1])), rcond=None)[0]
        return float(phi_D @ beta_D)
    average = None
    for this in rounds:
        values = [r for shard in this for r, p in zip(shard.r_T, shard.position_T, strict=True) if p == position]
        if values:
            mean = sum(values) / len(values)
            average = mean if average is None else DECAY * average + (1.0 - DECAY) * mean
    return 0.0 if average is None else average


def all_shards(rounds: list[Round]) -> Iterator[tuple[int, Shard]]:
    return ((number, shard) for number, shards in enumerate(rounds) for shard in shards)


def positions_seen(rounds: list[Round]) -> set[int]:
    return {p for shards in rounds for shard in shards for p in shard.position_T.tolist()}


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_every_mode_under_every_fit_is_the_slow_reference(mode: Mode, fit: Fit, seed: int):
    rounds = some_rounds(seed)
    phi_TD, position_T = np.random.default_rng(9).normal(size=(CAP, 3)), np.arange(CAP)
    for number, shard in all_shards(rounds):
        baseline = baseline_of(rounds, number, shard, rule(mode, fit))
        data = data_of(rounds, number, shard, fit)
        expected = [reference(mode, data, p, phi) for p, phi in zip(position_T, phi_TD, strict=True)]
        np.testing.assert_allclose(baseline.mu_hat(mode, position_T, phi_TD), expected, rtol=RELATIVE, atol=1e-12)
        assert (baseline.mode, baseline.fitted) == (mode, any(data))


def test_the_rounds_hold_every_case_of_a_position():
    rounds = some_rounds()
    whole = positions_seen(rounds)
    assert max(whole) == CAP - 2, "the last position is never seen"
    assert positions_seen(rounds[:1]) < positions_seen(rounds[1:2]), "some are seen first in a later round"
    assert positions_seen(rounds[2:3]) < positions_seen(rounds[1:2]), "some are seen in a round and not in the next"
    only_left_out = positions_seen(rounds[:2]) - positions_seen([rounds[0], rounds[1][1:]])
    assert only_left_out == {3, 4}, "some are seen by the left-out shard alone"


@pytest.mark.parametrize("mode", MODES)
def test_leaving_a_shard_out_is_fitting_without_its_rows(mode: Mode):
    rounds = some_rounds()
    for number, shard in all_shards(rounds):
        left_out = baseline_of(rounds, number, shard, rule(mode, "leave_one_out"))
        without = [*rounds[:number], [other for other in rounds[number] if other is not shard]]
        refitted = published(without, rule(mode, "in_sample"))[-1].for_shard(None)
        assert left_out.constant == pytest.approx(refitted.constant, rel=RELATIVE)
        np.testing.assert_allclose(left_out.position_mean_B, refitted.position_mean_B, rtol=RELATIVE, atol=1e-12)
        np.testing.assert_allclose(left_out.beta_E, refitted.beta_E, rtol=RELATIVE)


@pytest.mark.parametrize("fit", FITS)
def test_only_in_sample_hears_of_the_own_rows(fit: Fit):
    rounds, changed = some_rounds(), some_rounds()
    changed[2][1].r_T = changed[2][1].r_T * 2.0 + 1.0
    for mode in MODES[1:]:
        before, after = (
            baseline_of(data, 2, data[2][1], rule(mode, fit)).mu_hat(mode, np.arange(2), np.ones((2, 3)))
            for data in (rounds, changed)
        )
        assert np.allclose(before, after, rtol=RELATIVE, atol=0) is (fit != "in_sample"), mode


@pytest.mark.parametrize("mode", MODES)
def test_lagged_starts_from_nothing(mode: Mode):
    rounds = some_rounds()
    baseline = baseline_of(rounds, 0, rounds[0][0], rule(mode, "lagged"))
    assert not baseline.fitted and baseline.beta_E is None
    assert (baseline.mu_hat(mode, np.arange(CAP), np.ones((CAP, 3))) == 0.0).all()


@pytest.mark.parametrize("mode", MODES)
def test_leaving_the_only_shard_out_leaves_a_baseline_of_zero(mode: Mode):
    rounds = [some_rounds()[0][:1]]
    baseline = baseline_of(rounds, 0, rounds[0][0], rule(mode, "leave_one_out"))
    assert not baseline.fitted and baseline.beta_E is None
    assert (baseline.mu_hat(mode, np.arange(CAP), np.ones((CAP, 3))) == 0.0).all()


def test_regression_falls_back_to_residual_mu_when_beta_cannot_be_fitted():
    rounds = some_rounds()[:1]
    for shard in rounds[0]:
        shard.phi_TD = shard.phi_TD * 1e200  # Phi^T Phi overflows
    for fit in ("leave_one_out", "in_sample"):
        with np.errstate(over="ignore", invalid="ignore"):
            whole = published(rounds, rule(fit=fit))[-1]
            baseline = baseline_of(rounds, 0, rounds[0][0], rule(fit=fit))
        assert whole.ridge is None and baseline.beta_E is None and baseline.fitted
        residual_mu = baseline.mu_hat("residual_mu", np.arange(CAP), None)
        assert residual_mu[0] > 1.0
        assert (baseline.mu_hat("regression", np.arange(CAP), None) == residual_mu).all()
        assert list(mu_hat_by_mode(baseline, np.arange(CAP), None)) == list(MODES)


@pytest.mark.parametrize("fit", FITS)
def test_a_published_fit_never_changes(fit: Fit):
    rounds = some_rounds()
    everything = published(rounds[:2], rule(fit=fit))
    copies = [copy.deepcopy(published_fit) for published_fit in everything]
    newest = everything[-1]
    for shards in rounds[2:]:
        for shard in shards:
            newest.for_shard(shard.record())
        newest = newest.after_round(total((shard.record() for shard in shards), rule().shape))
        baseline = newest.for_shard(shards[0].record())
        baseline.position_mean_B[:] = np.nan  # what an actor does with its own baseline is its own affair
    for before, now in zip(copies, everything, strict=True):
        assert pickle.dumps(_content(before)) == pickle.dumps(_content(now))
    with pytest.raises(AttributeError):
        newest.version = 9  # type: ignore[misc]


@pytest.mark.parametrize("fit", FITS)
def test_a_published_fit_arrives_as_it_was_sent(fit: Fit):
    for sent in (PublishedFit.empty(rule(fit=fit), "policy"), *published(some_rounds(), rule(fit=fit))):
        arrived = pickle.loads(pickle.dumps(sent))
        assert (arrived.rule, arrived.policy_id) == (sent.rule, sent.policy_id) and type(arrived) is PublishedFit
        assert _content(arrived) == _content(sent)
        assert not arrived.total.gram_DD.flags.writeable and arrived.total.prompt_ids_P.dtype == np.int64
        assert len(pickle.dumps(sent.for_broadcast(), protocol=5)) < 100 * 1024, "Ray sends it with the task"


def _content(published_fit: PublishedFit) -> list[object]:
    fitted = published_fit.ridge
    return [
        published_fit.version,
        published_fit.round,
        published_fit.total.pack().tobytes(),
        published_fit.latest.pack().tobytes(),
        published_fit.before.mean_B.tobytes(),
        published_fit.before.seen_B.tobytes(),
        None if fitted is None else (fitted.beta_EK.tobytes(), fitted.condition_number, fitted.r2_K),
    ]


def test_a_published_fit_says_version_round_and_policy():
    fits = published(some_rounds(), rule())
    assert [(f.version, f.round, f.policy_id) for f in fits] == [(n, n - 1, "policy") for n in range(len(fits))]
    assert all(f.rule == rule() for f in fits)
    assert fits[-1].total.tokens == sum(len(shard.r_T) for _, shard in all_shards(some_rounds()))
    assert fits[-1].latest.tokens == sum(len(shard.r_T) for shard in some_rounds()[-1])


def test_a_mean_over_nothing_is_zero():
    baseline = PublishedFit.empty(rule(), "policy").for_shard(None)
    assert baseline.constant == 0.0 and (baseline.position_mean_B == 0.0).all() and not baseline.fitted
    rounds = some_rounds()
    seen = baseline_of(rounds, 3, rounds[3][0], rule(fit="in_sample"))
    assert seen.position_mean_B[CAP - 1] == 0.0, "a position that no response has reached"


def test_regression_without_features_is_a_clear_error():
    rounds = some_rounds()
    baseline = baseline_of(rounds, 1, rounds[1][0], rule())
    with pytest.raises(ConfigError, match=r"baseline.mode: got 'regression' .* return_baseline_features=True"):
        baseline.mu_hat("regression", np.arange(CAP), None)
    without = mu_hat_by_mode(baseline, np.arange(CAP), None)
    assert list(without) == ["none", "constant", "residual_mu"]
    assert list(mu_hat_by_mode(baseline, np.arange(CAP), np.ones((CAP, 3)))) == list(MODES)
