"""What benchmarks share: a run without Ray in a temporary directory; `save` says where results go."""

import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.saving import ROOT, save
from ray_probe.config import load_config
from ray_probe.controller.local_backend import LocalBackend
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.rollout.builder import build_rollout
from ray_probe.rollout.loader import pin_threads
from ray_probe.rollout.rollout import Rollout
from ray_probe.run.directory import RunDirectory
from ray_probe.run.prepare import PreparedRun, prepare
from ray_probe.run.prepared import baseline_rule

__all__ = ["DEMO", "ROOT", "build", "prepare_demo", "run_in_process", "save"]

DEMO = ROOT / "configs" / "tiny.yaml"


def prepare_demo(*overrides: str) -> PreparedRun:
    """The demo's run, one thread, with settings changed."""
    os.chdir(ROOT)
    pin_threads(1)
    return prepare(load_config(DEMO, overrides))


def build(prepared: PreparedRun) -> Rollout:
    """A rollout on the run's checkpoint."""
    return build_rollout(prepared.config, prepared.checkpoint.directory, prepared.policy_id)


def run_in_process(*overrides: str) -> dict[str, Any]:
    """Run the demo in this process; returns the result."""
    prepared = prepare_demo(*overrides)
    with tempfile.TemporaryDirectory() as parent:
        directory = RunDirectory.create(Path(parent), "benchmark")
        backend = LocalBackend([build(prepared)], baseline_rule(prepared.config), prepared.policy_id, directory)
        return OfflineEntropyProbe(prepared.config, prepared.plan, backend, directory).run().to_json()
