import io
import math
from typing import Any

import pytest
from rich.console import Console
from support.results import a_result, set_in

from ray_probe.core.estimator.intervals import NORMAL_SHARDS, interval
from ray_probe.core.estimator.modes import Mode
from ray_probe.report.caveats import caveats, worse_baseline
from ray_probe.report.number_format import about, number, percent, with_error
from ray_probe.report.result_table import result_table
from ray_probe.run.result import PairedDifference, Result


def shown(result: dict[str, Any], width: int = 100, verbose: bool = True) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, _environ={}).print(result_table(Result.from_json(result), verbose))
    return stream.getvalue()


HEADING = (
    "Entropy of responses and its gradient: configs/models/[tiny]", "adapter none", "trainable all", "dtype float32",
    "temperature 0.8", "top_p 0.95", "cap 64 tokens", "2,048 responses in 4 rounds",
    "rb_residual, baseline regression (leave_one_out)",
)  # fmt: skip
CHIEF = ("28.41 ± 0.62 nats", "0.921 ± 0.013 nats", "norm_debiased", "2.81", "3.37", "entropy known to 2 %")


def test_the_table_shows_every_figure_with_its_error_when_asked_for_all() -> None:
    text = shown(a_result())
    for expected in (
        *HEADING, *CHIEF, "norm_raw", "3.214", "norm_sq_debiased", "7.921", "trace_cov", "4,813", "shards as clusters",
        "about 610 responses", "about 61,000 responses",
        "412.3 ± 8.7", "118.2 ± 2.5", "24.60 ± 0.52", "17.91 ± 0.38", "172.1", "115.8", "24.11", "17.55",
        "0.2867 ± 0.0010", "0.0434 ± 0.0010", "regression - constant", "-100.3 ± 2.0",
        "Beta version 4", "0.8123", "-4.310", "-39.02", "R² 0.834", "condition number 321,000", "81,234", "0.001",
        "through round 4", "2.1e-07", "1.2e-06", "3.4e-05", "0.0022 %", "12 (0.59 %)", "61 (3 %)",
        "182.4 s", "445.4 tokens/s", "301 s", "98.1 s", "255 s", "33.9 s",
    ):  # fmt: skip
        assert expected in text, expected
    assert "read before use" not in text


def test_the_table_is_short_unless_asked_for_all() -> None:
    text = shown(a_result(), verbose=False)
    assert all(expected in text for expected in (*HEADING, *CHIEF))
    for word in ("Advantage", "Paired", "Beta", "Parity", "trace_cov", "norm_raw", "tokens/s"):
        assert word not in text
    assert len(text.splitlines()) <= 12
    assert all(f"\n{label} " in text for label in ("Verdict", "Entropy", "Gradient", "Wrong", "To do"))


def test_the_heading_names_what_was_measured_under_which_policy() -> None:
    result = a_result()
    set_in(result, "config.model.adapter", "/adapters/lora-7")
    set_in(result, "config.model.trainable", "adapter")
    set_in(result, "config.model.dtype", "bfloat16")
    set_in(result, "config.generation", {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 4096})
    assert (
        "adapter /adapters/lora-7, trainable adapter, dtype bfloat16, temperature 1, top_p 1, cap 4,096 tokens"
    ) in " ".join(shown(result, verbose=False).split())


def test_the_table_keeps_to_its_columns_and_needs_no_colour() -> None:
    result = a_result()
    set_in(result, "partial", [f"0/{shard}" for shard in range(40)])
    set_in(result, "beta.features", ["a_feature_with_quite_a_name_" * 8, "top1", "pos_frac"])
    for width in (40, 60, 80, 100, 200):
        text = shown(result, width)
        assert "\x1b" not in text
        assert max(len(line.rstrip()) for line in text.splitlines()) <= min(width, 100)


def test_the_mode_in_use_is_marked_and_only_that() -> None:
    result = a_result()
    set_in(result, "config.estimator.baseline.mode", "constant")
    text = shown(result)
    assert text.count("(in use)") == 1
    assert "* constant (in use)" in text
    assert "Beta version 4 (not in use)" in text


def test_what_is_null_is_shown_as_not_available() -> None:
    result = a_result()
    figures = ("norm_debiased", "norm_sq_debiased", "trace_cov", "snr")
    result["gradient"].update(dict.fromkeys(figures), why_null="needs two commits")
    result["beta"].update(values=None, r2=None, condition_number=None, fallback="residual_mu")
    result["entropy"].update(per_sequence_se=None, per_token_se=math.nan)
    lines = shown(result).splitlines()
    for start in (
        "Gradient   norm_debiased", "norm_sq_debiased", "trace_cov", "snr", "for SNR 1", "for 10 % error", "H", "top1",
        "pos_frac",
    ):  # fmt: skip
        assert any(line.strip().startswith(start) and "n/a" in line for line in lines), start
    text = "\n".join(lines)
    assert "28.41 ± n/a nats" in text
    assert "R² n/a" in text
    assert "needs two commits" in text


@pytest.mark.parametrize("verbose", [False, True])
def test_an_empty_result_does_not_break_the_table(verbose: bool) -> None:
    assert "n/a" in shown({}, verbose=verbose)


def test_rounds_are_counted_from_1() -> None:
    result = a_result()
    for last, expected in ((3, "through round 4"), (0, "through round 1"), (-1, "before any round")):
        result["beta"]["round"] = last
        assert expected in shown(result)


