"""Refuses files that Python would import instead of a library.

`session` keeps the working directory off the workers' path. Ray or Python still put directories before all libraries
that the user asks for: the working_dir of a runtime_env or of a submitted job, and a working directory on PYTHONPATH.
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
"""Libraries that an actor imports, even if this process has not."""


def refuse_shadows(runtime_env: Mapping[str, Any]) -> None:
    """Raises ConfigError for a file that is imported instead of a library.

    Args:
        runtime_env: of the actors.
    """
    here = Path.cwd()
    working_dir, instead = runtime_env.get("working_dir"), "instead of the library; rename it, or"
    if isinstance(working_dir, str) and Path(working_dir).is_dir():
        excluded = [str(pattern) for pattern in runtime_env.get("excludes") or ()]
        for file in shadows(Path(working_dir).resolve(), excluded):
            remedy = f"{file}: workers would import it {instead} add it to excludes there"
            raise ConfigError(bad_value("cluster.runtime_env.working_dir", working_dir, remedy))
    job_dir = submitted_working_dir()
    on_path = any(Path(place).resolve() == here for place in sys.path)
    for file in shadows(here) if on_path or job_dir is not None else ():
        if job_dir is not None:
            remedy = f"{file}: workers import it {instead} exclude it from the job"
            raise ConfigError(bad_value("working_dir of the job", job_dir, remedy))
        remedy = f"{file}: Python imports it {instead} take this directory off PYTHONPATH"
        raise ConfigError(bad_value("working directory", str(here), remedy))


def shadows(directory: Path, excluded: Iterable[str] = ()) -> list[str]:
    """Returns the sorted names of files and packages that hide a library.

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
    """Returns whether Python finds the module without this directory."""
    if name in sys.builtin_module_names:
        return False  # Python does not search the path for it
    others = [place for place in sys.path if Path(place).resolve() != directory]
    return PathFinder.find_spec(name, others) is not None
