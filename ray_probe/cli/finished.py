"""Reads a finished run from its directory."""

import os
from pathlib import Path

from ray_probe.errors import ConfigError, bad_value
from ray_probe.run.directory import RESULT, RunDirectory

FIELD = "RUN_DIR"
MOST_NAMED = 8


def run_directory(text: str) -> Path | None:
    """Return the directory that a text names; None where it can only be an id.

    Raises:
        ConfigError: it is a path, and no directory is there.
    """
    path = Path(text)
    if path.is_dir():
        return path
    if path.exists() or os.sep in text:
        raise ConfigError(bad_value(FIELD, text, "there is no such directory; give that of a run"))
    return None


def result_json(path: Path) -> dict[str, object]:
    """Return the object of result.json in a run directory, as any version wrote it.

    Raises:
        ConfigError: it is missing or damaged; says what to do.
    """
    directory = RunDirectory(path, FIELD)
    result = directory.result_json()
    if result is None:
        raise ConfigError(bad_value(FIELD, str(path), _why_none(directory)))
    if not isinstance(result, dict) or "counts" not in result:
        raise ConfigError(bad_value(FIELD, str(path), f"{RESULT} holds no result; restore it"))
    return result


def _why_none(directory: RunDirectory) -> str:
    path = directory.path
    if directory.config.exists():
        rounds = len(directory.finished_rounds())
        return f"it has no {RESULT} yet, and {rounds} finished rounds; run --resume {path} continues it"
    inside = sorted(found.parent.name for found in path.glob(f"*/{RESULT}"))
    if inside:
        more = ", ..." if len(inside) > MOST_NAMED else ""
        return f"no run, but it holds some; give one: {', '.join(inside[:MOST_NAMED])}{more}"
    return f"need the directory of a run, with {RESULT} in it"
