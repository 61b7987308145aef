"""The closing table of a run, from result.json (spec section 9): ten lines, or with all of its figures."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ray_probe.report.caveats import Result, baseline_of, caveats, ill_conditioned
from ray_probe.report.column_layout import Column, Figures, FittedTable, Prose
from ray_probe.report.number_format import about, is_missing, number, percent, with_error
from ray_probe.report.table_parts import (
    MODES,
    SNR_RESOLVED,
    Row,
    below,
    count,
    figures,
    gradient_rows,
    page,
    shown_path,
    warned,
)
from ray_probe.report.verdict import responses_for_snr, verdict

SNR_TEN_PERCENT = 100.0
LABEL_CHARS = 11
"""As wide as the sections of `figures`, with the gap after them."""


def result_table(result: Result, verbose: bool = False) -> RenderableType:
    """What a reader needs of a run: entropy, gradient, what is wrong and what to do.

    Args:
        result: the object of result.json; figures that are null or absent are shown as n/a.
        verbose: also baselines, beta, paired differences, checks and times.
    """
    judged, wrong = verdict(result), caveats(result)
    todo = judged.advice or ("see below" if wrong else "nothing")
    parts: list[RenderableType] = [*heading(result), Text(), _labelled("Verdict", judged.text)]
    if verbose:
        parts += [figures(_entropy(result) + _gradient(result)), _advantage(result), figures(_paired(result))]
        parts += [_beta(result), figures(_parity(result) + _counts(result) + _timing(result)), Text()]
    else:
        parts.append(Figures(_entropy(result) + _short_gradient(result)))
    parts += [_labelled("Wrong", "see below" if wrong else "nothing that this run can see"), _labelled("To do", todo)]
    return page(*parts, *warned(wrong, "read before use"))


def heading(result: Result) -> list[RenderableType]:
    """Title, what was measured under which policy, and how much of it."""
    title, *rest = heading_lines(result)
    partial = [Text("PARTIAL", "bold red")] if result.get("partial") else []
    return [Prose(title, "bold"), *map(Prose, rest), *partial]


def heading_lines(result: Result) -> list[str]:
    """The heading as text: the title first."""
    config, counts = result.get("config", {}), result.get("counts", {})
    model, generation, estimator = (config.get(name, {}) for name in ("model", "generation", "estimator"))
    path, adapter = shown_path(model.get("path", "a checkpoint")), model.get("adapter")
    baseline = baseline_of(result)
    mode, fit = baseline.get("mode", "n/a"), baseline.get("fit", "n/a")
    return [
        f"Entropy of responses and its gradient: {path}",
        f"adapter {'none' if adapter is None else shown_path(adapter)}, trainable {model.get('trainable', 'n/a')}, "
        f"dtype {model.get('dtype', 'n/a')}, temperature {_setting(generation.get('temperature'))}, "
        f"top_p {_setting(generation.get('top_p'))}, cap {number(generation.get('max_new_tokens'))} tokens",
        f"{_many(counts.get('sequences'), 'response')} in {_many(counts.get('rounds'), 'round')}, "
        f"{estimator.get('x_estimator_mode', 'n/a')}, baseline {mode}{'' if mode == 'none' else f' ({fit})'}",
    ]


def _labelled(label: str, text: str) -> Prose:
    return Prose(text, label=Text(label.ljust(LABEL_CHARS), "bold"))


def _many(amount: int | None, noun: str) -> str:
    return f"n/a {noun}s" if amount is None else count(amount, noun)


def _setting(value: float | None) -> str:
    return "n/a" if value is None else f"{value:g}"


def _entropy(result: Result) -> list[Row]:
    entropy = result.get("entropy") or {}
    sequence = with_error(entropy.get("per_sequence"), entropy.get("per_sequence_se"))
    token = with_error(entropy.get("per_token"), entropy.get("per_token_se"))
    return [
        ("Entropy", "per sequence", f"{sequence} nats", "± one standard error, prompts as clusters"),
        ("", "per token", f"{token} nats", "E[sum of H] / E[T]"),
    ]


def _short_gradient(result: Result) -> list[Row]:
    gradient = result.get("gradient") or {}
    norm, *_, snr = gradient_rows(gradient, "")
    known = (gradient.get("snr") or 0.0) >= SNR_RESOLVED
    return [
        (*norm[:3], "of the expected gradient, noise taken out"),
        (*snr[:3], "1: as much signal as noise") if known else snr,
    ]


def _gradient(result: Result) -> list[Row]:
    gradient = result.get("gradient") or {}
    return [
        *gradient_rows(gradient, "shards as clusters"),
        ("", "for SNR 1", *_responses(gradient, SNR_RESOLVED, "")),
        ("", "for 10 % error", *_responses(gradient, SNR_TEN_PERCENT, "RMS of the vector (SNR 100); norm errs less")),
    ]


def _responses(gradient: dict[str, Any], snr: float, note: str) -> tuple[str, str]:
    needed, now = responses_for_snr(gradient, snr), gradient.get("snr")
    if needed is None:
        return "n/a", "" if is_missing(now) else "more responses than in this run"
    rough = now is None or now < SNR_RESOLVED
    return f"{about(needed)} responses", "; ".join(filter(None, (note, "order of magnitude only" if rough else "")))


def _advantage(result: Result) -> RenderableType:
    square, variance = result.get("advantage_mean_square") or {}, result.get("advantage_variance") or {}
    errors, ratios = result.get("advantage_mean_square_se") or {}, result.get("advantage_mean_square_ratio") or {}
    columns = [Column("Advantage", prefers=24)] + [
        Column(title, right=True, prefers=18)
        for title in ("mean square,\nnats² a token", "ratio to none", "variance,\nnats² a token")
    ]
    rows = []
    for mode in MODES:
        name, style = mode_name(mode, baseline_of(result).get("mode"))
        cells = (
            with_error(square.get(mode), errors.get(mode)), ratio_to_none(mode, ratios), number(variance.get(mode)),
        )  # fmt: skip
        rows.append([Text(cell, style) for cell in (name, *cells)])
    return below(FittedTable(columns, rows))


def mode_name(mode: str, used: str | None) -> tuple[str, str]:
    """How a mode is called in a table, and its style: the one in use is marked."""
    return (f"* {mode} (in use)", "bold") if mode == used else (f"  {mode}", "")


def ratio_to_none(mode: str, ratios: dict[str, Any]) -> str:
    """The ratio of a mode's mean square to that of `none`, with its error."""
    ratio = ratios.get(mode) or {}
    return "1" if mode == "none" else with_error(ratio.get("value"), ratio.get("se"))


