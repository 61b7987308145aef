"""Seconds from a fresh process to a first usable actor, step by step.

Each figure comes from its own process, one after the other, with the files in the page cache as in a second run.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.saving import ROOT, save

ROUNDS = 5
IMPORTS = ("ray_probe.cli.main", "ray_probe.fitter.fitter", "ray", "torch", "transformers", "ray_probe.rollout.builder")
TARGET_S = 10.0


def _child() -> dict[str, float]:
    """Time the steps in this fresh process."""
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - started
        return result

    import tempfile
    from pathlib import Path

    prepared = timed("checkpoint and prompts checked", _prepared)
    from benchmarks.private_ray import private_ray

    with tempfile.TemporaryDirectory() as parent:
        started = time.perf_counter()
        with private_ray(slots=2):
            seconds["ray.init"] = time.perf_counter() - started
            from ray_probe.cluster.backend import RayBackend
            from ray_probe.run.directory import RunDirectory

            backend = RayBackend(prepared.config)
            timed("first rollout actor has the model", lambda: backend.load(prepared))
            directory = RunDirectory.create(Path(parent), "benchmark")
            timed("fitter and writer are open", lambda: backend.open(directory))
            backend.close()
            started = time.perf_counter()
        seconds["ray.shutdown"] = time.perf_counter() - started
    return seconds


def _prepared() -> Any:
    from benchmarks.common import prepare_demo

    return prepare_demo("cluster.actors=1")


def _import_s(module: str) -> float:
    """Time an import in a fresh process, without the start of Python."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def _steps() -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.start_up", "child"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    steps: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return steps


def main() -> None:
    """Measure, print, save."""
    imports: dict[str, list[float]] = {module: [] for module in IMPORTS}
    steps: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for module in IMPORTS:
            imports[module].append(_import_s(module))
        for name, value in _steps().items():
            steps.setdefault(name, []).append(value)
    both = [sum(pair) for pair in zip(steps["ray.init"], steps["first rollout actor has the model"], strict=True)]
    for name, values in [*((f"import {k}", v) for k, v in imports.items()), *steps.items()]:
        print(f"  {name:34s} {statistics.median(values):6.2f} s ({min(values):.2f}-{max(values):.2f})")
    print(
        f"  ray.init to the first usable actor: {statistics.median(both):.2f} s   (at most {TARGET_S:g} is the target)"
    )
    save("start_up", {"import_s": imports, "step_s": steps, "init_to_actor_s": both, "rounds": ROUNDS})


if __name__ == "__main__":
    if sys.argv[1:] == ["child"]:
        print(json.dumps(_child()))
    else:
        main()
