"""Check Python and packages against declared ranges and tested versions."""

import sys
import tomllib
from importlib import metadata
from pathlib import Path

import ray_probe
from ray_probe.doctor.checks import Case, Finding
from ray_probe.errors import ProbeError

SHOWN = ("torch", "transformers", "ray", "numpy")


def versions(case: Case) -> Finding:
    """Check Python and the packages against their ranges; names untested versions."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    python, dependencies = version_ranges()
    here = {"python": ".".join(map(str, sys.version_info[:3]))}
    wrong = [] if here["python"] in SpecifierSet(python) else [f"python {here['python']} (need {python})"]
    for needed in map(Requirement, dependencies):
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            here[needed.name] = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"no {needed.name} (need {needed.specifier})")
            continue
        if not needed.specifier.contains(here[needed.name], prereleases=True):
            wrong.append(f"{needed.name} {here[needed.name]} (need {needed.specifier})")
    if wrong:
        raise ProbeError(f"there is {', '.join(wrong)}; install what pyproject.toml asks for")
    pins = tested_versions()
    other = [f"{name} {pin}" for name, pin in pins.items() if name in here and Version(here[name]).public != pin]
    shown = ", ".join(f"{name} {here[name]}" for name in ("python", *SHOWN))
    tested = f", tested with {', '.join(other)}" if other else ", all as tested" if pins else ""
    return Finding(f"ray-probe {ray_probe.__version__}, {shown}{tested}")


def working_copy() -> Path:
    """Return the directory that holds the package: a working copy, or site-packages."""
    return Path(ray_probe.__file__).parents[1]


def version_ranges() -> tuple[str, list[str]]:
    """Return the version ranges of Python and of the dependencies."""
    file = working_copy() / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == "ray-probe":
            return project["requires-python"], project["dependencies"]
    return metadata.metadata("ray-probe")["Requires-Python"], metadata.requires("ray-probe") or []


def tested_versions() -> dict[str, str]:
    """Return the pinned versions of a working copy; empty for an installed package."""
    path = working_copy() / "constraints.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))
