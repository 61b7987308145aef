"""Results for other programs and for notes: CSV with every digit, Markdown with the digits that mean something."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ray_probe.report.caveats import Result, caveats
from ray_probe.report.number_format import number, with_error
from ray_probe.report.result_table import heading_lines
from ray_probe.report.table_parts import MODES, norm_debiased
from ray_probe.report.verdict import verdict

NATS, SQUARE = "nats", "nats^2 a token"
SETTINGS = (
    "model.path", "model.adapter", "model.trainable", "model.dtype", "generation.temperature", "generation.top_p",
    "generation.max_new_tokens", "estimator.x_estimator_mode", "estimator.baseline.mode", "estimator.baseline.fit",
)  # fmt: skip
_LISTED = ("id", "state", "checkpoint", "adapter", "rounds", "sequences")
_ENTROPY = ("per_sequence", "per_sequence_se", "per_token", "per_token_se")
_GRADIENT = ("norm_debiased", "norm_raw", "norm_sq_debiased", "trace_cov", "snr")
_ENDED = ("submitted", "started", "finished", "exit_code", "cause", "directory")


class Figure(NamedTuple):
    """A figure under its name in result.json; the error is None where there is none or it is not known."""

    name: str
    value: Any
    error: float | None
    unit: str


def result_csv(result: Result) -> str:
    """A line a figure: name, value, standard error, unit; the settings that make it what it is come first."""
    settings = ((f"config.{name}", _at(result.get("config", {}), name), None, "") for name in SETTINGS)
    return _csv(("name", "value", "se", "unit"), (*settings, *figures_of(result)))


def result_markdown(result: Result) -> str:
    """Heading, verdict, a table of all figures, and what is wrong."""
    title, *rest = heading_lines(result)
    judged = verdict(result)
    todo = [] if judged.advice is None else [f"To do: {judged.advice}"]
    lines = [f"### {_cell(title)}", *map(_cell, rest), _cell(judged.text), *todo]
    table = _markdown(
        ("figure", "value", "unit"),
        ((f"`{_cell(name)}`", _shown(value, error), unit) for name, value, error, unit in figures_of(result)),
    )
    wrong = "".join(f"- {line}\n" for line in caveats(result))
    return "\n\n".join(lines) + f"\n\n{table}" + (f"\n{wrong}" if wrong else "")


def listing_csv(items: Iterable[Mapping[str, Any]]) -> str:
    """A line a measurement.

    Args:
        items: measurements as a service lists them, as JSON.
    """
    columns = (*_LISTED, *(f"entropy.{key}" for key in _ENTROPY), *(f"gradient.{key}" for key in _GRADIENT), *_ENDED)
    return _csv(columns, map(_listed, items))


def listing_markdown(items: Iterable[Mapping[str, Any]]) -> str:
    """A row a measurement.

    Args:
        items: measurements as a service lists them, as JSON.
    """
    rows = []
    for item in items:
        entropy, gradient = item["entropy"] or {}, item["gradient"] or {}
        per_sequence = with_error(entropy.get("per_sequence"), entropy.get("per_sequence_se"))
        figures = (per_sequence, number(norm_debiased(gradient), 3), number(gradient.get("snr"), 3))
        rows.append((*(_cell(item[key]) for key in _LISTED), *figures))
    return _markdown((*_LISTED, "entropy.per_sequence, nats", "gradient.norm_debiased", "gradient.snr"), rows)


def figures_of(result: Result) -> Iterator[Figure]:
    """Every figure of a result, in the order of result.json."""
    for key in ("advantage_mean_square", "advantage_variance"):
        errors = result.get(f"{key}_se") or {}
        for mode, value in (result.get(key) or {}).items():
            yield Figure(f"{key}.{mode}", value, errors.get(mode), SQUARE)
    ratios = result.get("advantage_mean_square_ratio") or {}
    for mode in (mode for mode in MODES if mode in ratios):
        ratio = ratios[mode] or {}
        yield Figure(f"advantage_mean_square_ratio.{mode}", ratio.get("value"), ratio.get("se"), "")
    for pair in result.get("advantage_paired") or []:
        name = f"advantage_paired.{pair['mode']}-{pair['against']}"
        yield Figure(name, pair.get("difference"), pair.get("se"), SQUARE)
    beta = result.get("beta") or {}
    for feature, value in zip(beta.get("features") or (), beta.get("values") or (), strict=False):
        yield Figure(f"beta.{feature}", value, None, f"nats per unit of {feature}")
    for key in ("r2", "condition_number"):
        yield Figure(f"beta.{key}", beta.get(key), None, "")
    entropy = result.get("entropy") or {}
    for key in ("per_sequence", "per_token"):
        yield Figure(f"entropy.{key}", entropy.get(key), entropy.get(f"{key}_se"), NATS)
    yield from _plain(result)


def _plain(result: Result) -> Iterator[Figure]:
    """Figures without an error."""
    gradient = result.get("gradient") or {}
    known = gradient | {"norm_debiased": norm_debiased(gradient)}
    for key in _GRADIENT:
        yield Figure(f"gradient.{key}", known.get(key), None, "")
    for key, value in (result.get("parity") or {}).items():
        yield Figure(f"parity.{key}", value, None, NATS if key.endswith("_gap") else "share")
    for key, value in (result.get("counts") or {}).items():
        yield Figure(f"counts.{key}", value, None, "")
    for key, value in (result.get("timing") or {}).items():
        yield Figure(f"timing.{key}", value, None, "tokens/s" if key == "tokens_per_second" else "s")
    for key in ("partial", "conflicts"):
        yield Figure(key, len(result.get(key) or ()), None, "shards")


def _listed(item: Mapping[str, Any]) -> Sequence[Any]:
    entropy, gradient = item["entropy"] or {}, item["gradient"] or {}
    known = gradient | {"norm_debiased": norm_debiased(gradient)}
    figures = (*(entropy.get(key) for key in _ENTROPY), *(known.get(key) for key in _GRADIENT))
    return (*(item[key] for key in _LISTED), *figures, *(item[key] for key in _ENDED))


def _at(section: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        section = section.get(key) if isinstance(section, Mapping) else None
    return section


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Numbers keep every digit; what is null is empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return stream.getvalue()


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(value: Any, error: float | None) -> str:
    return number(value) if error is None else with_error(value, error)


def _cell(value: Any) -> str:
    """A value that keeps to its cell."""
    if value is None:
        return ""
    text = number(value) if isinstance(value, int | float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
