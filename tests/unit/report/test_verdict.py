"""The verdict says what is known, how many more responses it takes, and when that cannot be told."""

import math
from typing import Any

import pytest
from support.results import a_result, set_in

from ray_probe.report.verdict import Verdict, responses_for_snr, verdict
from ray_probe.run.result import Gradient, Result


def changed(**changes: Any) -> dict[str, Any]:
    result = a_result()
    for dotted, value in changes.items():
        set_in(result, dotted.replace("__", "."), value)
    return result


def verdict_of(result: dict[str, Any]) -> Verdict:
    return verdict(Result.from_json(result))


def noisy(snr: float, trace: float = 229_215.0, sequences: int = 512) -> dict[str, Any]:
    """A run of four rounds whose gradient has this SNR."""
    norm_sq = snr * trace / sequences
    gradient = {"norm_debiased": None, "norm_sq_debiased": norm_sq, "trace_cov": trace, "snr": snr}
    return changed(gradient=gradient, counts__sequences=sequences, counts__shards=32)


def test_responses_for_an_snr_are_refused_when_the_gradient_is_not_above_its_noise() -> None:
    assert responses_for_snr(Gradient(norm_sq_debiased=2.0, trace_cov=600.0), 1.0) == 300.0
    for norm_sq, trace in ((-0.1, 600.0), (0.0, 600.0), (None, None), (2.0, 0.0), (math.nan, 600.0)):
        assert responses_for_snr(Gradient(norm_sq_debiased=norm_sq, trace_cov=trace), 1.0) is None


def test_a_gradient_above_its_noise_is_known_to_the_error_of_the_vector() -> None:
    judged = verdict_of(changed(gradient__snr=4.0))
    assert judged.text == "entropy known to 2 %; direction known to 50 % (SNR 4.00)"
    assert judged.advice is None


def test_a_noisy_gradient_says_how_many_more_responses_and_how_to_have_them() -> None:
    judged = verdict_of(noisy(0.65))
    assert judged.text == "entropy known to 2 %; direction not yet: about 280 more responses for SNR 1 (rough)"
    assert judged.advice is not None
    advice = "for SNR 1: run again with --set batch.rounds=7, 448 different prompts, about 5 min"
    assert judged.advice.startswith(advice)


def test_the_more_responses_are_those_that_the_noise_asks_for() -> None:
    result = noisy(0.25, trace=1000.0, sequences=400)
    needed = responses_for_snr(Gradient.from_json(result["gradient"]), 1.0)
    assert needed == pytest.approx(1600.0)
    assert "about 1,200 more responses" in verdict_of(result).text
    assert "--set batch.rounds=16," in str(verdict_of(result).advice)


def test_an_snr_that_could_be_chance_has_no_number_either() -> None:
    assert "about 9,700 more responses" in verdict_of(noisy(0.05)).text
    assert "direction lost in the noise (SNR 0.049): too little" in verdict_of(noisy(0.049)).text


@pytest.mark.parametrize("norm_sq", [-3.0, 0.0])
def test_a_gradient_that_is_not_above_its_noise_has_no_number(norm_sq: float) -> None:
    judged = verdict_of(changed(gradient__norm_sq_debiased=norm_sq, gradient__snr=norm_sq / 9))
    lost = f"direction lost in the noise (SNR {norm_sq / 9:.2g}): too little to tell how many responses it takes"
    assert judged.text.endswith(lost)
    assert str(judged.advice).startswith("at least double the responses: run again with --set batch.rounds=8,")


@pytest.mark.parametrize(
    ("changes", "said", "advice"),
    [
        (
            {"counts__rounds": 1, "gradient__why_null": "needs two commits"},
            "direction not known: it needs two commits", "add rounds: set batch.rounds to 2 or more",
        ),
        (
            {"gradient__why_null": "needs two commits"}, "direction not known: it needs two commits",
            "set output.commit_rounds to 1, or add rounds",
        ),
        (
            {"counts__repeated_prompts": 4, "gradient__why_null": "needs two commits that share no prompt"},
            "direction not known: it needs two commits that share no prompt", "give more prompts",
        ),
        ({"gradient__trace_cov": 0.0}, "direction not known: no noise was found between shards", None),
        ({"gradient": {}}, "direction not known", None),
    ],
)
def test_an_unknown_noise_says_why(changes: dict[str, Any], said: str, advice: str | None) -> None:
    judged = verdict_of(changed(**{"gradient__snr": None, **changes} if "gradient" not in changes else changes))
    assert judged.text.endswith(said)
    assert judged.advice is None if advice is None else str(judged.advice).startswith(advice)


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (28.4, 1.7, "entropy known to 6 %"),
        (28.4, 0.01, "entropy known to 0.04 %"),
        (28.4, 40.0, "entropy known to 141 %"),
        (0.0, 0.0, "entropy known to 0 nats"),
        (0.0, 0.012, "entropy known to 0.012 nats"),
        (28.4, None, "entropy without an error: that takes two prompts or more"),
        (28.4, math.nan, "entropy without an error: that takes two prompts or more"),
        (None, None, "entropy not known"),
    ],
)
def test_the_entropy_is_known_to_its_relative_error(value: float | None, error: float | None, said: str) -> None:
    assert verdict_of(changed(entropy__per_sequence=value, entropy__per_sequence_se=error)).text.startswith(f"{said};")


def test_a_partial_result_is_called_so_first() -> None:
    result = noisy(0.65)
    result["partial"] = ["0/3"]
    assert verdict_of(result).text.startswith("PARTIAL, so perhaps biased: entropy known to 2 %; direction not yet")


@pytest.mark.parametrize(
    ("batch", "advice"),
    [
        ({"rounds": 6}, "first finish this run"),
        ({"rounds": None, "max_sequences": 600}, "run again with batch.max_sequences for about 790 responses"),
        ({"rounds": 9, "max_seconds": 100.0}, "run again with batch.max_seconds for about 790 responses"),
        ({}, "run again with a budget for about 790 responses"),
    ],
)
def test_the_advice_names_the_key_that_ended_the_run(batch: dict[str, Any], advice: str) -> None:
    result = noisy(0.65)
    set_in(result, "config.batch", batch)
    assert str(verdict_of(result).advice).startswith(f"for SNR 1: {advice}")


def test_an_empty_result_has_a_verdict() -> None:
    assert verdict_of({}).text == "entropy not known; direction not known"
