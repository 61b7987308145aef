"""The closing table of a run: ten lines, or all figures."""

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.text import Text

from ray_probe.core.columns import COLUMNS
from ray_probe.core.estimator.intervals import NORMAL_PROMPTS
from ray_probe.core.estimator.modes import MODES, Mode
from ray_probe.report.caveats import caveats, ill_conditioned
from ray_probe.report.change_table import change_details, change_rows, change_tables
from ray_probe.report.column_layout import Column, Figures, FittedTable, Prose, Rank
from ray_probe.report.number_format import NOT_AVAILABLE, about, count, is_missing, number, percent, with_error
from ray_probe.report.table_parts import SNR_RESOLVED, Row, below, figures, gradient_rows, page, shown_path, warned
from ray_probe.report.verdict import responses_for_snr, verdict
from ray_probe.run.result import Beta, Entropy, Estimate, Gradient, Result
from ray_probe.run.settings import Settings

SNR_TEN_PERCENT = 100.0
LABEL_CHARS = 11
"""As wide as the sections of `figures`, with the gap after them."""


def result_table(result: Result, verbose: bool = False) -> RenderableType:
    """Return entropy, gradient, what is wrong and what to do; a missing figure is n/a.

    Args:
        result: of the run.
        verbose: also baselines, beta, paired differences, checks and times.
    """
    judged, wrong = verdict(result), caveats(result)
    todo = judged.advice or ("see below" if wrong else "nothing")
    parts: list[RenderableType] = [*heading(result), Text(), _labelled("Verdict", judged.text)]
    if verbose:
        parts += [*_measured(result), _advantage(result), figures(_paired(result))]
        parts += [_beta(result), figures(_parity(result) + _counts(result) + _timing(result)), Text()]
    else:
        parts.append(Figures(_short(result) + _noise_left(result)))
    parts += [_labelled("Wrong", "see below" if wrong else "nothing that this run can see"), _labelled("To do", todo)]
    return page(*parts, *warned(wrong, "read before use"))


def figure_rows(result: Result) -> list[Row]:
    """Return every figure as a row: section, name, value with its unit, note."""
    measured = _entropy(result) + _entropy_errors(result.entropy) + _gradient(result.gradient)
    if result.change is not None:
        measured = change_rows(result.change) + change_details(result.change)
    checks = _parity(result) + _counts(result) + _timing(result)
    return [*measured, *_noise_left(result), *_paired(result), *checks]


def _measured(result: Result) -> list[RenderableType]:
    """Return all figures of what was measured: entropy and gradient, or the change."""
    if result.change is None:
        entropy = _entropy(result) + _entropy_errors(result.entropy)
        return [figures(entropy + _gradient(result.gradient))]
    change = result.change
    return [figures(change_rows(change)), figures(change_details(change)), *change_tables(change)]


def _short(result: Result) -> list[Row]:
    if result.change is not None:
        return change_rows(result.change)
    return _entropy(result) + _short_gradient(result.gradient)


def heading(result: Result) -> list[RenderableType]:
    """Return title, checkpoint, sampling policy and size of the run."""
    title, *rest = heading_lines(result)
    partial = [Text("PARTIAL", "bold red")] if result.partial else []
    return [Prose(title, "bold"), *map(Prose, rest), *partial]


def heading_lines(result: Result) -> list[str]:
    """Return the heading as text, the title first."""
    settings, counts = result.settings, result.counts
    path = shown_path(settings.path or "a checkpoint")
    adapter = "none" if settings.adapter is None else shown_path(settings.adapter)
    mode = settings.mode or NOT_AVAILABLE
    title = f"Entropy of responses and its gradient: {path}"
    weights = f"adapter {adapter}, trainable {settings.trainable or NOT_AVAILABLE}"
    if settings.against is not None:
        title = f"Change of the entropy of responses: from A = {shown_path(settings.against)} to B = {path}"
        other = "none" if settings.adapter_a is None else shown_path(settings.adapter_a)
        weights = f"adapter of A {other}, of B {adapter}"
    return [
        title,
        f"{weights}, dtype {settings.dtype or NOT_AVAILABLE}, "
        f"temperature {_setting(settings.temperature)}, top_p {_setting(settings.top_p)}, "
        f"cap {number(settings.max_new_tokens)} tokens",
        f"{count(counts.sequences, 'response')} in {count(counts.rounds, 'round')}, "
        f"{settings.x_estimator_mode or NOT_AVAILABLE}, baseline {mode}"
        f"{'' if mode == 'none' else f' ({settings.fit or NOT_AVAILABLE})'}"
        f"{f', features {_features(settings)}' if mode == 'regression' and settings.features else ''}",
    ]