EOS = {
    "ids": [7], "source": "generation_config.json", "others": {"config.json": [2]}, "texts": {"2": "b", "7": "<e>"},
}  # fmt: skip
WARNINGS = {
    "PARTIAL": ({"partial": ["0/3", "2/17"]}, "2 shards given up: shard 3 of round 1, shard 17 of round 3", "bias"),
    "CONFLICT": ({"conflicts": ["1/5"]}, "1 shard came twice", "shard 5 of round 2"),
    "WORSE BASELINE": (
        {"config.estimator.baseline.mode": "constant"}, "constant, which is in use, leaves 100.3 ± 2.0 nats²",
        "than regression", "set estimator.baseline.mode to regression",
    ),
    "UNFINISHED": ({"config.batch.rounds": 6}, "4 of 6 rounds", "run --resume"),
    "FALLBACK": ({"beta.fallback": "residual_mu"}, "the baseline in use was residual_mu"),
    "IN_SAMPLE": ({"config.estimator.baseline.fit": "in_sample"}, "biases the estimate", "1/N"),
    "SCORE TERM ONLY": ({"config.generation.rb_requires_grad": False}, "pathwise"),
    "UNFITTED": ({"counts.unfitted_shards": 8}, "8 of 32 shards"),
    "ILL-CONDITIONED": ({"beta.condition_number": 1.1e12}, "1.1e+12"),
    "TRUNCATED": ({"counts.truncated": 103}, "5 %", "max_new_tokens = 64"),
    "ONE RESPONSE A PROMPT": ({"config.batch.responses_per_prompt": 1}, "batch.responses_per_prompt=2"),
    "EOS ONLY": ({"counts.eos_only": 1025}, "50 %"),
    "EOS": ({"eos": EOS}, "end at 7 '<e>' (generation_config.json); config.json names 2 'b'. generation.eos_token_ids"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_a_warning_is_given_when_it_is_due_and_alone(name: str) -> None:
    changes, *expected = WARNINGS[name]
    result = a_result()
    for dotted, value in changes.items():
        set_in(result, dotted, value)
    (warning,) = caveats(Result.from_json(result))
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
        {"config.batch": {"rounds": 9, "max_sequences": 2500, "prompts_per_round": 64, "responses_per_prompt": 8}},
        {"config.batch": {"rounds": 9, "max_seconds": 180.0}},
        {"counts": {}},
    ],
    ids=str,
)
def test_no_warning_is_given_when_none_is_due(changes: dict[str, Any]) -> None:
    result = a_result()
    for dotted, value in changes.items():
        set_in(result, dotted, value)
    assert caveats(Result.from_json(result)) == []


def test_a_long_list_of_lost_shards_is_cut() -> None:
    result = a_result()
    set_in(result, "partial", [f"2/{shard}" for shard in range(40)])
    (warning,) = caveats(Result.from_json(result))
    assert "40 shards" in warning
    assert "shard 11 of round 3 and 28 more" in warning
    assert "shard 12 " not in warning


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
    assert not any(text.startswith(("REPEATED", "FEW SHARDS")) for text in caveats(Result.from_json(a_result())))
    repeated, few = a_result(), a_result()
    repeated["counts"]["repeated_prompts"] = 3
    assert any(text.startswith("REPEATED: 3 prompts") for text in caveats(Result.from_json(repeated)))
    few["counts"] |= {"shards": 7, "rounds": 1}
    assert any(text.startswith("FEW SHARDS: 7 shards; below 8") for text in caveats(Result.from_json(few)))
    few["counts"]["shards"] = 8
    assert not any(text.startswith("FEW SHARDS") for text in caveats(Result.from_json(few)))


def pair(
    mode: Mode, against: Mode, difference: float | None, error: float | None, shards: int | None = None
) -> PairedDifference:
    ends = None if shards is None else interval(difference, error, shards, NORMAL_SHARDS)
    return PairedDifference(mode, against, difference, error, ends)


@pytest.mark.parametrize(
    ("used", "paired", "other"),
    [
        ("regression", [pair("regression", "residual_mu", 44.0, 15.0)], "residual_mu"),
        ("regression", [pair("regression", "residual_mu", 29.9, 15.0)], None),
        ("regression", [pair("regression", "residual_mu", 44.0, 15.0, 8)], "residual_mu"),
        ("regression", [pair("regression", "residual_mu", 35.0, 15.0, 32)], "residual_mu"),
        ("regression", [pair("regression", "residual_mu", 35.0, 15.0, 8)], None),  # 2.33 errors; Student's t asks 2.36
        ("residual_mu", [pair("regression", "residual_mu", -35.0, 15.0, 8)], None),
        ("regression", [pair("regression", "residual_mu", -44.0, 15.0)], None),
        ("residual_mu", [pair("regression", "residual_mu", -44.0, 15.0)], "regression"),
        ("constant", [pair("regression", "residual_mu", 44.0, 15.0)], None),
        ("none", [pair("constant", "none", -9.0, 1.0), pair("regression", "none", -12.0, 1.0)], "regression"),
        ("regression", [pair("regression", "none", 0.1, 0.0)], "none"),
        ("regression", [pair("regression", "residual_mu", 44.0, None)], None),
        ("regression", [pair("regression", "residual_mu", None, None)], None),
        (None, [pair("regression", "residual_mu", 44.0, 15.0)], None),
        ("regression", None, None),
    ],
)
def test_a_baseline_that_is_clearly_worse_is_named_with_the_key_to_set(
    used: str | None, paired: list[PairedDifference] | None, other: str | None
) -> None:
    told = worse_baseline(used, paired)
    assert (told is None) is (other is None)
    if told is not None:
        assert f"WORSE BASELINE: {used}, which is in use" in told
        assert f"set estimator.baseline.mode to {other}" in told and " ± " in told
