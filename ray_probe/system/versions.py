"""What fixes a result's bits beside its inputs: the packages and what they compute on."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from ray_probe import __version__
from ray_probe.errors import ClusterError

PACKAGES = ("torch", "transformers", "tokenizers", "ray", "numpy")


def package_versions() -> dict[str, str]:
    """Versions by package name; ours from the code that runs, because a checkout need not be installed."""
    return {"ray-probe": __version__} | {name: version(name) for name in PACKAGES}


def how_to_install(extra: str) -> str:
    """The command that adds an optional part; ray_probe is on no package index, so it names the working copy."""
    return f"in the working copy of ray_probe: pip install -e '.[{extra}]'"


def check_versions(driver: Mapping[str, str]) -> None:
    """Refuse a node whose packages are not the driver's. Raises ClusterError naming both versions."""
    here = package_versions()
    other = [f"{name} {here[name]} instead of {driver[name]}" for name in driver if here.get(name) != driver[name]]
    if other:
        raise ClusterError(f"cluster: node {platform.node()} has {', '.join(other)}; install the same on every node")


def cpu_model() -> str:
    """The kind of CPU, as the kernel names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def made_on(device: str, threads: int) -> str:
    """What a record was computed on: where two are equal and begin with `cpu`, so are the bytes of the same shard.

    Args:
        device: `cpu` or `cuda`.
        threads: torch threads.
    """
    if device != "cpu":
        return device
    return f"cpu {cpu_model()}, {threads} threads, torch {version('torch')}"
