"""Runs of the demo without Ray, for benchmarks."""

import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.saving import ROOT
from ray_probe.config import load_config
from ray_probe.controller.local_backend import LocalBackend
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.rollout.builder import build_rollout
from ray_probe.rollout.loader import pin_threads
from ray_probe.rollout.rollout import Rollout
from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation.prepare import PreparedRun, prepare
from ray_probe.run.preparation.prepared import baseline_rule

DEMO = ROOT / "configs" / "tiny.yaml"


def prepare_demo(*overrides: str) -> PreparedRun:
    """Return the demo's run with changed settings, on one thread."""
    os.chdir(ROOT)
    pin_threads(1)
    return prepare(load_config(DEMO, overrides))


def build(prepared: PreparedRun) -> Rollout:
    """Return a rollout on the run's checkpoint."""
    return build_rollout(prepared.config, prepared.checkpoint.directory, prepared.policy_id)


def run_in_process(*overrides: str) -> dict[str, Any]:
    """Run the demo in this process and return its result."""
    prepared = prepare_demo(*overrides)
    with tempfile.TemporaryDirectory() as parent:
        directory = RunDirectory.create(Path(parent), "benchmark")
        backend = LocalBackend([build(prepared)], baseline_rule(prepared.config), prepared.policy_id, directory)
        return OfflineEntropyProbe(prepared.config, prepared.plan, backend, directory).run().to_json()