def _features(settings: Settings) -> str:
    """Return the name of the set of features, or those of a list."""
    features = settings.features or ()
    return features if isinstance(features, str) else " ".join(features)


def _labelled(label: str, text: str) -> Prose:
    return Prose(text, label=Text(label.ljust(LABEL_CHARS), "bold"))


def _setting(value: float | None) -> str:
    return NOT_AVAILABLE if value is None else f"{value:g}"


def _entropy(result: Result) -> list[Row]:
    entropy = result.entropy
    sequence = with_error(entropy.per_sequence, entropy.per_sequence_se)
    token = with_error(entropy.per_token, entropy.per_token_se)
    return [
        ("Entropy", "per sequence", f"{sequence} nats", "± one standard error, prompts as clusters"),
        ("", "per token", f"{token} nats", "E[sum of H] / E[T]"),
    ]


def _entropy_errors(entropy: Entropy) -> list[Row]:
    """Return intervals, and the errors for these very prompts."""
    quantile = "Student's t" if entropy.clusters < NORMAL_PROMPTS else "normal"
    note = f"95 % for prompts like these, {count(entropy.clusters, 'prompt')} ({quantile})"
    these = "± one standard error for these very prompts"
    return [
        ("", "sequence, interval", f"{_ends(entropy.per_sequence_interval)} nats", note),
        ("", "token, interval", f"{_ends(entropy.per_token_interval)} nats", ""),
        ("", "these prompts", f"{with_error(entropy.per_sequence, entropy.per_sequence_se_within)} nats", these),
        ("", "their tokens", f"{with_error(entropy.per_token, entropy.per_token_se_within)} nats", ""),
    ]


def _ends(interval: tuple[float, float] | None) -> str:
    return NOT_AVAILABLE if interval is None else f"{number(interval[0], 3)} to {number(interval[1], 3)}"


def _short_gradient(gradient: Gradient) -> list[Row]:
    norm, *_, snr = gradient_rows(gradient, "")
    known = (gradient.snr or 0.0) >= SNR_RESOLVED
    return [
        (*norm[:3], "of the expected gradient, noise taken out"),
        (*snr[:3], "1: as much signal as noise") if known else snr,
    ]


def _noise_left(result: Result) -> list[Row]:
    """Return the share of the score term's noise that the baseline leaves."""
    used = [mode for mode in MODES if mode == result.settings.mode and mode != "none"]
    ratios = result.advantage_mean_square_ratio
    note = "mean squared advantage, ratio to no baseline"
    return [("Baseline", "noise it leaves", ratio_to_none(mode, ratios), note) for mode in used]


def _gradient(gradient: Gradient) -> list[Row]:
    return [
        *gradient_rows(gradient, "of the mean, times responses"),
        ("", "for SNR 1", *_responses(gradient, SNR_RESOLVED, "")),
        ("", "for 10 % error", *_responses(gradient, SNR_TEN_PERCENT, "RMS of the vector (SNR 100); norm errs less")),
    ]


def _responses(gradient: Gradient, snr: float, note: str) -> tuple[str, str]:
    needed, now = responses_for_snr(gradient, snr), gradient.snr
    if needed is None:
        return NOT_AVAILABLE, "" if is_missing(now) else "more responses than in this run"
    rough = now is None or now < SNR_RESOLVED
    return f"{about(needed)} responses", "; ".join(filter(None, (note, "order of magnitude only" if rough else "")))


def _advantage(result: Result) -> RenderableType:
    square, errors = result.advantage_mean_square, result.advantage_mean_square_se
    columns = [Column("Advantage", prefers=24)] + [
        Column(title, right=True, prefers=18)
        for title in ("mean square,\nnats² a token", "ratio to none", "variance,\nnats² a token")
    ]
    rows = []
    for mode in MODES:
        name, style = mode_name(mode, result.settings.mode)
        cells = (
            with_error(square.get(mode), errors.get(mode)), ratio_to_none(mode, result.advantage_mean_square_ratio),
            number(result.advantage_variance.get(mode)),
        )  # fmt: skip
        rows.append([Text(cell, style) for cell in (name, *cells)])
    return below(FittedTable(columns, rows))


