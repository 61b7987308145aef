"""What a series takes from an ended measurement, read from its run directory once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_probe.core.estimator.change_sums import ROW
from ray_probe.errors import ConfigError, bad_value
from ray_probe.run.comparison.change import Change, Figure
from ray_probe.run.comparison.estimates import PromptRows
from ray_probe.run.comparison.path_sums import Rounds
from ray_probe.run.directory import RunDirectory
from ray_probe.run.manifest import Manifest, ManifestCheckpoint
from ray_probe.run.result import Result
from ray_probe.run.series import SeriesChange, SeriesPoint

TOTAL_COLUMNS = ROW.index("visitation") + 1
"""Columns of a prompt's row that the total change is made of; the others are not kept."""
SAMPLED_ALIKE = ("temperature", "top_p", "max_new_tokens")


@dataclass(frozen=True)
class CheckpointKey:
    """Names a checkpoint by place and content."""

    path: str
    adapter: str | None
    content: tuple[str, str]

    @classmethod
    def of(cls, entry: ManifestCheckpoint) -> "CheckpointKey":
        """Return the key of a checkpoint in a manifest."""
        return cls(entry.path, entry.adapter, (entry.fingerprint, entry.adapter_fingerprint))


@dataclass(frozen=True)
class Measured:
    """An ended measurement with a result, as a series needs it.

    Attributes:
        name: id, or the name of the run directory.
        series: name of the series; empty without one.
        step: of the trainer, or None.
        tags: labels by name.
        checkpoint: the one measured; of a comparison, B.
        point: its figures.
        against: of a comparison, A; None for a gradient.
        point_a: of a comparison, A's figures.
        change: of a comparison, the change without steps and sums.
        rounds: of a comparison, the rows of its prompts by round, `TOTAL_COLUMNS` wide.
        conditions: prompts and sampling; sums over comparisons need the same.
    """

    name: str
    series: str
    step: int | None
    tags: Mapping[str, str]
    checkpoint: CheckpointKey
    point: SeriesPoint
    against: CheckpointKey | None = None
    point_a: SeriesPoint | None = None
    change: SeriesChange | None = None
    rounds: Rounds = ()
    conditions: tuple[Any, ...] = ()


def read_measured(directory: RunDirectory, name: str, place: Mapping[str, Any] | None = None) -> Measured:
    """Return what a series takes from a run directory.

    Args:
        directory: of a run with a result.
        name: of the measurement.
        place: the section `series` of its configuration; None: as in its result.

    Raises:
        ConfigError: it has no result, or a file is missing or damaged.
    """
    manifest, result = directory.manifest(), directory.result()
    if result is None:
        raise ConfigError(bad_value("RUN_DIR", str(directory.path), "it has no result.json yet"))
    section = result.config.get("series", {}) if place is None else place
    own = CheckpointKey.of(manifest.checkpoint)
    found = Measured(
        name, section.get("name") or "", section.get("step"), section.get("tags", {}), own,
        _gradient_point(result, own.path, name), conditions=_conditions(manifest),
    )  # fmt: skip
    if result.change is None or manifest.against is None:
        return found
    other = CheckpointKey.of(manifest.against)
    totals = directory.restore(result.counts.rounds)
    return Measured(
        name, found.series, found.step, found.tags, own, _side(result, result.change, "b", own.path, name),
        other, _side(result, result.change, "a", other.path, name),
        _change(result, result.change, (other.path, own.path), name),
        tuple(PromptRows.of(one.change.rows, TOTAL_COLUMNS) for one in totals if one.change is not None),
        found.conditions,
    )  # fmt: skip


def _conditions(manifest: Manifest) -> tuple[Any, ...]:
    generation, prompts = manifest.settings["generation"], manifest.prompts
    sampled = tuple(generation.get(name) for name in SAMPLED_ALIKE)
    return prompts.sha256, prompts.rendered_sha256, manifest.seed, manifest.eos_token_ids, *sampled


def _gradient_point(result: Result, path: str, name: str) -> SeriesPoint:
    entropy, counts = result.entropy, result.counts
    return SeriesPoint(
        checkpoint=path, measurements=(name,), responses=counts.sequences,
        entropy=Figure(entropy.per_sequence, entropy.per_sequence_se),
        per_token=Figure(entropy.per_token, entropy.per_token_se),
        length=Figure(counts.tokens / counts.sequences if counts.sequences else None),
        truncated=counts.truncated / counts.sequences if counts.sequences else None,
        snr=result.gradient.snr, parity_gap=result.parity.mean_gap,
    )  # fmt: skip


def _side(result: Result, change: Change, side: str, path: str, name: str) -> SeriesPoint:
    """Return the figures of one side of a comparison, with half of the responses."""
    return SeriesPoint(
        checkpoint=path, measurements=(name,), responses=result.counts.sequences // 2,
        entropy=getattr(change, f"entropy_{side}"), per_token=getattr(change.per_token, side),
        length=getattr(change.length, side), truncated=getattr(change.truncated, side),
        parity_gap=result.parity.mean_gap,
    )  # fmt: skip


def _change(result: Result, change: Change, paths: tuple[str, str], name: str) -> SeriesChange:
    return SeriesChange(
        first_checkpoint=paths[0], last_checkpoint=paths[1], measurement=name, responses=result.counts.sequences,
        total=change.total, pathwise=change.pathwise, visitation=change.visitation,
        per_token=change.per_token.change, length=change.length.change, js=change.js,
        effective_sample_share=change.effective_sample_share, parts=change.parts,
    )  # fmt: skip
