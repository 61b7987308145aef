"""A result as CSV with every digit, and as Markdown with significant digits."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ray_probe.core.estimator.modes import MODES
from ray_probe.report.caveats import caveats
from ray_probe.report.number_format import number, with_error
from ray_probe.report.result_table import heading_lines
from ray_probe.report.table_parts import norm_debiased
from ray_probe.report.verdict import verdict
from ray_probe.run.comparison.change import Change
from ray_probe.run.result import Entropy, Estimate, Gradient, Result

Value = str | int | float | None

NATS, SQUARE = "nats", "nats^2 a token"
SETTINGS = (
    "model.path", "model.adapter", "model.trainable", "model.dtype", "generation.temperature", "generation.top_p",
    "generation.max_new_tokens", "estimator.x_estimator_mode", "estimator.baseline.mode", "estimator.baseline.fit",
)  # fmt: skip


class Figure(NamedTuple):
    """A figure under its name in result.json; the error is None where unknown."""

    name: str
    value: float | None
    error: float | None
    unit: str


def result_csv(result: Result) -> str:
    """Return one line a figure with name, value, error and unit, settings first."""
    settings = vars(result.settings)
    rows = ((f"config.{name}", settings[name.rpartition(".")[2]], None, "") for name in SETTINGS)
    return csv_text(("name", "value", "se", "unit"), (*rows, *figures_of(result)))


def result_markdown(result: Result) -> str:
    """Return heading, verdict, a table of all figures, and the caveats."""
    title, *rest = heading_lines(result)
    judged = verdict(result)
    todo = [] if judged.advice is None else [f"To do: {judged.advice}"]
    lines = [f"### {markdown_cell(title)}", *map(markdown_cell, rest), markdown_cell(judged.text), *todo]
    rows = (
        (f"`{markdown_cell(name)}`", number(value) if error is None else with_error(value, error), unit)
        for name, value, error, unit in figures_of(result)
    )
    wrong = "".join(f"- {line}\n" for line in caveats(result))
    table = markdown_table(("figure", "value", "unit"), rows)
    return "\n\n".join(lines) + f"\n\n{table}" + (f"\n{wrong}" if wrong else "")


def figures_of(result: Result) -> Iterator[Figure]:
    """Yield every figure of a result, in the order of result.json."""
    for mode, square in result.advantage_mean_square.items():
        yield Figure(f"advantage_mean_square.{mode}", square, result.advantage_mean_square_se.get(mode), SQUARE)
    for mode, variance in result.advantage_variance.items():
        yield Figure(f"advantage_variance.{mode}", variance, None, SQUARE)
    for mode in MODES:
        if mode in result.advantage_mean_square_ratio:
            ratio = result.advantage_mean_square_ratio[mode] or Estimate()
            yield Figure(f"advantage_mean_square_ratio.{mode}", ratio.value, ratio.se, "")
    for pair in result.advantage_paired:
        yield Figure(f"advantage_paired.{pair.mode}-{pair.against}", pair.difference, pair.se, SQUARE)
    beta = result.beta
    for feature, coefficient in zip(beta.features, beta.values or (), strict=False):
        yield Figure(f"beta.{feature}", coefficient, None, f"nats per unit of {feature}")
    yield Figure("beta.r2", beta.r2, None, "")
    yield Figure("beta.condition_number", beta.condition_number, None, "")
    yield from change_figures(result.change)
    entropy = result.entropy
    yield Figure("entropy.per_sequence", entropy.per_sequence, entropy.per_sequence_se, NATS)
    yield Figure("entropy.per_token", entropy.per_token, entropy.per_token_se, NATS)
    for name, value in gradient_figures(result.gradient).items():
        yield Figure(name, value, None, "")
    for key, gap in vars(result.parity).items():
        yield Figure(f"parity.{key}", gap, None, NATS if key.endswith("_gap") else "share")
    for key, amount in vars(result.counts).items():
        yield Figure(f"counts.{key}", amount, None, "")
    for key, seconds in vars(result.timing).items():
        yield Figure(f"timing.{key}", seconds, None, "tokens/s" if key == "tokens_per_second" else "s")
    yield Figure("partial", len(result.partial or ()), None, "shards")
    yield Figure("conflicts", len(result.conflicts), None, "shards")


def change_figures(change: Change | None) -> Iterator[Figure]:
    """Yield the figures of a comparison; none for a gradient."""
    if change is None:
        return
    for name in ("total", "pathwise", "visitation", "entropy_a", "entropy_b"):
        found = getattr(change, name)
        yield Figure(f"change.{name}", found.value, found.se, NATS)
    for name, unit in (("per_token", NATS), ("length", "tokens")):
        for side, found in vars(getattr(change, name)).items():
            yield Figure(f"change.{name}.{side}", found.value, found.se, unit)
    for name in ("js", "effective_sample_share", "moved_share"):
        yield Figure(f"change.{name}", getattr(change, name), None, NATS if name == "js" else "share")
    for part in change.parts:
        yield Figure(f"change.parts.{part.group}", part.value, part.se, NATS)
    if change.parts:
        yield Figure("change.remainder", change.remainder.value, change.remainder.se, NATS)
    for name in ("positions", "token_entropy"):
        for part in getattr(change, name):
            yield Figure(f"change.{name}.{part.first:g}-{part.last:g}", part.value, part.se, NATS)


def entropy_figures(entropy: Entropy) -> dict[str, float | None]:
    """Return the figures of the entropy by name, without intervals."""
    return {f"entropy.{key}": value for key, value in vars(entropy).items() if not key.endswith("_interval")}


def gradient_figures(gradient: Gradient) -> dict[str, float | None]:
    """Return the figures of the gradient by name, the one to use first."""
    found = vars(gradient).items()
    others = {f"gradient.{key}": value for key, value in found if key not in ("norm_debiased", "why_null")}
    return {"gradient.norm_debiased": norm_debiased(gradient), **others}


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Value]]) -> str:
    """Return rows as CSV: numbers keep every digit, None is empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return stream.getvalue()


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows as a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown_cell(value: Value) -> str:
    """Return a value as the text of a cell; None is empty."""
    text = "" if value is None else value if isinstance(value, str) else number(value)
    return " ".join(text.replace("|", "\\|").split())