def mode_name(mode: str, used: str | None) -> tuple[str, str]:
    """Return name and style of a baseline in a table; the one in use is marked."""
    return (f"* {mode} (in use)", "bold") if mode == used else (f"  {mode}", "")


def ratio_to_none(mode: Mode, ratios: Mapping[Mode, Estimate | None]) -> str:
    """Return the ratio of a baseline's mean square to that of `none`, with its error."""
    ratio = ratios.get(mode) or Estimate()
    return "1" if mode == "none" else with_error(ratio.value, ratio.se)


def _paired(result: Result) -> list[Row]:
    rows: list[Row] = []
    for pair in result.advantage_paired:
        section, note = ("", "") if rows else ("Paired", "of mean square, shards as clusters")
        difference = f"{with_error(pair.difference, pair.se)} nats² a token"
        rows.append((section, f"{pair.mode} - {pair.against}", difference, note))
    return rows


def _beta(result: Result) -> RenderableType:
    beta, unused = result.beta, "" if result.settings.mode == "regression" else " (not in use)"
    table = beta_values(f"Beta version {number(beta.version)}{unused}", beta)
    return Group(below(table), *map(Prose, fit_lines(beta)))


def beta_values(title: str, beta: Beta) -> FittedTable:
    """Return the coefficients by feature; n/a without a fit."""
    columns = [
        Column(title, prefers=24, least=12), Column("nats per unit\nof the feature", right=True),
        Column("reads", rank=Rank.SECONDARY),
    ]  # fmt: skip
    known = zip(beta.features, beta.values or [None] * len(beta.features), strict=True)
    return FittedTable(columns, [(f"  {name}", number(value), _reads(name)) for name, value in known])


def _reads(name: str) -> str:
    """Return what a column reads beside the model's weights; empty for an unknown one."""
    column = COLUMNS.get(name)
    if column is None:
        return ""
    return "prefix, records of the fit" if column.source == "fit" else column.reads


def fit_lines(beta: Beta) -> list[str]:
    """Return the quality of a fit, and the data behind it."""
    quality = f"R² {number(beta.r2, 3)}, condition number {number(beta.condition_number, 2)}"
    quality += " (ILL-CONDITIONED)" if ill_conditioned(beta) else ""
    quality += f", fallback {beta.fallback}" if beta.fallback else ""
    source = f"fitted on {count(beta.tokens, 'token')} of {count(beta.sequences, 'response')}"
    return [quality, f"{source}, {through(beta.round)}; ridge_lambda {number(beta.ridge_lambda, 1)}"]


def through(number_of_round: int) -> str:
    """Return the last round inside, as people count: from 1."""
    return "before any round" if number_of_round < 0 else f"through round {number_of_round + 1}"


def _parity(result: Result) -> list[Row]:
    parity = result.parity
    return [
        ("Parity", "mean gap", f"{number(parity.mean_gap, 2)} nats", "of log q, when sampled and when scored"),
        ("", "99 % of gaps below", f"{number(parity.p99_gap, 2)} nats", ""),
        ("", "largest gap", f"{number(parity.max_gap, 2)} nats", ""),
        ("", "outside nucleus", percent(parity.outside_nucleus, 1), "of tokens, when scored again"),
    ]


def _counts(result: Result) -> list[Row]:
    counts = result.counts
    short, cut = (
        f"{number(part)} ({percent(part, counts.sequences)})" for part in (counts.eos_only, counts.truncated)
    )
    rows = [
        ("Counts", "tokens", number(counts.tokens), "in responses"),
        ("", "eos_only", short, "ended at the first token"),
        ("", "truncated", cut, "cut at the cap"),
        ("", "shards", number(counts.shards), ""),
        ("", "shards retried", number(counts.shards_retried), ""),
        ("", "actors", number(counts.actors), ""),
    ]
    again = [("", "regenerated", number(counts.regenerated), "shards")] if counts.regenerated else []
    return [*rows, *again]


def _timing(result: Result) -> list[Row]:
    timing, summed = result.timing, "summed over actors"
    phases = (
        ("generate", timing.generate_s, summed), ("teacher force", timing.teacher_force_s, summed),
        ("backward", timing.backward_s, summed), ("wait", timing.wait_s, summed), ("fit", timing.fit_s, ""),
    )  # fmt: skip
    return [
        ("Time", "all rounds", f"{number(timing.seconds)} s", ""),
        ("", "speed", f"{number(timing.tokens_per_second)} tokens/s", ""),
        *(("", name, f"{number(seconds, 3)} s", note) for name, seconds, note in phases),
    ]
