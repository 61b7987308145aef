"""The demo behaves as the README says, on two rounds in this process."""

from pathlib import Path
from typing import Any

import pytest

from ray_probe.config import load_config
from ray_probe.controller.local_backend import LocalBackend
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.rollout.builder import build_rollout
from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation.prepare import prepare
from ray_probe.run.preparation.prepared import baseline_rule

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        prepared = prepare(load_config(ROOT / "configs" / "tiny.yaml", ["batch.rounds=2"]))
    directory = RunDirectory.create(tmp_path_factory.mktemp("demo"), "demo")
    rollout = build_rollout(prepared.config, prepared.checkpoint.directory, prepared.policy_id)
    backend = LocalBackend([rollout], baseline_rule(prepared.config), prepared.policy_id, directory)
    return OfflineEntropyProbe(prepared.config, prepared.plan, backend, directory).run().to_json()


def test_the_parity_gate_reads_below_1e_4_nats(result: dict[str, Any]) -> None:
    assert result["parity"]["mean_gap"] < 1e-4
    assert result["parity"]["outside_nucleus"] == 0


def test_responses_end_by_themselves_at_many_lengths(result: dict[str, Any]) -> None:
    counts, tokens = result["counts"], result["positions"]["tokens"]
    assert counts["sequences"] == 256
    assert counts["truncated"] <= 0.2 * counts["sequences"]
    ended_at = [tokens[j] - tokens[j + 1] for j in range(len(tokens) - 1)]
    assert sum(ended > 0 for ended in ended_at) >= 30


def test_entropy_varies_along_a_response(result: dict[str, Any]) -> None:
    assert 0.1 < result["entropy"]["per_token"] < 1.0
    assert result["advantage_variance"]["none"] > 1.0


@pytest.mark.parametrize(
    ("mode", "against"), [("constant", "none"), ("residual_mu", "constant"), ("regression", "constant")]
)
def test_baselines_rank_as_they_should_on_paired_responses(result: dict[str, Any], mode: str, against: str) -> None:
    (pair,) = [p for p in result["advantage_paired"] if (p["mode"], p["against"]) == (mode, against)]
    assert pair["difference"] < -2 * pair["se"] < 0
