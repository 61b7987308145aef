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


@pytest.mark.parametrize("mode", ["constant", "residual_mu", "regression"])
def test_the_baselines_table_shows_what_was_measured(mode: str) -> None:
    results = measured("baselines")
    ratio, gradients = results["advantages"]["advantage_mean_square_ratio"][mode], results["gradient_by_mode"]
    _, square, trace = row(ESTIMATOR, f"`{mode}`" + (" (default)" if mode == "regression" else ""))
    assert square == f"{ratio['value']:.3f} ± {ratio['se']:.3f}"
    assert trace == f"{gradients[mode]['trace_cov'] / gradients['none']['trace_cov']:.2f}"


@pytest.mark.parametrize(
    ("mode", "against", "digits"),
    [("constant", "none", 1), ("residual_mu", "constant", 2), ("regression", "residual_mu", 2)],
)
def test_paired_differences_are_those_measured(mode: str, against: str, digits: int) -> None:
    pairs = {(pair["mode"], pair["against"]): pair for pair in measured("baselines")["advantages"]["advantage_paired"]}
    pair = pairs[mode, against]
    assert f"{-pair['difference']:.{digits}f} ± {pair['se']:.{digits}f}" in ESTIMATOR


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
