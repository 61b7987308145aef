"""Comparisons and gradients of tiny checkpoints, as a chain or a series has them, run in this process."""

from pathlib import Path
from typing import Any

from ray_probe.config import ProbeConfig
from ray_probe.config.loading import config_from_dict, dump_yaml, to_dict
from ray_probe.controller.local_backend import LocalBackend
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.rollout.builder import RolloutBuilder
from ray_probe.rollout.response_store import ResponseStore
from ray_probe.run.directory import RunDirectory, as_json
from ray_probe.run.manifest import Manifest
from ray_probe.run.messages import ActorFacts
from ray_probe.run.preparation.prepare import prepare
from ray_probe.run.preparation.prepared import PreparedRun, baseline_rule
from support.runs import POLICY, plan_of, rollout_of, settings


def config_of(a: Path | None, b: Path, side: int = 0, **sections: dict[str, Any]) -> ProbeConfig:
    """The config of a comparison of two tiny checkpoints; without A, of a gradient."""
    raw = to_dict(settings(b))
    raw["batch"] |= {"responses_per_prompt": 4, "rounds": 2}
    raw["compare"] |= {"against": None if a is None else str(a), "side": side}
    return config_from_dict(raw | sections)


def step(
    directory: Path, number: int, a: Path, b: Path, side: int | None = None, store: ResponseStore | None = None,
    samples: tuple[bool, bool] = (True, True), **sections: dict[str, Any],
) -> None:  # fmt: skip
    """One step of a chain, run in this process; a side that does not sample fails where it is asked to."""
    config = config_of(a, b, (number - 1) % 2 if side is None else side, **sections)
    prepared = prepare(config)
    comparison = RolloutBuilder().compare(config, [(a, None), (b, None)], POLICY, store=store)
    for place, allowed in enumerate(samples):
        if not allowed:
            comparison.processors[place].generate = None  # type: ignore[method-assign]
    _ran(config, prepared, comparison, directory, f"step-{number}")


def gradient(directory: Path, name: str, checkpoint: Path, **sections: dict[str, Any]) -> None:
    """The gradient of a checkpoint with the prompts of a chain, run in this process."""
    config = config_of(None, checkpoint, **sections)
    _ran(config, prepare(config), rollout_of(config), directory, name)


def _ran(config: ProbeConfig, prepared: PreparedRun, rollout: Any, directory: Path, name: str) -> None:
    manifest = Manifest.of(prepared, ActorFacts(rollout.layout, "cpu", 1, 0), {})
    files = {"config.yaml": dump_yaml(config), "manifest.json": as_json(manifest.to_json())}
    run = RunDirectory.create(directory, name, files)
    backend = LocalBackend([rollout], baseline_rule(config), POLICY, run)
    OfflineEntropyProbe(config, plan_of(config), backend, run).run()
