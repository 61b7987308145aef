"""Read what a report shows from run directories and chains of comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ray_probe.config.loading import load_config
from ray_probe.errors import ConfigError, bad_value
from ray_probe.page.report_file import Entry
from ray_probe.run.comparison.chain import Chain, ChainStep, read_chain, step_directories
from ray_probe.run.comparison.change import Change, Figure
from ray_probe.run.comparison.series_builder import series_of_runs
from ray_probe.run.directory import RESULT, RunDirectory
from ray_probe.run.result import Result
from ray_probe.run.series import Series, SeriesChange, SeriesPoint

FIELD, CONFIG = "RUN_DIR", "config.yaml"


@dataclass(frozen=True)
class ReportPart:
    """What directories or a service add to a report.

    Attributes:
        title: of a report of these places alone.
        entries: its measurements.
        series: its series.
    """

    title: str
    entries: Sequence[Entry]
    series: Sequence[Series] = field(default=())


def part_of(directories: Sequence[Path]) -> ReportPart:
    """Return what directories hold: runs, chains, or runs side by side.

    Runs with a `series.name` also form that series, whichever directory holds them.

    Raises:
        ConfigError: one holds no result, or a file of it is damaged.
    """
    entries: list[Entry] = []
    series: list[Series] = []
    runs: list[Path] = []
    for directory in dict.fromkeys(path.resolve() for path in directories):
        if step_directories(directory):
            chain = chain_part(directory, read_chain(directory))
            entries += chain.entries
            series += chain.series
        else:
            found = _runs(directory)
            entries += [_entry(run, run.name) for run in found]
            runs += found
    title = f"Report of {', '.join(path.resolve().name for path in directories)}"
    return ReportPart(title, entries, [*series, *_series(runs)])


def _runs(directory: Path) -> list[Path]:
    """Return a run's directory, or those of the runs inside.

    Raises ConfigError without any.
    """
    if (directory / RESULT).is_file():
        return [directory]
    runs = sorted(path.parent for path in directory.glob(f"*/{RESULT}"))
    if not runs:
        remedy = f"need a run's directory with {RESULT} in it, a chain's, or one that holds some of them"
        raise ConfigError(bad_value(FIELD, str(directory), remedy))
    return runs


def _series(runs: Sequence[Path]) -> list[Series]:
    """Return the series that runs name in their configuration."""
    named = [run for run in runs if (run / CONFIG).is_file() and load_config(run / CONFIG).series.name is not None]
    return list(series_of_runs(named)) if named else []


def chain_part(directory: Path, chain: Chain) -> ReportPart:
    """Return a chain of comparisons as a series, and its steps.

    Raises:
        ConfigError: the result of a step is missing or damaged.
    """
    name = directory.resolve().name
    entries = [_entry(directory / step.run, f"{name}/{step.run}") for step in chain.steps]
    return ReportPart(f"Report of {name}", entries, [chain_series(name, chain, [entry.result for entry in entries])])


def chain_series(name: str, chain: Chain, results: Sequence[Result]) -> Series:
    """Return a chain as a series without steps of a trainer.

    Args:
        name: of the series.
        chain: the sums over steps, of the rounds that all have.
        results: of the steps, in order.
    """
    steps = list(zip(chain.steps, [result.change or Change() for result in results], strict=True))
    first, change = steps[0]
    points = [_point(first, change, "a", chain.entropy_first)]
    points += [_point(step, change, "b", step.entropy) for step, change in steps]
    return Series(name, tuple(points), tuple(_change(step, change) for step, change in steps))


def _point(step: ChainStep, change: Change, side: str, entropy: Figure) -> SeriesPoint:
    """Return the checkpoint on one side of a step."""
    return SeriesPoint(
        checkpoint=getattr(step, side), measurements=(step.run,), responses=step.responses // 2, entropy=entropy,
        per_token=getattr(change.per_token, side), length=getattr(change.length, side),
        truncated=getattr(change.truncated, side),
    )  # fmt: skip


def _change(step: ChainStep, change: Change) -> SeriesChange:
    return SeriesChange(
        first_checkpoint=step.a, last_checkpoint=step.b, measurement=step.run, responses=step.responses,
        total=step.total, pathwise=step.pathwise, visitation=step.visitation, per_token=step.per_token,
        length=change.length.change, since_first=step.since_first, js=change.js,
        effective_sample_share=change.effective_sample_share, parts=change.parts,
    )  # fmt: skip


def _entry(path: Path, name: str) -> Entry:
    """Return the measurement of a run directory. Raises ConfigError without a result."""
    directory = RunDirectory(path, FIELD)
    result = directory.result()
    if result is None:
        rounds = len(directory.finished_rounds())
        remedy = f"it has no {RESULT} yet, and {rounds} finished rounds; run --resume {path} continues it"
        raise ConfigError(bad_value(FIELD, str(path), remedy))
    return Entry(name, result, directory.finished_rounds())
