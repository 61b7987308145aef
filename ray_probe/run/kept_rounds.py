"""The result of the rounds that a run has kept, from its directory alone: for a run whose controller is gone."""

from pathlib import Path

from ray_probe.config.loading import load_config, to_dict
from ray_probe.errors import ConfigError
from ray_probe.run.directory import RunDirectory
from ray_probe.run.result import build_result
from ray_probe.run.totals import merged

RELEASE_S = 0.5
"""Until a controller that was just killed has released its lock."""


def write_kept_result(path: Path) -> None:
    """Write result.json of a run's finished rounds, unless it is there or no round is finished.

    Args:
        path: of the run directory.

    Raises:
        ConfigError: another process drives the run, or files of it are damaged.
        OutputError: the file cannot be written.
    """
    directory = RunDirectory.open(path)
    with directory.held(RELEASE_S):
        lines = directory.finished_rounds()
        if not lines or "gradient_norm_sq" not in lines[-1] or _has_result(directory, len(lines)):
            return
        last, totals = lines[-1], merged(directory.restore(len(lines)))
        config = to_dict(load_config(directory.config))
        result = build_result(config, last["fit"], totals, last["gradient_norm_sq"], last["actors"])
        directory.write_result(result)


def _has_result(directory: RunDirectory, rounds: int) -> bool:
    """Whether result.json is of all of these rounds; one that is damaged is written again."""
    try:
        result = directory.result()
    except ConfigError:
        return False
    return result is not None and bool(result["counts"]["rounds"] == rounds)
