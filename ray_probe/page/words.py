"""Say of a result what the command line says, as plain text for page and report."""

from dataclasses import dataclass

from ray_probe.report.caveats import caveats
from ray_probe.report.result_table import figure_rows, heading_lines
from ray_probe.report.verdict import verdict
from ray_probe.run.result import Result
from ray_probe.system.json_object import JsonObject


@dataclass(frozen=True)
class Words(JsonObject):
    """What a result says in words and rows of figures."""

    title: str = ""
    """What was measured, and of which checkpoint."""
    lines: tuple[str, ...] = ()
    """Weights, sampling policy, size of the run and baseline, one line each."""
    verdict: str = ""
    """What was found, and how sure it is."""
    advice: str | None = None
    """What to do next; null where there is nothing to do, or a caveat says it."""
    caveats: tuple[str, ...] = ()
    """Warnings that are due, worst first."""
    rows: tuple[tuple[str, str, str, str], ...] = ()
    """Every figure: section, name, value with error and unit, note. A section is empty where it goes on."""

    @classmethod
    def of(cls, result: Result) -> "Words":
        """Return the words of a result."""
        title, *lines = heading_lines(result)
        judged = verdict(result)
        rows = tuple((str(group), str(name), str(value), str(note)) for group, name, value, note in figure_rows(result))
        return cls(title, tuple(lines), judged.text, judged.advice, tuple(caveats(result)), rows)
