"""Versions and devices that a result's bits depend on."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from ray_probe import __version__
from ray_probe.errors import ClusterError

PACKAGES = ("torch", "transformers", "tokenizers", "ray", "numpy")


def package_versions() -> dict[str, str]:
    """Returns versions by package name."""
    # Our own comes from the code, because a checkout need not be installed.
    return {"ray-probe": __version__} | {name: version(name) for name in PACKAGES}


def how_to_install(extra: str) -> str:
    """Returns the command that installs an extra; it names the working copy."""
    return f"in the working copy of ray_probe: pip install -e '.[{extra}]'"


def check_versions(driver: Mapping[str, str]) -> None:
    """Raises ClusterError for packages whose version is not the driver's."""
    here = package_versions()
    other = [f"{name} {here[name]} instead of {driver[name]}" for name in driver if here.get(name) != driver[name]]
    if other:
        raise ClusterError(f"cluster: node {platform.node()} has {', '.join(other)}; install the same on every node")


def cpu_model() -> str:
    """Returns the kernel's name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def made_on(device: str, threads: int) -> str:
    """Returns what a record was computed on.

    Two records of a shard have the same bytes if these are equal and begin with `cpu`.

    Args:
        device: `cpu` or `cuda`.
        threads: torch threads.
    """
    if device != "cpu":
        return device
    return f"cpu {cpu_model()}, {threads} threads, torch {version('torch')}"
