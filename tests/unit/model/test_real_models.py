"""Whole runs of the demo in this process, in bfloat16 and with a PEFT adapter."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.adapters import write_adapter

from ray_probe.config import load_config
from ray_probe.controller.local_backend import LocalBackend
from ray_probe.core.estimator.parity import TOLERANCE_NATS
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.rollout.builder import build_rollout
from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation.prepare import prepare
from ray_probe.run.preparation.prepared import baseline_rule

ROOT = Path(__file__).parents[3]
SMALL = ["batch.rounds=2", "batch.prompts_per_round=4", "batch.shard_prompts=2", "generation.max_new_tokens=32"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("demo") / "adapter", ROOT / "configs" / "models" / "tiny", spread=0.03)


def run(path: Path, *settings: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A run's result, and its gradient summed over all responses by parameter name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        prepared = prepare(load_config(ROOT / "configs" / "tiny.yaml", [*SMALL, *settings]))
    config = prepared.config
    directory = RunDirectory.create(path, "run")
    rollout = build_rollout(config, prepared.checkpoint.directory, prepared.policy_id)
    backend = LocalBackend([rollout], baseline_rule(config), prepared.policy_id, directory)
    result = OfflineEntropyProbe(config, prepared.plan, backend, directory).run().to_json()
    flat = backend.store.read(0, backend.layout.size)
    return result, {name: flat[start:stop] for name, _, start, stop in backend.layout.ranges()}


@pytest.mark.parametrize("trainable", ["all", "adapter"])
def test_the_demo_in_bfloat16_passes_its_parity_gate(tmp_path: Path, adapter: Path, trainable: str) -> None:
    chosen = [f"model.trainable={trainable}", *([f"model.adapter={adapter}"] if trainable == "adapter" else [])]
    result, gradient = run(tmp_path, "model.dtype=bfloat16", *chosen)
    assert result["counts"]["rounds"] == 2 and result["partial"] is False
    assert 0 < result["parity"]["mean_gap"] < TOLERANCE_NATS["bfloat16"]
    for part in gradient.values():
        assert np.isfinite(part).all()
        assert (part.astype(np.float32).view(np.uint32) & 0xFFFF).any(), "more digits than bfloat16 has"


def test_a_run_with_an_adapter_gives_its_parameters_alone_as_the_full_model_has_them(
    tmp_path: Path, adapter: Path
) -> None:
    _, alone = run(tmp_path / "alone", f"model.adapter={adapter}", "model.trainable=adapter")
    _, whole = run(tmp_path / "whole", f"model.adapter={adapter}", "model.trainable=all")
    assert len(alone) == 16 and len(whole) == 39 + 16
    assert all(".lora_" in name and not name.startswith("base_model.") for name in alone)
    for name, part in alone.items():
        assert np.abs(part).max() > 0
        np.testing.assert_allclose(part, whole[name], rtol=1e-5, atol=1e-5 * np.abs(whole[name]).max())
