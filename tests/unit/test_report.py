import io
import math
from typing import Any

import pytest
from rich.console import Console
from support.results import a_result, set_in

from ray_probe.report.caveats import caveats
from ray_probe.report.numbers import about, number, percent, with_error
from ray_probe.report.table import responses_for_snr, result_table


def shown(result: dict[str, Any], width: int = 100) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, _environ={}).print(result_table(result))
    return stream.getvalue()


def test_the_table_shows_every_figure_with_its_error() -> None:
    text = shown(a_result())
    for expected in (
        "configs/models/[tiny]", "rb_residual, baseline regression (leave_one_out)", "28.41 ± 0.62 nats",
        "0.921 ± 0.013 nats", "3.214", "7.921", "4,813", "32 shards as clusters", "3.37",
        "about 610 responses", "about 61,000 responses",
        "412.3 ± 8.7", "118.2 ± 2.5", "24.60 ± 0.52", "17.91 ± 0.38", "172.1", "115.8", "24.11", "17.55",
        "0.2867 ± 0.0010", "0.0434 ± 0.0010", "regression - constant", "-100.3 ± 2.0",
        "Beta version 4", "0.8123", "-4.310", "-39.02", "R² 0.834", "condition number 321,000", "81,234", "0.001",
        "2.1e-07", "1.2e-06", "3.4e-05", "0.0022 %", "2,048 responses", "12 (0.59 %)", "61 (3 %)", "retried 1",
        "actors 5", "182.4 s", "445.4 tokens/s", "generate 301", "teacher force 98.1", "backward 255", "wait 33.9",
    ):  # fmt: skip
        assert expected in text, expected
    assert "read before use" not in text


def test_the_table_keeps_to_its_columns_and_needs_no_colour() -> None:
    result = a_result()
    set_in(result, "partial", list(range(40)))
    set_in(result, "beta.features", ["a_feature_with_quite_a_name_" * 8, "top1", "pos_frac"])
    for width, allowed in ((80, 80), (100, 100), (200, 100)):
        text = shown(result, width)
        assert "\x1b" not in text
        assert max(len(line.rstrip()) for line in text.splitlines()) <= allowed


def test_the_table_can_be_written_in_latin_1() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    result = a_result()
    set_in(result, "partial", [3])
    Console(file=stream, width=100).print(result_table(result))
    stream.flush()


def test_the_mode_in_use_is_marked_and_only_that() -> None:
    result = a_result()
    set_in(result, "config.estimator.baseline.mode", "constant")
    text = shown(result)
    assert text.count("(in use)") == 1
    assert "* constant (in use)" in text
    assert "Beta version 4 (not in use)" in text


def test_what_is_null_is_shown_as_not_available() -> None:
    result = a_result()
    result["gradient"].update(norm_sq_debiased=None, trace_cov=None, snr=None)
    result["beta"].update(values=None, r2=None, condition_number=None, fallback="residual_mu")
    result["entropy"].update(per_sequence_se=None, per_token_se=math.nan)
    lines = shown(result).splitlines()
    for start in ("norm² de-biased", "trace_cov", "snr", "for SNR 1", "for 10 % error", "H", "top1", "pos_frac"):
        assert any(line.strip().startswith(start) and "n/a" in line for line in lines), start
    text = "\n".join(lines)
    assert "28.41 ± n/a nats" in text
    assert "R² n/a" in text
    assert "needs two shards" in text


def test_an_empty_result_does_not_break_the_table() -> None:
    assert "n/a" in shown({})


def test_responses_for_an_snr_are_refused_when_the_gradient_is_not_above_its_noise() -> None:
    assert responses_for_snr({"norm_sq_debiased": 2.0, "trace_cov": 600.0}, 1.0) == 300.0
    for norm_sq, trace in ((-0.1, 600.0), (0.0, 600.0), (None, None), (2.0, 0.0), (math.nan, 600.0)):
        assert responses_for_snr({"norm_sq_debiased": norm_sq, "trace_cov": trace}, 1.0) is None
    result = a_result()
    result["gradient"].update(norm_sq_debiased=-0.1, snr=-0.04)
    assert "more responses than in this run" in shown(result)


def test_a_low_snr_is_called_an_order_of_magnitude() -> None:
    result = a_result()
    assert "order of magnitude" not in shown(result)
    result["gradient"].update(norm_sq_debiased=0.5, snr=0.21)
    assert "order of magnitude" in shown(result)


