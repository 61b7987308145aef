"""Totals add up over rounds and survive JSON; every figure of result.json is the direct computation."""

import itertools
import json
from typing import Any

import numpy as np
import pytest

from ray_probe.core.estimator.baselines import MODES, BaselineRule
from ray_probe.core.estimator.parity import ParityStats
from ray_probe.core.estimator.variance import clustered_ratio
from ray_probe.fitter.fitter import Fitter
from ray_probe.run.estimates import advantage_by_mode, build_result, entropy_estimate, round_summary
from ray_probe.run.gradient_products import GradientProducts
from ray_probe.run.messages import Collected, Delivery, ShardSums, SumsX
from ray_probe.run.result import Entropy, Gradient
from ray_probe.run.totals import PAIRS, Totals, merged, summed

CAP = 4
BETA = Fitter(BaselineRule("regression", "leave_one_out", 1e-3, 0.9, ("H",), CAP), "policy").beta()
CONFIG = {
    "generation": {"max_new_tokens": CAP}, "batch": {"responses_per_prompt": 1000},
    "estimator": {"baseline": {"mode": "regression", "fit": "leave_one_out"}},
}  # fmt: skip
PRODUCTS = GradientProducts(norm_sq=123.0, cross=20.0, pairs=250.0)
LENGTHS = (1, 4, 2, 3)


def some_advantages(round_number: int, shard: int) -> dict[str, np.ndarray]:
    """A of every token of a shard, by mode."""
    numbers = np.random.default_rng([round_number, shard])
    tokens = sum(LENGTHS) + shard
    return {mode: numbers.normal(1.0 / (i + 1), 3.0 - i / 2, tokens) for i, mode in enumerate(MODES)}


def some_report(round_number: int, shard: int, prompts: tuple[int, int] = (0, 1)) -> ShardSums:
    numbers = np.random.default_rng([round_number, shard, 1])
    by_mode = some_advantages(round_number, shard)
    rows = np.array([[2, numbers.uniform(1, 9), 5.0], [2, numbers.uniform(1, 9), 5.0 + shard]])
    bins = [np.array([4.0, 3.0, 2.0, 1.0 + shard]), numbers.normal(size=CAP), numbers.normal(size=CAP)]
    advantage = {mode: np.array([a.sum(), (a**2).sum()]) for mode, a in by_mode.items()}
    squares = np.stack([rows[:, 1] ** 2, rows[:, 1] * rows[:, 2], rows[:, 2] ** 2], axis=1) / 2 + [1.0, 0.5, 0.5]
    sums = SumsX(rows, squares, 1, 2, advantage, *bins)
    return ShardSums(
        round_number, shard, 1, True, shard != 2, np.array(prompts), sums, float(numbers.uniform(20, 30)), 0.5
    )


def some_collected(round_number: int, shard: int) -> Collected:
    numbers = np.random.default_rng([round_number, shard, 2])
    sampled, tokens = numbers.normal(size=10 + shard), 10 + shard
    parity = ParityStats.of(sampled, sampled + numbers.normal(0, 1e-6, tokens), np.arange(tokens) == 3)
    return Collected(Delivery("policy", ("H",), round_number, shard, np.zeros(8), "cpu"), parity, tokens, 2.0, 0.25)


def a_round(number: int, shards: int = 3, prompts: tuple[int, int] = (0, 1)) -> Totals:
    order = list(reversed(range(shards)))
    totals = summed(
        [some_report(number, s, (prompts[0] + 2 * s, prompts[1] + 2 * s)) for s in order],
        [some_collected(number, s) for s in order],
        CAP,
    )
    totals.seconds["seconds"] = 8.0 + number
    return totals


def canonical(totals: Totals) -> str:
    return json.dumps(totals.to_json(), sort_keys=True)


def result_of(totals: Totals) -> dict[str, Any]:
    return build_result(CONFIG, BETA, totals, PRODUCTS, actors=2).to_json()


def test_totals_of_a_round_do_not_depend_on_the_order_of_reports():
    reports, halves = [some_report(0, s) for s in range(4)], [some_collected(0, s) for s in range(4)]
    forwards, backwards = summed(reports, halves, CAP), summed(reports[::-1], halves[::-1], CAP)
    assert canonical(forwards) == canonical(backwards)
    assert forwards.shards == ["0/0", "0/1", "0/2", "0/3"] and forwards.rounds == 1
    assert (forwards.sequences, forwards.tokens) == (16, 46)
    assert forwards.counts == {
        "eos_only": 4, "truncated": 8, "unfitted_shards": 1, "shards_retried": 0, "regenerated": 0,
    }  # fmt: skip
    assert forwards.seconds | {"seconds": 0.0} == {
        "seconds": 0.0, "generate_s": 8.0, "teacher_force_s": 1.0, "backward_s": 2.0, "fit_s": 0.0, "wait_s": 0.0,
    }  # fmt: skip


