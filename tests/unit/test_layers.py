"""Heavy imports stay out of light layers, seen in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

import ray_probe

PACKAGE = Path(ray_probe.__file__).parent
CORE = sorted(f"ray_probe.core.{path.stem}" for path in (PACKAGE / "core").glob("*.py") if path.stem != "__init__")
NUMPY_ONLY = [
    f"ray_probe.core.{name}" for name in ("records", "ridge", "baselines", "variance", "parity", "record_checks")
]
FITTER = [
    "ray_probe.fitter",
    "ray_probe.fitter_host",
    "ray_probe.cluster.supervision",
    "ray_probe.cluster.patience",
    "ray_probe.ledger",
    "ray_probe.plan",
    "ray_probe.progress",
    "ray_probe.cluster.schedule",
]


def imported_with(modules: list[str]) -> set[str]:
    code = f"import sys, {', '.join(modules)}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("modules", "refused"),
    [
        pytest.param(CORE, {"ray", "fastapi", "transformers", "pydantic", "yaml", "rich"}, id="core"),
        pytest.param(NUMPY_ONLY + FITTER, {"torch", "ray", "transformers", "pydantic"}, id="records, ridge and fitter"),
        pytest.param(["ray_probe.gradient_store"], {"torch", "ray", "transformers", "pydantic"}, id="the writer"),
        pytest.param(["ray_probe.in_process"], {"torch", "ray", "transformers", "matplotlib"}, id="a run without Ray"),
        pytest.param(["ray_probe.cluster.actors"], {"torch", "transformers"}, id="the fitter's process"),
        pytest.param(
            ["ray_probe.offline_entropy_probe"], {"torch", "ray", "transformers", "matplotlib"}, id="the run itself"
        ),
        pytest.param(
            ["ray_probe.cluster.workers", "ray_probe.service.controller"], {"torch", "transformers", "matplotlib"},
            id="the controller's process",
        ),
        pytest.param(
            ["ray_probe.cli", "ray_probe.service.client", "ray_probe.cluster.controller_actor",
             "ray_probe.cluster.connection"], {"torch", "transformers", "matplotlib"}, id="who asks",
        ),
        pytest.param(["ray_probe.cli"], {"torch", "ray", "transformers"}, id="the command line's help"),
        pytest.param(["ray_probe.runner"], {"matplotlib.pyplot"}, id="no global state of plots"),
    ],
)  # fmt: skip
def test_a_light_layer_imports_nothing_heavy(modules: list[str], refused: set[str]) -> None:
    assert imported_with(modules) & refused == set()


def test_core_is_all_there() -> None:
    assert len(CORE) >= 8
