"""The command on its own Ray, interrupted and resumed, with the same answer."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from support.answers import most_actors
from support.checkpoints import raw_config, write_shadows

from ray_probe.config.loading import config_from_dict
from ray_probe.controller.local_backend import LocalBackend
from ray_probe.controller.replies import BetaReply
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.rollout.builder import build_rollout
from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation.prepare import prepare
from ray_probe.run.preparation.prepared import baseline_rule
from ray_probe.service import registry
from ray_probe.service.client import ProbeClient

pytestmark = [pytest.mark.cluster, pytest.mark.own_cluster, pytest.mark.timeout(400)]

LAUNCH = Path(__file__).parents[2] / "launch.py"
ROUNDS = 2000  # it is always interrupted
DEADLINE_S = 150.0


@contextmanager
def launched(home: Path, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    environment = {name: value for name, value in os.environ.items() if name != "XDG_STATE_HOME"} | {"HOME": str(home)}
    run = subprocess.Popen(
        [sys.executable, str(LAUNCH), "run", *map(str, arguments)],
        cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield run
    finally:
        run.kill()
        run.wait(DEADLINE_S)


def asked_and_scaled_while_it_works(run: "subprocess.Popen[str]", directory: RunDirectory) -> list[BetaReply]:
    """Scale a run 1 -> 2 -> 1, with two actors at work in between, and ask it for its beta."""
    deadline = time.monotonic() + DEADLINE_S
    while not registry.entries():
        assert run.poll() is None and time.monotonic() < deadline, run.stderr and run.stderr.read()
        time.sleep(0.05)
    betas = []
    with ProbeClient.connect(kind="run") as client:
        while client.status().measurement is None or not client.results()[0].rounds:
            time.sleep(0.05)
        for actors in (2, 1):
            client.scale(actors)
            while client.status().actors_alive != actors or most_actors(directory) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            betas.append(client.beta())
        status = client.status()
    assert status.kind == "run" and status.measurement is not None and status.measurement.finished is None
    return betas


HANGS = """
from ray_probe.service import following
following.SILENT_S = 5.0
from ray_probe.cli.main import main
main()
"""


@pytest.mark.slow  # tests/unit/service/test_following.py holds the silence and the words
def test_a_controller_that_hangs_ends_the_run_with_the_way_to_go_on(tmp_path: Path) -> None:
    raw = raw_config(tmp_path, batch={"rounds": ROUNDS}, output={"name": "mine"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    path = tmp_path / "runs" / "mine"
    environment = {name: value for name, value in os.environ.items() if name != "XDG_STATE_HOME"}
    run = subprocess.Popen(
        [sys.executable, "-c", HANGS, "run", str(tmp_path / "run.yaml"), "--actors", "1"],
        env=environment | {"HOME": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not (path / "rounds.jsonl").exists():
            assert run.poll() is None and time.monotonic() < deadline, run.stderr and run.stderr.read()
            time.sleep(0.05)
        controller = int((path / "lock").read_text().split()[1])
        os.kill(controller, signal.SIGSTOP)
        _, said = run.communicate(timeout=50.0)  # a controller that answers nothing is not asked to close for 60 s
    finally:
        run.kill()
        run.wait(DEADLINE_S)
    assert run.returncode == 4
    assert said.splitlines()[-1] == (
        "error: run 'mine': no answer for 5 s, its controller hangs or its machine is overloaded; go on with run "
        f"--resume {path}"
    )


@pytest.mark.timeout(300)  # three runs, each with a Ray of its own
def test_ctrl_c_keeps_whole_rounds_and_resume_goes_on_to_the_uninterrupted_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = raw_config(tmp_path, batch={"rounds": ROUNDS}, output={"name": "mine", "save_gradient": True})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    run = tmp_path / "runs" / "mine"
    write_shadows(tmp_path)

    with launched(tmp_path, tmp_path / "run.yaml", "--actors", 1) as first:
        while not (run / "rounds.jsonl").exists():
            assert first.poll() is None, first.stderr and first.stderr.read()
            time.sleep(0.05)
        first.send_signal(signal.SIGINT)
        _, said = first.communicate(timeout=DEADLINE_S)
    finished = len((run / "rounds.jsonl").read_text().splitlines())
    assert first.returncode == 130
    assert 1 <= finished < ROUNDS
    assert f"{finished} rounds are kept" in said and f"--resume {run}" in said and "Traceback" not in said
    assert json.loads((run / "result.json").read_text())["counts"]["rounds"] == finished

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    with launched(tmp_path, "--resume", run, "--actors", 1, "--json") as second:
        betas = asked_and_scaled_while_it_works(second, RunDirectory(run))
        second.send_signal(signal.SIGINT)
        _, said = second.communicate(timeout=DEADLINE_S)
    assert second.returncode == 130, said
    result = json.loads((run / "result.json").read_text())
    rounds = result["counts"]["rounds"]
    assert finished < rounds < ROUNDS
    assert not (tmp_path / ".ray").exists(), "no token is written to the home directory"
    assert registry.entries() == []
    lines = {line.beta_version: line for line in RunDirectory.open(run).finished_rounds()}
    assert betas and all(list(beta.values or ()) == list(lines[beta.version].beta or ()) for beta in betas)
    assert most_actors(RunDirectory(run)) == 2

    raw["batch"]["rounds"] = rounds
    prepared = prepare(config_from_dict(raw | {"output": {"dir": str(tmp_path / "other")}}))
    directory = RunDirectory.create(tmp_path / "other", "reference")
    rollout = build_rollout(prepared.config, prepared.checkpoint.directory, prepared.policy_id)
    backend = LocalBackend([rollout], baseline_rule(prepared.config), prepared.policy_id, directory)
    reference = OfflineEntropyProbe(prepared.config, prepared.plan, backend, directory).run().to_json()
    assert result["beta"] == reference["beta"]
    assert result["counts"] | {"actors": 1} == reference["counts"]
    assert result["gradient"]["norm_raw"] == pytest.approx(reference["gradient"]["norm_raw"], rel=1e-5)

    left = {path.name for path in run.iterdir()}
    assert {
        "config.yaml", "manifest.json", "ledger.jsonl", "rounds.jsonl", "state", "result.json", "gradient.safetensors",
        "log.txt", "report.html", "advantage_by_mode.png", "beta_by_feature.png", "residual_by_position.png",
        "entropy_by_round.png",
    } <= left  # fmt: skip
    log = (run / "log.txt").read_text()
    assert all(
        word in log for word in ("x_estimator_mode=", "baseline.mode=", "baseline.fit=", "features=", "ridge_lambda=")
    )
