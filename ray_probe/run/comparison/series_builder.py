"""Builds a series of checkpoints from ended measurements."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path

from ray_probe.config.loading import load_config
from ray_probe.errors import ConfigError, bad_value
from ray_probe.run.comparison.change import Figure
from ray_probe.run.comparison.measured import CheckpointKey, Measured, read_measured
from ray_probe.run.comparison.path_sums import PathSums
from ray_probe.run.directory import MANIFEST, RunDirectory
from ray_probe.run.series import Series, SeriesChange, SeriesPoint


class _Source(IntEnum):
    """Where a checkpoint's figures come from, the best first."""

    GRADIENT = 0
    AS_B = 1
    AS_A = 2


@dataclass
class _Checkpoint:
    """A checkpoint of a series and the measurements of it, in the order of submission."""

    key: CheckpointKey
    found: list[tuple[_Source, SeriesPoint, Measured]] = field(default_factory=list)

    @property
    def step(self) -> int | None:
        """The step that the newest measurement of this checkpoint itself gives."""
        known = [one.step for source, _, one in self.found if source != _Source.AS_A and one.step is not None]
        return known[-1] if known else None

    def point(self) -> SeriesPoint:
        """Return the figures of the best measurement; of equals, the newest."""
        ordered = sorted(reversed(self.found), key=lambda one: one[0])
        best = ordered[0][1]
        with_length = [point.length for _, point, _ in ordered if point.length.se is not None]
        tags: dict[str, str] = {}
        for source, _, one in self.found:
            tags |= {} if source == _Source.AS_A else one.tags
        return replace(
            best, step=self.step, tags=tags, measurements=tuple(one.name for _, _, one in self.found),
            length=with_length[0] if with_length else best.length,
        )  # fmt: skip


def build_series(name: str, measured: Sequence[Measured], still_open: int = 0, failed: int = 0) -> Series:
    """Return the series of ended measurements.

    Args:
        name: of the series.
        measured: its ended measurements with a result, in the order of submission.
        still_open: its measurements that are queued or running.
        failed: its measurements that failed or were cancelled.
    """
    pairs = _with_a(measured)
    checkpoints = _in_order(_by_checkpoint(pairs), pairs)
    return Series(
        name, tuple(one.point() for one in checkpoints), tuple(_changes(checkpoints, pairs)), still_open, failed
    )


_Pairs = Sequence[tuple[Measured, CheckpointKey | None]]


def _with_a(measured: Sequence[Measured]) -> _Pairs:
    """Return each measurement with its checkpoint A as the series knows it.

    That is the checkpoint of the same place and content, else of the same content elsewhere: a copy, say.
    """
    own = {one.checkpoint for one in measured}
    by_content = {key.content: key for key in own}

    def known(key: CheckpointKey | None) -> CheckpointKey | None:
        return key if key is None or key in own else by_content.get(key.content, key)

    return [(one, known(one.against)) for one in measured]


def _by_checkpoint(pairs: _Pairs) -> Iterable[_Checkpoint]:
    """Return the checkpoints in the order of submission, A of a comparison before B."""
    found: dict[CheckpointKey, _Checkpoint] = {}
    for one, key_a in pairs:
        if key_a is not None and one.point_a is not None:
            found.setdefault(key_a, _Checkpoint(key_a)).found.append((_Source.AS_A, one.point_a, one))
        source = _Source.GRADIENT if key_a is None else _Source.AS_B
        found.setdefault(one.checkpoint, _Checkpoint(one.checkpoint)).found.append((source, one.point, one))
    return found.values()


def _in_order(checkpoints: Iterable[_Checkpoint], pairs: _Pairs) -> list[_Checkpoint]:
    """Sort by step.

    One without a step comes right before the first checkpoint with a step that it was compared with, else it stays
    after the checkpoint that was submitted before it.
    """
    next_steps: dict[CheckpointKey, int] = {}
    for one, key_a in pairs:
        if key_a is not None and one.step is not None:
            next_steps[key_a] = min(one.step, next_steps.get(key_a, one.step))
    placed, last = [], -1
    for found in checkpoints:
        before = found.step is None and found.key in next_steps
        last = next_steps[found.key] if before else last if found.step is None else found.step
        placed.append(((last, not before), found))
    return [found for _, found in sorted(placed, key=lambda pair: pair[0])]


def _changes(checkpoints: Sequence[_Checkpoint], pairs: _Pairs) -> Iterable[SeriesChange]:
    """Yield the newest comparison of each two checkpoints, with steps and sum."""
    place = {one.key: number for number, one in enumerate(checkpoints)}
    newest = {(place[one.checkpoint], place[key_a]): one for one, key_a in pairs if key_a is not None}
    paths: dict[int, tuple[PathSums, Measured]] = {}
    for (b, a), one in sorted(newest.items(), key=lambda item: item[0]):
        assert one.change is not None, "a comparison has a change"
        path = _path(one, a, paths.get(a)) if a < b else None
        if path is not None:
            paths.setdefault(b, (path, one))
        since = Figure() if path is None else path.since
        yield replace(one.change, first_step=checkpoints[a].step, last_step=checkpoints[b].step, since_first=since)


def _path(one: Measured, a: int, before: tuple[PathSums, Measured] | None) -> PathSums | None:
    """Return the sums from the first checkpoint through a comparison.

    None where no comparisons lead from the first checkpoint to A, or where those have other prompts or sampling.

    Args:
        one: the comparison.
        a: place of A; 0: the first checkpoint.
        before: sums from the first checkpoint to A with their last comparison, if there are any.
    """
    if a == 0:
        return PathSums.over([one.rounds])
    if before is None or before[1].conditions != one.conditions:
        return None
    return before[0].then(one.rounds)


def series_of_runs(directories: Sequence[Path]) -> tuple[Series, ...]:
    """Return the series of runs, by name.

    A run without `series.name` belongs to the series of the directory that holds it. A run that has not ended counts
    as open, with what it has so far left out.

    Args:
        directories: of runs, or of directories that hold runs, as those of a service and of a chain.

    Raises:
        ConfigError: a directory is no run and holds none, or a file of a run is missing or damaged.
    """
    measured: dict[str, list[Measured]] = {}
    still_open: dict[str, int] = {}
    for path in dict.fromkeys(run for directory in directories for run in _runs(directory)):
        directory = RunDirectory(path, "RUN_DIR")
        result = directory.result()
        if result is None or result.stopped_by is None:
            place = load_config(directory.config).series
            name = place.name or path.parent.name
            still_open[name] = still_open.get(name, 0) + 1
            continue
        one = read_measured(directory, path.name)
        measured.setdefault(one.series or path.parent.name, []).append(one)
    names = sorted({*measured, *still_open})
    return tuple(build_series(name, measured.get(name, ()), still_open.get(name, 0)) for name in names)


def _runs(directory: Path) -> list[Path]:
    """Return a run's directory, or those of the runs inside, numbers in order."""
    path = directory.resolve()
    if (path / MANIFEST).is_file():
        return [path]
    found = [inside.parent for inside in path.glob(f"[!.]*/{MANIFEST}")]
    if not found:
        raise ConfigError(bad_value("RUN_DIR", str(directory), "it is no run directory and holds none"))
    return sorted(found, key=lambda run: [int(part) if part.isdigit() else 0 for part in re.split(r"(\d+)", run.name)])
