"""Refuses files that Python would import in the place of a library, in a worker or in this process.

The working directory itself is kept off the workers' path (see `session`). What remains are the directories that Ray or
Python put before all libraries because a user said so: a runtime_env's working_dir, that of a submitted job, and the
working directory where this process's own path has it.
"""

import os
import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from ray_probe.cluster.head.ray_private import submitted_working_dir
from ray_probe.errors import ConfigError, bad_value

LIBRARIES = (
    "accelerate", "filelock", "huggingface_hub", "jinja2", "matplotlib", "numpy", "packaging", "peft", "psutil",
    "pydantic", "ray", "regex", "requests", "rich", "safetensors", "threadpoolctl", "tokenizers", "torch", "tqdm",
    "transformers", "typer", "yaml",
)  # fmt: skip
"""What an actor imports, whether or not this process has."""


def refuse_shadows(runtime_env: Mapping[str, Any]) -> None:
    """Refuse a file with the name of a library in a directory that comes before the libraries.

    Args:
        runtime_env: of the actors.

    Raises:
        ConfigError: there is one; names it, and the remedy.
    """
    here = Path.cwd()
    working_dir = runtime_env.get("working_dir")
    if isinstance(working_dir, str) and Path(working_dir).is_dir():
        excluded = [str(pattern) for pattern in runtime_env.get("excludes") or ()]
        for file in shadows(Path(working_dir).resolve(), excluded):
            remedy = "workers would import it in the place of the library; rename it, or add it to excludes there"
            raise ConfigError(bad_value("cluster.runtime_env.working_dir", working_dir, f"{file}: {remedy}"))
    if submitted_working_dir() is not None:
        for file in shadows(here):
            remedy = "workers import it in the place of the library; rename it, or exclude it from the job"
            raise ConfigError(bad_value("working_dir of the job", submitted_working_dir(), f"{file}: {remedy}"))
    if any(Path(place).resolve() == here for place in sys.path):
        for file in shadows(here):
            remedy = "Python imports it in the place of the library; rename it, or take this directory off PYTHONPATH"
            raise ConfigError(bad_value("working directory", str(here), f"{file}: {remedy}"))


def shadows(directory: Path, excluded: Iterable[str] = ()) -> list[str]:
    """Names of the files and packages in a directory that stand in the way of a library, sorted.

    Args:
        directory: an absolute path.
        excluded: patterns of names that Ray does not upload.
    """
    names = {*LIBRARIES, *(name.partition(".")[0] for name in sys.modules)} - {"ray_probe"}
    found = []
    for entry in os.scandir(directory):
        name = entry.name.removesuffix(".py")
        is_module = name != entry.name if entry.is_file() else Path(entry.path, "__init__.py").is_file()
        skipped = any(fnmatch(entry.name, pattern.strip("/")) for pattern in excluded)
        if is_module and name in names and not skipped and _is_elsewhere(name, directory):
            found.append(entry.name)
    return sorted(found)


def _is_elsewhere(name: str, directory: Path) -> bool:
    """Whether Python would find the module without this directory."""
    if name in sys.builtin_module_names:
        return False  # it is not looked for on the path
    others = [place for place in sys.path if Path(place).resolve() != directory]
    return PathFinder.find_spec(name, others) is not None
