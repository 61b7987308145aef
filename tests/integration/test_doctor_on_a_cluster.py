"""A diagnosis on Ray: joining with a token, asking every node, and nothing left behind.

Ray keeps state in its process, so a diagnosis runs in a Python of its own.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.checkpoints import raw_config

from ray_probe.cluster.connection.connect import ClusterInfo, Demand, connected
from ray_probe.cluster.connection.nodes import Node, alive_nodes, ask_nodes
from ray_probe.cluster.connection.shared_directory import can_read, check_shared
from ray_probe.system.versions import package_versions

pytestmark = [pytest.mark.cluster, pytest.mark.own_cluster]

DIAGNOSE = """
import contextlib, itertools, json, sys, time
from ray_probe.config import load_config
from ray_probe.doctor.checks import to_json
from ray_probe.doctor.diagnosis import diagnose
config, token_path, count = sys.argv[1:]
start = time.monotonic()
with contextlib.closing(diagnose(load_config(config) if config else None, token_path=token_path or None,
                                 loopback=True)) as checks:
    told = to_json(itertools.islice(checks, int(count)))
print(json.dumps({**told, "seconds": time.monotonic() - start}))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterInfo]:
    with connected(None, "doctor", Demand(0, 1, 0, {}, 4), log=lambda line: None) as info:
        yield info


def diagnosed(home: Path, config: Path | None, token_path: str | None = None, count: int = 99) -> dict[str, Any]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", DIAGNOSE, str(config or ""), token_path or "", str(count)],
        env=clean, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    told["by_name"] = {check["name"]: check for check in told["checks"]}
    return told


@pytest.fixture
def config(cluster: ClusterInfo, tmp_path: Path) -> Path:
    """A config of the cluster, whose output.dir is not there yet."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw_config(tmp_path, cluster={"address": cluster.address})))
    return path


def test_a_run_that_can_start_is_told_so_and_nothing_is_left(
    cluster: ClusterInfo, config: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    told = diagnosed(home, config, cluster.token_path)
    assert told["ok"], told["checks"]
    assert [check["name"] for check in told["checks"]] == [
        "versions", "token", "cluster", "packages on nodes", "resources", "torch", "checkpoint", "end of response",
        "prompts", "checkpoint on nodes", "memory", "model", "run directory", "disk", "shared directory", "self-test",
    ]  # fmt: skip
    assert cluster.address in told["by_name"]["cluster"]["detail"]
    assert told["by_name"]["token"]["detail"].endswith("(mode 0600)")
    assert told["seconds"] < 45  # about 10 s on an idle machine
    assert not (tmp_path / "runs").exists() and list(home.iterdir()) == []


def test_a_cluster_that_refuses_the_token_is_told_within_5_s(config: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 64)
    wrong.chmod(0o600)
    told = diagnosed(tmp_path, config, str(wrong), count=4)
    refused, next_ = told["by_name"]["cluster"], told["by_name"]["packages on nodes"]
    assert not told["ok"] and refused["exit_code"] == 4 and "refused the token" in refused["detail"]
    assert next_["status"] == "skipped" and next_["detail"] == "needs cluster"
    assert told["seconds"] < 5


def test_without_a_config_a_ray_is_started_and_ended(tmp_path: Path) -> None:
    told = diagnosed(tmp_path, None, count=4)
    assert told["ok"], told["checks"]
    assert "starts here, runs a task, and ends" in told["by_name"]["Ray"]["detail"]
    assert list(tmp_path.iterdir()) == []


def test_every_node_answers_and_one_that_cannot_says_why(cluster: ClusterInfo) -> None:
    (node,) = alive_nodes()
    gone = Node("a" * 56, "gone (10.0.0.9)", {})
    there, absent = ask_nodes([node, gone], package_versions)
    assert there.value == package_versions() and there.error is None
    assert absent.value is None and absent.error
    (raised,) = ask_nodes([node], can_read, None, "x")
    assert raised.error is not None and raised.error.startswith("TypeError")


def test_a_node_that_does_not_answer_in_time_is_given_up(cluster: ClusterInfo) -> None:
    start = time.monotonic()
    (late,) = ask_nodes(alive_nodes(), can_read, "/nowhere", "", 30.0, seconds=1.0)
    assert late.error == "no answer within 1 s"
    assert time.monotonic() - start < 5


def test_a_directory_that_only_this_process_sees_is_not_shared(cluster: ClusterInfo, tmp_path: Path) -> None:
    assert check_shared(tmp_path, alive_nodes()) == []
    ours = os.open(tmp_path, os.O_RDONLY)
    try:
        assert check_shared(Path(f"/proc/self/fd/{ours}"), alive_nodes()) == alive_nodes()
    finally:
        os.close(ours)
    assert list(tmp_path.iterdir()) == []
