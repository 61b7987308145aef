"""The closing table of a run, from result.json (spec section 9): 100 columns, plain without colour."""

from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from ray_probe.report.caveats import Result, baseline_of, caveats, ill_conditioned
from ray_probe.report.numbers import about, is_missing, number, percent, with_error
from ray_probe.report.parts import (
    MODES,
    SNR_RESOLVED,
    Row,
    figures,
    gradient_rows,
    page,
    ruled,
    shown_path,
    warned,
)

PHASES = ("generate", "teacher_force", "backward")
SNR_TEN_PERCENT = 100.0


def result_table(result: Result) -> RenderableType:
    """All that a reader needs of a run: figures with errors, the baseline, the checks, and warnings at the end.

    Args:
        result: the object of result.json; figures that are null or absent are shown as n/a.
    """
    measured, checked = _entropy(result) + _gradient(result), _parity(result) + _counts(result) + _timing(result)
    parts: list[RenderableType] = [_heading(result), figures(measured), _advantage(result), figures(_paired(result))]
    parts += [_beta(result), figures(checked)]
    return page(*parts, *warned(caveats(result), "read before use"))


def responses_for_snr(gradient: dict[str, Any], snr: float) -> float | None:
    """Responses at which the gradient would have this SNR, `snr * trace_cov / norm_sq_debiased`; None if unknown.

    The mean squared error of the gradient vector, relative to its squared norm, is then `1 / snr`.
    """
    norm_sq, trace = gradient.get("norm_sq_debiased"), gradient.get("trace_cov")
    if norm_sq is None or trace is None or not norm_sq > 0 or not trace > 0:
        return None
    return float(snr * trace / norm_sq)


def _heading(result: Result) -> Text:
    config, counts = result.get("config", {}), result.get("counts", {})
    estimator, baseline = config.get("estimator", {}), baseline_of(result)
    what = f"{estimator.get('x_estimator_mode', 'n/a')}, baseline {baseline.get('mode', 'n/a')}"
    if baseline.get("mode") != "none":
        what += f" ({baseline.get('fit', 'n/a')})"
    size = f"{number(counts.get('sequences'))} responses in {number(counts.get('rounds'))} rounds"
    path = shown_path(config.get("model", {}).get("path", "ray_probe"))
    heading = Text.assemble((path, "bold"), f"   {what}   {size}")
    if result.get("partial"):
        heading.append("   PARTIAL", "bold red")
    return heading


def _entropy(result: Result) -> list[Row]:
    entropy = result.get("entropy") or {}
    sequence = with_error(entropy.get("per_sequence"), entropy.get("per_sequence_se"))
    token = with_error(entropy.get("per_token"), entropy.get("per_token_se"))
    return [
        ("Entropy", "per sequence", f"{sequence} nats", "± one standard error, prompts as clusters"),
        ("", "per token", f"{token} nats", "E[sum of H] / E[T]"),
    ]


def _gradient(result: Result) -> list[Row]:
    gradient, counts = result.get("gradient") or {}, result.get("counts", {})
    rows = [
        *gradient_rows(gradient, f"{number(counts.get('shards'))} shards as clusters"),
        ("", "for SNR 1", *_responses(gradient, SNR_RESOLVED, "")),
        ("", "for 10 % error", *_responses(gradient, SNR_TEN_PERCENT, "RMS of the vector (SNR 100); norm errs less")),
    ]
    cosines = {key: value for key, value in gradient.items() if key.startswith("cos_") and value is not None}
    return rows + [("", key, number(value, 3), "") for key, value in cosines.items()]


def _responses(gradient: dict[str, Any], snr: float, note: str) -> tuple[str, str]:
    needed, now = responses_for_snr(gradient, snr), gradient.get("snr")
    if needed is None:
        return "n/a", "" if is_missing(now) else "more responses than in this run"
    rough = now is None or now < SNR_RESOLVED
    return f"{about(needed)} responses", "; ".join(filter(None, (note, "order of magnitude only" if rough else "")))


