"""Heavy imports stay out of light layers, seen in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

import ray_probe

PACKAGE = Path(ray_probe.__file__).parent
CORE = sorted(
    f"ray_probe.core.{path.parent.name}.{path.stem}"
    for path in (PACKAGE / "core").glob("*/*.py")
    if path.stem != "__init__"
)
NUMPY_ONLY = [module for module in CORE if ".estimator." in module and not module.endswith(".loss")]
FITTER = [
    "ray_probe.fitter.fitter",
    "ray_probe.fitter.host",
    "ray_probe.cluster.pool.failure_policy",
    "ray_probe.cluster.pool.clock",
    "ray_probe.fitter.ledger_writer",
    "ray_probe.run.preparation.plan",
    "ray_probe.run.progress",
    "ray_probe.cluster.rounds.schedule",
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
        pytest.param(["ray_probe.gradient.store"], {"torch", "ray", "transformers", "pydantic"}, id="the writer"),
        pytest.param(
            ["ray_probe.controller.local_backend"],
            {"torch", "ray", "transformers", "matplotlib"},
            id="a run without Ray",
        ),
        pytest.param(["ray_probe.cluster.actors.rollout"], {"torch", "transformers"}, id="the fitter's process"),
        pytest.param(
            ["ray_probe.offline_entropy_probe"], {"torch", "ray", "transformers", "matplotlib"}, id="the run itself"
        ),
        pytest.param(
            ["ray_probe.cluster.controller_backend", "ray_probe.controller.controller"],
            {"torch", "transformers", "matplotlib"},
            id="the controller's process",
        ),
        pytest.param(
            ["ray_probe.cli.main", "ray_probe.service.client", "ray_probe.cluster.controller_actor",
             "ray_probe.cluster.connection.connect"], {"torch", "transformers", "matplotlib"}, id="who asks",
        ),
        pytest.param(
            ["ray_probe.service.client", "ray_probe.http.client", "ray_probe.service.serving"],
            {"torch", "ray", "transformers", "matplotlib", "fastapi", "uvicorn"},
            id="a client over HTTP",
        ),
        pytest.param(
            ["ray_probe.http.app", "ray_probe.http.server"], {"torch", "ray", "transformers", "matplotlib"},
            id="the web server's process",
        ),
        pytest.param(["ray_probe.cli.main"], {"torch", "ray", "transformers"}, id="the command line's help"),
        pytest.param(
            ["ray_probe.page.report_file", "ray_probe.page.places"],
            {"torch", "ray", "transformers", "matplotlib", "fastapi"}, id="page and report",
        ),
        pytest.param(
            ["ray_probe.watch.inspection", "ray_probe.watch.candidates"],
            {"torch", "ray", "transformers", "numpy", "safetensors", "pydantic"}, id="layouts of checkpoints",
        ),
        pytest.param(["ray_probe.watch.session"], {"torch", "ray", "transformers", "matplotlib"}, id="a watch"),
        pytest.param(["ray_probe.service.run_once"], {"matplotlib.pyplot"}, id="no global state of plots"),
    ],
)  # fmt: skip
def test_a_light_layer_imports_nothing_heavy(modules: list[str], refused: set[str]) -> None:
    assert imported_with(modules) & refused == set()


def test_core_is_all_there() -> None:
    assert len(CORE) >= 8