def test_totals_survive_json():
    totals = merged([a_round(0), a_round(1)])
    totals.given_up, totals.conflicts = ["0/7"], ["1/2"]
    back = Totals.from_json(json.loads(json.dumps(totals.to_json(), allow_nan=False)))
    assert canonical(back) == canonical(totals)
    assert result_of(back) == result_of(totals)
    assert list(back.prompts) == list(totals.prompts), "sums over prompts keep their order, so their bits"
    assert back.parity.histogram.dtype == totals.parity.histogram.dtype


def test_a_mode_that_could_not_be_formed_is_null_and_stays_so():
    report = some_report(0, 0)
    del report.sums.advantage["regression"]
    totals = summed([report, some_report(0, 1)], [], CAP)
    back = Totals.from_json(json.loads(json.dumps(totals.to_json(), allow_nan=False)))
    for each in (totals, back):
        assert advantage_by_mode(each)["regression"].to_json() == dict.fromkeys(("mean", "variance", "mean_square"))
        assert advantage_by_mode(each)["constant"].variance > 0
        assert result_of(each)["advantage_variance"]["regression"] is None


def test_merging_rounds_adds_what_is_inside_and_changes_no_round():
    parts = [a_round(0), a_round(1, shards=2), a_round(2)]
    parts[0].given_up, parts[2].given_up, parts[1].conflicts = ["0/8"], ["2/9"], ["1/1"]
    before = [canonical(part) for part in parts]
    whole = merged(parts)
    assert [canonical(part) for part in parts] == before
    assert (whole.rounds, len(whole.shards)) == (3, 8)
    assert whole.shards == parts[0].shards + parts[1].shards + parts[2].shards
    assert (whole.given_up, whole.conflicts) == (["0/8", "2/9"], ["1/1"])
    for name in ("sequences", "tokens"):
        assert getattr(whole, name) == sum(getattr(part, name) for part in parts)
    for name in ("counts", "seconds"):
        for key, value in getattr(whole, name).items():
            assert value == pytest.approx(sum(getattr(part, name)[key] for part in parts)), key
    np.testing.assert_allclose(whole.bins_3B, sum(part.bins_3B for part in parts), rtol=1e-14)
    assert whole.parity.tokens == sum(part.parity.tokens for part in parts)
    whole.add_shard(some_report(3, 0))
    whole.prompts[0] += 1.0
    assert [canonical(part) for part in parts] == before


def test_merging_round_by_round_gives_the_bits_of_merging_all_at_once():
    parts = [a_round(number) for number in range(4)]
    running = parts[0]
    for part in parts[1:]:
        running = merged([running, part])
    assert canonical(running) == canonical(merged(parts))
    assert list(running.prompts) == list(merged(parts).prompts)


def test_a_prompt_that_comes_back_is_one_cluster():
    parts = [a_round(0), a_round(1)]
    whole = merged(parts)
    assert sorted(whole.prompts) == list(range(6))
    for prompt_id, row in whole.prompts.items():
        assert row == pytest.approx(parts[0].prompts[prompt_id] + parts[1].prompts[prompt_id])
    rows = np.array([whole.prompts[i] for i in range(6)])
    value, error = clustered_ratio(rows[:, 1], rows[:, 0])
    reported = entropy_estimate(whole).to_json()
    assert (reported["per_sequence"], reported["per_sequence_se"]) == pytest.approx((value, error))
    assert len(merged([a_round(0), a_round(1, prompts=(100, 101))]).prompts) == 12


def test_errors_for_these_very_prompts_add_up_over_uses_and_survive_the_disk():
    parts = [Totals.from_json(json.loads(canonical(a_round(number)))) for number in range(2)]
    whole = merged(parts)
    uses, spread_3 = 2 * 3 * 2, np.array([1.0, 0.5, 0.5])  # two rounds, three shards, two prompts; G / (G - 1) is 2
    np.testing.assert_allclose(whole.within_3, 2 * uses * spread_3, rtol=1e-12)
    reported = entropy_estimate(whole)
    scatter = 2 * uses * (1.0 - 2 * reported.per_token * 0.5 + reported.per_token**2 * 0.5)
    assert reported.per_sequence_se_within == pytest.approx(np.sqrt(2 * uses * 1.0) / whole.sequences)
    assert reported.per_token_se_within == pytest.approx(np.sqrt(scatter) / whole.tokens)


def test_entropy_of_nothing_is_null():
    assert entropy_estimate(Totals(bins_3B=np.zeros((3, CAP)))) == Entropy()


