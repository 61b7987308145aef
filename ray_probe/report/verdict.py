"""How far a result can be trusted, and what to do next."""

import math
from dataclasses import dataclass

from ray_probe.report.caveats import ended_early
from ray_probe.report.change_verdict import change_advice, change_text
from ray_probe.report.number_format import about, is_missing, number
from ray_probe.report.table_parts import SNR_RESOLVED, duration, norm_debiased
from ray_probe.run.result import Gradient, Result

SNR_LOST = 0.05
"""Below this the verdict gives no number of responses: a small norm may be chance: the error of the squared norm
is sqrt(2 / r) of the noise, where r directions carry the noise."""


@dataclass(frozen=True)
class Verdict:
    """A judgement of a result.

    Attributes:
        text: on the entropy and on the gradient's direction, or on the change.
        advice: what to do about it; None where there is nothing to do, or a caveat says it.
    """

    text: str
    advice: str | None


def verdict(result: Result) -> Verdict:
    """Judge a result by its own errors."""
    partial = "PARTIAL, so perhaps biased: " if result.partial else ""
    if result.change is not None:
        return Verdict(f"{partial}{change_text(result.change)}", change_advice(result))
    direction, advice = _direction(result)
    return Verdict(f"{partial}{_entropy(result)}; {direction}", advice)


def responses_for_snr(gradient: Gradient, snr: float) -> float | None:
    """Return the responses at which the gradient would have this SNR; None if unknown.

    The mean squared error of the gradient vector, relative to its squared norm, is then `1 / snr`.
    """
    norm_sq, trace = gradient.norm_sq_debiased, gradient.trace_cov
    if norm_sq is None or trace is None or not norm_sq > 0 or not trace > 0:
        return None
    return float(snr * trace / norm_sq)


def _entropy(result: Result) -> str:
    value, error = result.entropy.per_sequence, result.entropy.per_sequence_se
    if value is None or is_missing(value):
        return "entropy not known"
    if error is None or is_missing(error):
        return "entropy without an error: that takes two prompts or more"
    if not value > 0:
        return f"entropy known to {number(error, 2)} nats"
    return f"entropy known to {_share(error / value)}"


def _direction(result: Result) -> tuple[str, str | None]:
    gradient, snr = result.gradient, result.gradient.snr
    if gradient.why_null is not None:
        return f"direction not known: it {gradient.why_null}", _more_commits(result)
    if snr is None or is_missing(snr):
        return f"direction not known{_no_noise(gradient)}", None
    if norm_debiased(gradient) is None or snr < SNR_LOST:
        return (
            f"direction lost in the noise (SNR {number(snr, 2)}): too little to tell how many responses it takes",
            f"at least double the responses: {_more_rounds(result, 2.0 * result.counts.sequences)}",
        )
    if snr >= SNR_RESOLVED:
        return f"direction known to {_share(1 / math.sqrt(snr))} (SNR {number(snr, 3)})", None
    return _unresolved(result)


def _more_commits(result: Result) -> str:
    """Say how to get products of different commits."""
    if result.counts.repeated_prompts:
        return "give more prompts, so that some rounds share none"
    if result.counts.rounds > 1:
        return "set output.commit_rounds to 1, or add rounds"
    return "add rounds: set batch.rounds to 2 or more"


def _no_noise(gradient: Gradient) -> str:
    return "" if is_missing(gradient.trace_cov) else ": no noise was found between shards"


def _unresolved(result: Result) -> tuple[str, str | None]:
    """Judge a direction with an SNR between 0 and 1."""
    sequences, needed = result.counts.sequences, responses_for_snr(result.gradient, SNR_RESOLVED)
    if needed is None or not sequences:
        return "direction not yet", None
    more = f"direction not yet: {about(needed - sequences)} more responses for SNR 1 (rough)"
    return more, f"for SNR 1: {_more_rounds(result, needed)}"


def _more_rounds(result: Result, needed: float) -> str:
    """Say how to get `needed` responses in all."""
    settings, sequences, rounds = result.settings, result.counts.sequences, result.counts.rounds
    if ended_early(result):
        return "first finish this run, see below"
    if not rounds or not sequences:
        return f"{about(needed)} responses"
    enough = math.ceil(needed * rounds / sequences)
    if settings.rounds == rounds:
        prompts = settings.prompts_per_round
        different = "" if prompts is None else f", {number(enough * prompts)} different prompts"
        return f"run again with --set batch.rounds={enough}{different}{_time(result, enough / rounds)}"
    budgets = {"max_sequences": settings.max_sequences, "max_seconds": settings.max_seconds}
    budget = " or ".join(f"batch.{key}" for key, limit in budgets.items() if limit is not None)
    return f"run again with {budget or 'a budget'} for {about(needed)} responses{_time(result, enough / rounds)}"


def _time(result: Result, times: float) -> str:
    seconds = result.timing.seconds
    return "" if seconds is None else f", about {duration(max(1.0, seconds * times))} at this speed"


def _share(part: float) -> str:
    return f"{100 * part:.0f} %" if part >= 0.0095 else f"{100 * part:.1g} %"
