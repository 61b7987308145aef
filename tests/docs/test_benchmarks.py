"""Benchmarks compare equal results, and those of the numerics need no Ray."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
from importlib import import_module
from benchmarks.__main__ import NUMERICS
for name in NUMERICS:
    import_module(f"benchmarks.{name}")
from benchmarks import language_model, probe_step
size = language_model.Size(600, 64, 1, "float32", 16, 4, 6)
gaps = {}
for top_p in (0.95, 1.0):
    problem = probe_step.Problem(size, top_p, "cpu")
    gaps[top_p] = problem.gap(problem.rows())
print(json.dumps({"ray": "ray" in sys.modules, "gaps": gaps}))
"""


def test_the_naive_step_gives_our_gradient_and_no_benchmark_of_the_numerics_imports_ray() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ray"] is False
    assert all(gap < 1e-4 for by_pass in found["gaps"].values() for gap in by_pass.values())