def test_advantage_statistics_of_a_round_are_the_direct_ones():
    statistics = round_summary(0, a_round(0), BETA, [0, 1, 2], {0: (0, 1), 1: (2,)}).to_json()["advantage"]
    for mode in MODES:
        a = np.concatenate([some_advantages(0, shard)[mode] for shard in range(3)])
        assert statistics[mode] == pytest.approx({"mean": a.mean(), "variance": a.var(), "mean_square": (a**2).mean()})


def test_ratios_and_paired_differences_are_the_direct_ones_with_shards_as_clusters():
    places = [(number, shard) for number in range(3) for shard in range(3)]
    result = result_of(merged([a_round(number) for number in range(3)]))
    squares = {mode: np.array([(some_advantages(*place)[mode] ** 2).sum() for place in places]) for mode in MODES}
    tokens = np.array([len(some_advantages(*place)["none"]) for place in places])

    def jackknife_free_error(numerator: np.ndarray, denominator: np.ndarray) -> float:
        residual = numerator - numerator.sum() / denominator.sum() * denominator
        return float(np.sqrt(9 / 8 * (residual**2).sum()) / denominator.sum())

    for mode in MODES:
        assert result["advantage_mean_square"][mode] == pytest.approx(squares[mode].sum() / tokens.sum())
        assert result["advantage_mean_square_se"][mode] == pytest.approx(jackknife_free_error(squares[mode], tokens))
        ratio = result["advantage_mean_square_ratio"][mode]
        assert ratio["value"] == pytest.approx(squares[mode].sum() / squares["none"].sum())
        assert ratio["se"] == pytest.approx(jackknife_free_error(squares[mode], squares["none"]), abs=1e-15)
    assert [(pair["mode"], pair["against"]) for pair in result["advantage_paired"]] == list(PAIRS)
    assert {frozenset(pair) for pair in PAIRS} == {frozenset(two) for two in itertools.combinations(MODES, 2)}
    for pair in result["advantage_paired"]:
        difference = squares[pair["mode"]] - squares[pair["against"]]
        assert pair["difference"] == pytest.approx(difference.sum() / tokens.sum())
        assert pair["se"] == pytest.approx(jackknife_free_error(difference, tokens))
    assert result["advantage_mean_square_ratio"]["none"]["se"] == pytest.approx(0.0, abs=1e-15)


KEYS = {
    "": {
        "schema_version", "config", "beta", "advantage_variance", "advantage_mean_square", "entropy", "gradient",
        "parity", "counts", "partial", "conflicts", "timing",
    },
    "beta": {
        "features", "values", "version", "round", "ridge_lambda", "tokens", "sequences", "r2", "condition_number",
        "fallback",
    },
    "advantage_variance": set(MODES),
    "advantage_mean_square": set(MODES),
    "entropy": {"per_sequence", "per_sequence_se", "per_token", "per_token_se"},
    "gradient": {"norm_raw", "norm_debiased", "norm_sq_debiased", "trace_cov", "snr", "why_null"},
    "parity": {"mean_gap", "p99_gap", "max_gap", "outside_nucleus"},
    "counts": {
        "rounds", "shards", "sequences", "tokens", "eos_only", "truncated", "shards_retried", "actors",
    },
    "timing": {
        "seconds", "tokens_per_second", "generate_s", "teacher_force_s", "backward_s", "fit_s", "wait_s",
    },
}  # fmt: skip


