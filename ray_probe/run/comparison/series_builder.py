"""Builds a series of checkpoints from ended measurements."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

from ray_probe.run.comparison.change import Figure
from ray_probe.run.comparison.measured import CheckpointKey, Measured
from ray_probe.run.comparison.path_sums import PathSums
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
    """Return each measurement with the checkpoint A of a comparison, as the series knows it.

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
    """Yield the newest comparison of each two checkpoints, with steps and the sum since the first checkpoint."""
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
