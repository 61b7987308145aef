"""The contracts of `ray_private` hold for the oldest and the newest supported Ray.

Each Ray has a virtual environment of its own, kept from run to run in the user's cache directory. `test_ray_private`
needs Ray, psutil and pytest there, and of this package only modules without further libraries.
"""

import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ray_probe.system.files import held

pytestmark = [pytest.mark.cluster, pytest.mark.own_cluster, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ray_probe-test-venvs"
DECLARED = next(
    requirement
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    if (requirement := Requirement(line)).name == "ray"
)
OLDEST = next(one.version for one in DECLARED.specifier if one.operator == ">=")
INSTALL_S = 600.0
CONTRACTS_S = 240.0


@pytest.mark.parametrize("wanted", [f"ray=={OLDEST}", str(DECLARED)], ids=["oldest", "newest"])
def test_the_contracts_hold_for_this_ray(wanted: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    name = f"py{sys.version_info.major}.{sys.version_info.minor}-{request.node.callspec.id}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with held(CACHE / f"{name}.lock", INSTALL_S):
        python = _python_with(wanted, CACHE / name)
        version = _done([python, "-c", "import ray; print(ray.__version__)"], 60.0).stdout.strip()
        assert DECLARED.specifier.contains(version) and Requirement(wanted).specifier.contains(version)
        contracts = [ROOT / "tests" / "integration" / "test_ray_private.py"]
        options = ["--noconftest", "--basetemp", tmp_path / "t", *contracts]  # conftest.py brings torch along
        done = _done([python, "-m", "pytest", *options], CONTRACTS_S, {"PYTHONPATH": str(ROOT)})
    summary = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0 and "passed" in summary and "skipped" not in summary, f"Ray {version}:\n{done.stdout}"


def _python_with(wanted: str, place: Path) -> Path:
    """The Python of a virtual environment with this Ray; skips where the package index has no such version."""
    python = place / "bin" / "python"
    if not python.exists():
        made = _done([sys.executable, "-m", "venv", place], 120.0)
        assert made.returncode == 0, made.stderr
    installed = _done([python, "-m", "pip", "install", "--upgrade", wanted, "psutil", "pytest"], INSTALL_S)
    if f"No matching distribution found for {wanted}" in installed.stderr:
        pytest.skip(f"the package index has no {wanted} for this Python")
    assert installed.returncode == 0, installed.stderr
    return python


def _done(
    command: Sequence[object], seconds: float, variables: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTEST_", "PYTHON"))}
    return subprocess.run(
        [str(part) for part in command], env=plain | (variables or {}), cwd=ROOT, timeout=seconds,
        capture_output=True, text=True,
    )  # fmt: skip