@pytest.mark.parametrize(("rounds", "shards"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_the_result_has_every_key_and_is_json_without_nan(rounds: int, shards: int):
    result = result_of(merged([a_round(number, shards) for number in range(rounds)]))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    for section, keys in KEYS.items():
        assert keys <= set(result[section] if section else result), section
    assert set(result["gradient"]) == KEYS["gradient"], "no name that could be either norm"
    assert result["schema_version"] == 1 and result["config"] == CONFIG and result["beta"] == BETA.to_json()
    assert result["counts"] == {
        "rounds": rounds, "shards": rounds * shards, "actors": 2, "sequences": 4 * rounds * shards,
        "tokens": rounds * (10 * shards + shards * (shards - 1) // 2), "eos_only": rounds * shards,
        "truncated": 2 * rounds * shards, "unfitted_shards": rounds * (shards > 2), "shards_retried": 0,
        "regenerated": 0, "repeated_prompts": 0,
    }  # fmt: skip
    assert (result["partial"], result["conflicts"]) == (False, [])
    few = rounds * shards < 8
    assert (result["advantage_paired"][0]["se"] is None) is few, "an error of few shards would be too small"
    assert (result["advantage_mean_square_se"]["none"] is None) is few
    seconds = sum(8.0 + number for number in range(rounds))
    assert result["timing"]["tokens_per_second"] == pytest.approx(result["counts"]["tokens"] / seconds)


def test_one_prompt_has_an_entropy_and_no_error():
    report = some_report(0, 0, prompts=(5, 5))
    entropy = entropy_estimate(summed([report], [], CAP)).to_json()
    assert entropy["per_sequence"] == pytest.approx(report.sums.prompt_rows_P3[:, 1].sum() / 4)
    assert (entropy["per_sequence_se"], entropy["per_token_se"]) == (None, None)


def test_shards_given_up_and_conflicts_are_listed():
    totals = a_round(0)
    totals.given_up, totals.conflicts = ["0/5"], ["0/1"]
    result = result_of(totals)
    assert (result["partial"], result["conflicts"]) == (["0/5"], ["0/1"])


def test_the_gradient_section_is_of_the_mean_over_responses():
    totals = a_round(0)
    result = result_of(totals)
    n, norm_sq = totals.sequences, 20.0 / 250.0
    trace = n * (123.0 / n**2 - norm_sq)
    assert result["gradient"] == pytest.approx({
        "norm_raw": np.sqrt(123.0) / n, "norm_debiased": np.sqrt(norm_sq), "norm_sq_debiased": norm_sq,
        "trace_cov": trace, "snr": norm_sq / (trace / n), "why_null": None,
    })  # fmt: skip


@pytest.mark.parametrize(("mode", "fit"), [("regression", "lagged"), ("none", "leave_one_out")])
def test_all_pairs_of_shards_count_where_no_fit_holds_another_of_the_round(mode: str, fit: str):
    totals = a_round(0)
    config = CONFIG | {"estimator": {"baseline": {"mode": mode, "fit": fit}}}
    gradient = build_result(config, BETA, totals, PRODUCTS, actors=2).gradient
    norms, n = totals.sizes_S3[:, 2], totals.sequences
    assert gradient.norm_sq_debiased == pytest.approx((123.0 - norms.sum()) / (n**2 - 3 * 4**2))


@pytest.mark.parametrize(("most", "why"), [(1000, "needs two commits"), (3, "needs two commits that share no prompt")])
def test_without_two_independent_commits_the_noise_is_null_with_the_reason(most: int, why: str):
    config = CONFIG | {"batch": {"responses_per_prompt": most}}
    totals = merged([a_round(0), a_round(1)])
    gradient = build_result(config, BETA, totals, GradientProducts(norm_sq=123.0), actors=2).gradient
    assert gradient == Gradient(norm_raw=pytest.approx(np.sqrt(123.0) / totals.sequences), why_null=why)


def test_positions_are_means_by_bin_and_null_where_nobody_was():
    totals = a_round(0)
    totals.bins_3B = np.array([[5.0, 2.0, 1.0, 0.0], [10.0, 1.0, 0.5, 0.0], [5.0, 4.0, 1.0, 0.0]])
    assert result_of(totals)["positions"] == {
        "edges": [0.0, 1.0, 2.0, 3.0, 4.0], "tokens": [5.0, 2.0, 1.0, 0.0],
        "target_mean": [2.0, 0.5, 0.5, None], "mu_hat_mean": [1.0, 2.0, 1.0, None],
    }  # fmt: skip


def test_a_line_of_a_round_is_json_and_says_which_records_the_fit_holds():
    totals = a_round(2)
    totals.given_up = ["2/3"]
    line = round_summary(2, totals, BETA, [0, 1, 2, 3], {0: (0, 1, 2, 3)}).to_json()
    assert json.loads(json.dumps(line, allow_nan=False)) == line
    assert (line["round"], line["shards"], line["given_up"], line["records"]) == (2, 3, ["2/3"], [0, 1, 2, 3])
    assert (line["sequences"], line["tokens"], line["seconds"]) == (12, 33, 10.0)
    assert line["fit"] == BETA.to_json() and line["beta_version"] == BETA.version and line["beta"] == BETA.values
    assert line["entropy"] == entropy_estimate(totals).to_json()


def test_where_prompts_came_back_no_error_takes_their_shards_for_independent():
    totals = merged([a_round(0), a_round(1)])
    once = build_result(CONFIG, BETA, totals, PRODUCTS, actors=2).to_json()
    most = int(max(row[0] for row in totals.prompts.values()))
    config = CONFIG | {"batch": {"responses_per_prompt": most - 1}}
    again = build_result(config, BETA, totals, PRODUCTS, actors=2).to_json()
    assert once["counts"]["repeated_prompts"] == 0 < again["counts"]["repeated_prompts"]
    assert again["gradient"]["norm_raw"] == once["gradient"]["norm_raw"]
    assert again["gradient"] == once["gradient"], "it comes from commits that share no prompt"
    assert set(again["advantage_mean_square_se"].values()) == {None}
    assert {pair["se"] for pair in again["advantage_paired"]} == {None}
    assert again["advantage_mean_square"] == once["advantage_mean_square"]
    assert again["entropy"] == once["entropy"], "its errors are clustered by prompt and stay right"
