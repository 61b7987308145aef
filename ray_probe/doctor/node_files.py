"""Check files that every node needs: checkpoint, cache, run directory."""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ray_probe.checkpoints.files import ADAPTER_FILES, CHECKPOINT_FILES, matching_files
from ray_probe.checkpoints.memory_forecast import size
from ray_probe.cluster.connection.shared_directory import check_shared
from ray_probe.doctor.checks import Case, Finding
from ray_probe.doctor.files import nearest
from ray_probe.doctor.nodes import ask, count, nodes_with_room, problems
from ray_probe.errors import CheckpointError, ConfigError, OutputError, bad_value, some


def node_checkpoint(case: Case) -> Finding:
    """Check that nodes with room for an actor have the checkpoint's files, and A's."""
    nodes = nodes_with_room(case)
    keys = (("model.path", "model.adapter"), ("compare.against", "compare.adapter"))
    places: list[tuple[str, Path | None, Sequence[str]]] = []
    for (path, adapter), found in zip(keys, case.policies, strict=False):
        places += [(path, found.directory, CHECKPOINT_FILES), (adapter, found.adapter, ADAPTER_FILES)]
    for field, place, patterns in places:
        if place is None:
            continue
        here = files_in(str(place), patterns)
        if wrong := problems(ask(nodes, files_in, str(place), patterns), partial(_difference, here)):
            remedy = "put it on storage that all nodes share, or copy it to the same path on each"
            raise CheckpointError(bad_value(field, str(place), f"{some(wrong)}; {remedy}"))
    return Finding(f"the same files on {count(nodes)} that can hold an actor")


def model_cache(case: Case) -> Finding:
    """Check that model.cache_dir has room on nodes that can hold an actor."""
    cache, directories = str(case.run.model.cache_dir), {str(found.directory) for found in case.policies}
    needed = sum(sum((files_in(one, CHECKPOINT_FILES) or {}).values()) for one in directories)
    nodes = nodes_with_room(case)

    def problem(free: int | None) -> str | None:
        if free is None:
            return "cannot write it"
        return f"has {size(free)} free" if free < needed else None

    if wrong := problems(ask(nodes, cache_room, cache), problem):
        remedy = f"need a directory of each node's own with room for {size(needed)}"
        raise OutputError(bad_value("model.cache_dir", cache, f"{some(wrong)}; {remedy}"))
    return Finding(f"{cache} has room for {size(needed)} on {count(nodes)}")


def shared_directory(case: Case) -> Finding:
    """Check that every node reads what this machine writes to output.dir."""
    directory = Path(case.run.output.dir).resolve()
    if blind := check_shared(directory, case.nodes):
        names = some(node.name for node in blind)
        remedy = "choose a directory on storage that all nodes share"
        raise ConfigError(bad_value("output.dir", str(directory), f"it cannot be read on node {names}; {remedy}"))
    return Finding(f"{directory} is read on {count(case.nodes)}")


def files_in(directory: str, patterns: Sequence[str]) -> dict[str, int] | None:
    """Return the sizes of matching files in bytes, by name; None without a directory."""
    try:
        files = matching_files(Path(directory), patterns)
        return {file.name: file.stat().st_size for file in files} if Path(directory).is_dir() else None
    except OSError:
        return None


def cache_room(directory: str) -> int | None:
    """Return the bytes free for a directory that may not exist; None if not writable."""
    there = nearest(Path(directory))
    return shutil.disk_usage(there).free if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else None


def _difference(here: dict[str, int] | None, there: dict[str, int] | None) -> str | None:
    if there == here:
        return None
    if there is None:
        return "does not have it"
    names = sorted(name for name, size in (here or {}).items() if there.get(name) != size) or sorted(there)
    return f"has {len(there)} files, and {names[0]} is not as it is here"