def _paired(result: Result) -> list[Row]:
    rows: list[Row] = []
    for pair in result.get("advantage_paired") or []:
        difference = f"{with_error(pair.get('difference'), pair.get('se'))} nats² a token"
        section, note = ("", "") if rows else ("Paired", "of mean square, shards as clusters")
        rows.append((section, f"{pair['mode']} - {pair['against']}", difference, note))
    return rows


def _beta(result: Result) -> RenderableType:
    beta = result.get("beta") or {}
    features = beta.get("features") or []
    unused = "" if baseline_of(result).get("mode") == "regression" else " (not in use)"
    table = beta_values(f"Beta version {number(beta.get('version'))}{unused}", features, beta.get("values"))
    return Group(below(table), *map(Prose, fit_lines(beta)))


def beta_values(title: str, features: Sequence[str], values: Sequence[float] | None) -> FittedTable:
    """Coefficients by feature; all are n/a where beta could not be fitted."""
    columns = [Column(title, prefers=24, least=12), Column("nats per unit\nof the feature", right=True)]
    known = zip(features, [None] * len(features) if values is None else values, strict=True)
    return FittedTable(columns, [(f"  {name}", number(value)) for name, value in known])


def fit_lines(beta: dict[str, Any]) -> list[str]:
    """How good a fit is, and what it was made from."""
    quality = f"R² {number(beta.get('r2'), 3)}, condition number {number(beta.get('condition_number'), 2)}"
    quality += " (ILL-CONDITIONED)" if ill_conditioned(beta) else ""
    quality += f", fallback {beta['fallback']}" if beta.get("fallback") else ""
    source = f"fitted on {_many(beta.get('tokens'), 'token')} of {_many(beta.get('sequences'), 'response')}"
    return [quality, f"{source}, {through(beta.get('round'))}; ridge_lambda {number(beta.get('ridge_lambda'), 1)}"]


def through(number_of_round: int | None) -> str:
    """The last round inside, as people count: from 1."""
    if number_of_round is None:
        return "through round n/a"
    return "before any round" if number_of_round < 0 else f"through round {number_of_round + 1}"


def _parity(result: Result) -> list[Row]:
    parity = result.get("parity") or {}
    mean, p99, largest = (number(parity.get(f"{key}_gap"), 2) for key in ("mean", "p99", "max"))
    return [
        ("Parity", "mean gap", f"{mean} nats", "of log q, when sampled and when scored"),
        ("", "99 % of gaps below", f"{p99} nats", ""),
        ("", "largest gap", f"{largest} nats", ""),
        ("", "outside nucleus", percent(parity.get("outside_nucleus"), 1), "of tokens, when scored again"),
    ]


def _counts(result: Result) -> list[Row]:
    counts = result.get("counts", {})
    sequences = counts.get("sequences")
    short, cut = (f"{number(counts.get(key))} ({percent(counts.get(key), sequences)})" for key in _ENDS)
    rows = [
        ("Counts", "tokens", number(counts.get("tokens")), "in responses"),
        ("", "eos_only", short, "ended at the first token"),
        ("", "truncated", cut, "cut at the cap"),
        ("", "shards", number(counts.get("shards")), ""),
        ("", "shards retried", number(counts.get("shards_retried")), ""),
        ("", "actors", number(counts.get("actors")), ""),
    ]
    again = [("", "regenerated", number(counts["regenerated"]), "shards")] if counts.get("regenerated") else []
    return [*rows, *again]


def _timing(result: Result) -> list[Row]:
    timing = result.get("timing") or {}
    rows = [
        ("Time", "all rounds", f"{number(timing.get('seconds'))} s", ""),
        ("", "speed", f"{number(timing.get('tokens_per_second'))} tokens/s", ""),
    ]
    phases = [("", name.replace("_", " "), f"{number(timing.get(f'{name}_s'), 3)} s", note) for name, note in _PHASES]
    return [*rows, *phases]


_ENDS = ("eos_only", "truncated")
_PHASES = (
    ("generate", "summed over actors"), ("teacher_force", "summed over actors"), ("backward", "summed over actors"),
    ("wait", "summed over actors"), ("fit", ""),
)  # fmt: skip