EOS = {
    "ids": [7], "source": "generation_config.json", "others": {"config.json": [2]}, "texts": {"2": "b", "7": "<e>"},
}  # fmt: skip
WARNINGS = {
    "PARTIAL": ({"partial": [3, 17]}, "2 shards given up: 3, 17", "bias"),
    "CONFLICT": ({"conflicts": [{"round": 1, "shard": 5}]}, "1 shard came twice", "round 1 shard 5"),
    "FALLBACK": ({"beta.fallback": "residual_mu"}, "the baseline in use was residual_mu"),
    "IN_SAMPLE": ({"config.estimator.baseline.fit": "in_sample"}, "biases the gradient", "1/N"),
    "SCORE TERM ONLY": ({"config.generation.rb_requires_grad": False}, "pathwise"),
    "UNFITTED": ({"counts.unfitted_shards": 8}, "8 of 32 shards"),
    "ILL-CONDITIONED": ({"beta.condition_number": 1.1e12}, "1.1e+12"),
    "TRUNCATED": ({"counts.truncated": 103}, "5 %", "max_new_tokens = 64"),
    "EOS ONLY": ({"counts.eos_only": 1025}, "50 %"),
    "EOS": ({"eos": EOS}, "end at 7 '<e>' (generation_config.json); config.json names 2 'b'. generation.eos_token_ids"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_a_warning_is_given_when_it_is_due_and_alone(name: str) -> None:
    changes, *expected = WARNINGS[name]
    result = a_result()
    for dotted, value in changes.items():
        set_in(result, dotted, value)
    (warning,) = caveats(result)
    assert warning.startswith(name + ":")
    assert all(text in warning for text in expected), warning
    assert f"! {name}" in shown(result)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"counts.truncated": 102},
        {"counts.eos_only": 1024},
        {"eos": EOS | {"others": {}}},
        {"eos": EOS | {"source": "generation.eos_token_ids"}},
        {"beta.condition_number": 1e12},
        {"config.estimator.baseline": {"mode": "none", "fit": "in_sample"}},
        {"counts": {}},
    ],
    ids=str,
)
def test_no_warning_is_given_when_none_is_due(changes: dict[str, Any]) -> None:
    result = a_result()
    for dotted, value in changes.items():
        set_in(result, dotted, value)
    assert caveats(result) == []


def test_a_long_list_of_lost_shards_is_cut() -> None:
    result = a_result()
    set_in(result, "partial", [[2, shard] for shard in range(40)])
    (warning,) = caveats(result)
    assert "40 shards" in warning
    assert "2/11 and 28 more" in warning
    assert "2/12" not in warning


def test_numbers_keep_their_significant_digits() -> None:
    assert [number(value) for value in (0, 81234, 0.0, 0.04344, 1234567.0, -2.5e-7)] == [
        "0", "81,234", "0", "0.04344", "1.235e+06", "-2.500e-07",
    ]  # fmt: skip
    assert [number(value) for value in (None, math.nan, math.inf)] == ["n/a", "n/a", "inf"]
    assert with_error(28.412, 0.618) == "28.41 ± 0.62"
    assert with_error(12345.6, 234.0) == "12,346 ± 234"
    assert with_error(1.5e-6, 2e-7) == "1.50e-06 ± 2.0e-07"
    assert with_error(1.0, 0.0) == "1.000 ± 0"
    assert with_error(0.0, 0.0123) == "0.000 ± 0.012"
    assert with_error(None, 0.1) == "n/a"
    assert [about(value) for value in (607.6, 0.2, 61234.0, 3.2e11, None)] == [
        "about 610", "about 1", "about 61,000", "about 3.2e+11", "n/a",
    ]  # fmt: skip
    assert [percent(*pair) for pair in ((61, 2048), (0, 10), (5, 0), (None, 3), (10, 10))] == [
        "3 %", "0 %", "n/a", "n/a", "100 %",
    ]  # fmt: skip


def test_repeated_prompts_and_few_shards_are_warned_of_when_due() -> None:
    assert not any(text.startswith(("REPEATED", "FEW SHARDS")) for text in caveats(a_result()))
    repeated, few = a_result(), a_result()
    repeated["counts"]["repeated_prompts"] = 3
    assert any(text.startswith("REPEATED: 3 prompts") for text in caveats(repeated))
    few["counts"] |= {"shards": 4, "rounds": 2}
    assert any(text.startswith("FEW SHARDS: 2 a round") for text in caveats(few))
    few["config"]["estimator"]["baseline"]["mode"] = "none"
    assert not any(text.startswith("FEW SHARDS") for text in caveats(few))