def _advantage(result: Result) -> RenderableType:
    square, variance = result.get("advantage_mean_square") or {}, result.get("advantage_variance") or {}
    errors, ratios = result.get("advantage_mean_square_se") or {}, result.get("advantage_mean_square_ratio") or {}
    table = ruled()
    table.add_column("Advantage", min_width=24)
    for title in ("mean square, nats²/token", "ratio to none", "variance, nats²/token"):
        table.add_column(title, justify="right", min_width=18)
    used = baseline_of(result).get("mode")
    for mode in MODES:
        ratio = ratios.get(mode) or {}
        ratio_text = "1" if mode == "none" else with_error(ratio.get("value"), ratio.get("se"))
        cells = with_error(square.get(mode), errors.get(mode)), ratio_text, number(variance.get(mode))
        name, style = (f"* {mode} (in use)", "bold") if mode == used else (f"  {mode}", "")
        table.add_row(name, *cells, style=style)
    return Padding(table, (1, 0, 0, 0))


def _paired(result: Result) -> list[Row]:
    rows: list[Row] = []
    for pair in result.get("advantage_paired") or []:
        difference = f"{with_error(pair.get('difference'), pair.get('se'))} nats²/token"
        section, note = ("", "") if rows else ("Paired", "of mean square, shards as clusters")
        rows.append((section, f"{pair['mode']} - {pair['against']}", difference, note))
    return rows


def _beta(result: Result) -> RenderableType:
    beta = result.get("beta") or {}
    features = beta.get("features") or []
    values = beta.get("values") or [None] * len(features)
    unused = "" if baseline_of(result).get("mode") == "regression" else " (not in use)"
    table = ruled()
    table.add_column(f"Beta version {number(beta.get('version'))}{unused}", min_width=24, overflow="fold")
    table.add_column("nats per unit of feature", justify="right")
    for name, value in zip(features, values, strict=True):
        table.add_row(Text(f"  {name}"), number(value))
    fit = f"  R² {number(beta.get('r2'), 3)}   condition number {number(beta.get('condition_number'), 2)}"
    fit += " (ILL-CONDITIONED)" if ill_conditioned(beta) else ""
    fit += f"   fallback {beta['fallback']}" if beta.get("fallback") else ""
    source = (
        f"  fitted on {number(beta.get('tokens'))} tokens of {number(beta.get('sequences'))} responses, through round "
        f"{number(beta.get('round'))} (from 0); ridge_lambda {number(beta.get('ridge_lambda'), 1)}"
    )
    return Padding(Group(table, Text(fit), Text(source, "dim")), (1, 0, 0, 0))


def _parity(result: Result) -> list[Row]:
    parity = result.get("parity") or {}
    mean, p99, largest = (number(parity.get(f"{key}_gap"), 2) for key in ("mean", "p99", "max"))
    return [
        ("Parity", "gap of log q", f"mean {mean} nats", f"99 % below {p99}, max {largest} nats"),
        ("", "outside nucleus", percent(parity.get("outside_nucleus"), 1), "of tokens, when scored again"),
    ]


def _counts(result: Result) -> list[Row]:
    counts = result.get("counts", {})
    sequences, ends = counts.get("sequences"), ("eos_only", "truncated")
    short, cut = (f"{number(counts.get(key))} ({percent(counts.get(key), sequences)})" for key in ends)
    shards = f"{number(counts.get('shards'))}, retried {number(counts.get('shards_retried'))}"
    again = f"; regenerated {number(counts['regenerated'])}" if counts.get("regenerated") else ""
    return [
        ("Counts", "tokens", number(counts.get("tokens")), f"{number(sequences)} responses"),
        ("", "eos_only", short, f"truncated {cut}"),
        ("", "shards", shards, f"actors {number(counts.get('actors'))}{again}"),
    ]


def _timing(result: Result) -> list[Row]:
    timing = result.get("timing") or {}
    busy = ", ".join(f"{name.replace('_', ' ')} {number(timing.get(f'{name}_s'), 3)}" for name in PHASES)
    rest = f"fit {number(timing.get('fit_s'), 3)}, wait {number(timing.get('wait_s'), 3)} s"
    speed = f"{number(timing.get('tokens_per_second'))} tokens/s"
    return [("Time", f"{number(timing.get('seconds'))} s", speed, f"{busy} (over actors), {rest}")]
