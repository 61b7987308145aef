"""Figures on the pages are those that were measured."""

import json
from typing import Any

import pytest
from support.pages import ROOT, page

ESTIMATOR, PERFORMANCE = page("docs/estimator.md").text, page("docs/performance.md").text
COLUMNS = ((32_000, 0.95), (32_000, 1.0), (151_936, 0.95), (151_936, 1.0))


def measured(name: str) -> dict[str, Any]:
    """The results of a benchmark."""
    results: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return results


def row(text: str, first: str) -> list[str]:
    """Cells of the table row that begins with this cell."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


LABELS = {
    "constant": "`constant`",
    "residual_mu": "`residual_mu`",
    "logits": "`regression`, `features: logits`",
    "recommended": "`regression`, `features: recommended` (default)",
}
POLICIES = measured("baselines")["policies"]
ROWS = [(policy, group) for policy, groups in POLICIES.items() for group in groups]


def with_error(figure: dict[str, float]) -> str:
    return f"{figure['value']:.3f} ± {figure['se']:.3f}"


@pytest.mark.parametrize("baseline", LABELS)
def test_the_baselines_table_shows_what_was_measured(baseline: str) -> None:
    measurement = POLICIES["demo"]["4"]
    one = measurement["baselines"][baseline]
    assert (measurement["responses"], measurement["shards"]) == (2048, 128)
    expected = [with_error(one["mean_square_ratio"]), with_error(one["trace_ratio"]), f"{one['snr']:.2f}"]
    assert row(ESTIMATOR, LABELS[baseline])[1:] == expected


@pytest.mark.parametrize(("policy", "group"), ROWS)
def test_the_table_of_policies_shows_what_was_measured(policy: str, group: str) -> None:
    baselines = POLICIES[policy][group]["baselines"]
    squares = [with_error(baselines[name]["mean_square_ratio"]) for name in ("residual_mu", "logits", "recommended")]
    assert row(ESTIMATOR, f"{policy}, {group}") == [*squares, with_error(baselines["recommended"]["trace_ratio"])]


def test_the_default_leaves_about_a_tenth_of_the_demos_noise_with_seed_0() -> None:
    trace = POLICIES["demo"]["4"]["baselines"]["recommended"]["trace_ratio"]
    assert trace["value"] - 2 * trace["se"] <= 0.10


@pytest.mark.parametrize(("policy", "group"), ROWS)
def test_the_default_is_nowhere_clearly_worse_than_another_baseline(policy: str, group: str) -> None:
    paired = POLICIES[policy][group]["recommended_less_better"]
    assert paired["value"] < 2 * paired["se"]


def cells(name: str, group: str, key: str, form: str) -> list[str]:
    """Medians of a benchmark by vocabulary and top_p, as the table writes them."""
    chosen = [case for case in measured(name)["cases"] if case.get("kind", "llm") == "llm"]
    cases = {(case["vocabulary"], case["top_p"]): case for case in chosen}
    return [form.format(cases[column][group][key]["median"]) for column in COLUMNS]


FUSED = "fused head forward and backward, in bare products of matrices"


@pytest.mark.parametrize(
    ("first", "name", "group", "key", "form"),
    [
        ("statistics from logits, naive over ours", "token_statistics", "ratio", "forward", "x{:.1f}"),
        ("the same with the dense gradient", "token_statistics", "ratio", "both", "x{:.1f}"),
        (FUSED, "fused_head", "in_products", "fused", "{:.2f}"),
        ("the same, naive over ours", "fused_head", "naive_over", "fused", "x{:.1f}"),
    ],
)
def test_the_table_of_token_statistics_is_what_was_measured(
    first: str, name: str, group: str, key: str, form: str
) -> None:
    assert row(PERFORMANCE, first) == cells(name, group, key, form)


def test_factors_of_sampling_and_of_a_step_are_those_measured() -> None:
    (sampling,) = [case for case in measured("decoding")["cases"] if case["top_p"] == 0.95]
    (step,) = [case for case in measured("probe_step")["cases"] if case["top_p"] == 0.95]
    over = {name: f"x{value['median']:.1f}" for name, value in sampling["generate_over"].items()}
    assert f"{over['ours']} (its bare forward passes alone: {over['forward']})" in PERFORMANCE
    for words, way in (("with graphs held", "one"), ("in bounded memory", "two")):
        factor = f"x{step['naive_over'][way]['median']:.1f}"
        assert row(PERFORMANCE, f"a probe step {words}, against the naive one")[0] == factor


def test_the_memory_figure_is_what_was_measured_and_within_its_bound() -> None:
    growth_mb = measured("actor_memory")["growth_mb"]
    assert growth_mb <= 16
    assert f"exceeds that at 32 by {growth_mb:.0f} MB" in " ".join(PERFORMANCE.split())


def test_figures_of_the_cluster_are_those_measured() -> None:
    assert row(PERFORMANCE, "until a record is on disk, 99th percentile")[0] == (
        f"{measured('ledger')['acknowledge']['p99_ms']:.1f} ms"
    )
    assert f"x{measured('scaling')['speed_up']['median']:.1f}," in PERFORMANCE


def test_a_status_over_http_takes_what_was_measured_and_at_most_100_ms() -> None:
    figures = measured("http_latency")
    busy, idle = figures["busy"], figures["idle"]
    assert busy["p99_ms"] <= 100 and figures["per_second"] == 20
    said = f"takes {busy['median_ms']:.1f} ms beside two busy actors on two cores (99th percentile "
    said += f"{busy['p99_ms']:.1f} ms; {idle['median_ms']:.1f} and {idle['p99_ms']:.1f} ms beside idle ones)"
    assert said in " ".join(PERFORMANCE.split())


def test_the_callback_takes_what_was_measured_and_less_than_50_ms() -> None:
    figures = measured("callback_cost")
    callback, over = figures["callback"], figures["over_links"]["median"]
    assert callback["p99_ms"] < 50
    said = f"takes {callback['median_ms']:.1f} ms a save (99th percentile {callback['p99_ms']:.1f} ms), x{over:.1f} of"
    assert f"{said} linking the same files" in " ".join(PERFORMANCE.split())


UPDATES = measured("change")["updates"]
BOUNDS = {"1 step": (0.35, 0.65), "5 steps": (0.35, 0.65), "20 steps": (0.70, 0.85)}
"""Largest ratios of a comparison's error to measuring both apart, and with common random numbers."""


@pytest.mark.parametrize("update", UPDATES)
def test_the_table_of_updates_shows_what_was_measured(update: str) -> None:
    one = UPDATES[update]
    errors, ratios = one["estimators"], one["error_ratios"]
    mixture = errors["mixture"]
    expected = [f"{one['kl']['ab']:.2f}", f"{mixture['value']:+.2f} ± {mixture['se']:.2f}"]
    expected += [f"{errors[name]['se_at_512']:.3f}" for name in ("mixture", "independent", "common")]
    expected += [with_error(ratios[name]) for name in ("mixture_to_independent", "mixture_to_common")]
    assert row(ESTIMATOR, update) == expected


@pytest.mark.parametrize("update", BOUNDS)
def test_a_comparison_errs_less_than_its_rivals_after_few_steps(update: str) -> None:
    ratios = UPDATES[update]["error_ratios"]
    found = tuple(ratios[name]["value"] for name in ("mixture_to_independent", "mixture_to_common"))
    assert all(ratio <= bound for ratio, bound in zip(found, BOUNDS[update], strict=True))
