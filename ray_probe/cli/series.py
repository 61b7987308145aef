"""The series of checkpoints that `results --series` shows."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ray_probe.cli.output import Answer
from ray_probe.errors import ConfigError, OutputError, bad_value

if TYPE_CHECKING:
    from ray_probe.run.series import Series

PLOT_SUFFIXES = (".png", ".pdf", ".svg")


def directories_of(places: Sequence[str]) -> list[Path] | None:
    """Return the directories that places name; None where they are names of series.

    Raises:
        ConfigError: some are directories and others are not.
    """
    from ray_probe.cli.finished import run_directory

    found = [run_directory(place) for place in places]
    there = [path for path in found if path is not None]
    if not there:
        return None
    if len(there) < len(found):
        other = next(place for place, path in zip(places, found, strict=True) if path is None)
        raise ConfigError(bad_value("RUN_DIR", other, "there is no such directory; give directories alone, or names"))
    return there


def series_in(directories: Sequence[Path]) -> "tuple[Series, ...]":
    """Return the series of run directories.

    A directory may also hold runs, as that of a service or of a chain does.
    """
    from ray_probe.run.comparison.series_builder import series_of_runs

    return series_of_runs(directories)


def named(found: "Sequence[Series]", names: Sequence[str]) -> "tuple[Series, ...]":
    """Return the series of these names; all without a name.

    Raises:
        ConfigError: there is no series of a name; lists those that are there.
    """
    by_name = {one.name: one for one in found}
    for name in names:
        if name not in by_name:
            there = ", ".join(by_name) or "none yet; probe CHECKPOINT --series NAME begins one"
            raise ConfigError(bad_value("NAME", name, f"no such series; there are {there}"))
    return tuple(by_name[name] for name in names) if names else tuple(found)


def series_answer(found: "Sequence[Series]", form: str, plot: Path | None) -> Answer:
    """Return the answer of a command that shows series; writes the plot first.

    Args:
        found: the series.
        form: table, json, csv or md.
        plot: file to write a plot to, or None.

    Raises:
        ConfigError: the plot's name has no known ending.
        OutputError: it cannot be written.
    """
    if plot is not None:
        _write_plot(found, plot)
    lines = () if plot is None or form in ("csv", "md") else (f"plot: {plot}",)
    value = [one.to_json() for one in found]
    if form in ("csv", "md"):
        from ray_probe.report.series import export

        text = export.series_csv(found) if form == "csv" else export.series_markdown(found)
        return Answer(value, lambda: text.removesuffix("\n"))
    from ray_probe.report.series.table import series_tables

    return Answer(value, lambda: series_tables(found), last_lines=lines)


def _write_plot(found: "Sequence[Series]", path: Path) -> None:
    if path.suffix not in PLOT_SUFFIXES:
        raise ConfigError(bad_value("--plot", str(path), f"need a file that ends with {', '.join(PLOT_SUFFIXES)}"))
    from ray_probe.report.series.plot import series_figure  # imports matplotlib

    try:
        series_figure(found).savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(f"--plot: {path}: cannot be written ({error.strerror})") from None
