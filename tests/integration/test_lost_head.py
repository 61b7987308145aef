"""The head is lost during a run: one line says what to do, and no round is lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.answers import Answer
from support.checkpoints import raw_config, write_shadows
from support.heads import Head, a_head
from support.ray_runs import run_here

from ray_probe.config.loading import config_from_dict
from ray_probe.fitter.ledger import read_ledger
from ray_probe.rollout.builder import build_rollout
from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation.prepare import prepare

pytestmark = [pytest.mark.cluster, pytest.mark.own_cluster, pytest.mark.slow, pytest.mark.timeout(400)]

LAUNCH = Path(__file__).parents[2] / "launch.py"
ROUNDS = 2000  # it is always interrupted
END_S = 65.0  # Ray ends a process 60 s after the loss of its head, with a message of its own
BATCH = {"prompts_per_round": 12, "responses_per_prompt": 8, "shard_prompts": 3, "rounds": ROUNDS}


def launch(home: Path, head: Head, *arguments: object) -> "subprocess.Popen[str]":
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    own = {"HOME": str(home), "XDG_STATE_HOME": str(home / "state")}
    return subprocess.Popen(
        [sys.executable, str(LAUNCH), "run", *map(str, arguments), "--address", head.address, "--actors", "2"],
        cwd=home, env=clean | own | head.variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def until_rounds(run: "subprocess.Popen[str]", path: Path, rounds: int) -> None:
    deadline = time.monotonic() + 90
    while not (path / "rounds.jsonl").exists() or len(RunDirectory(path).finished_rounds()) < rounds:
        assert run.poll() is None and time.monotonic() < deadline, run.stderr and run.stderr.read()
        time.sleep(0.05)


@pytest.mark.parametrize(
    "lose",
    [
        pytest.param(lambda head: os.kill(head.gcs, signal.SIGKILL), id="its control process"),
        pytest.param(Head.kill, id="the whole cluster"),
    ],
)
def test_a_run_that_loses_its_head_says_so_and_goes_on_elsewhere_to_the_same_bits(
    tmp_path: Path, lose: Callable[[Head], None]
) -> None:
    raw = raw_config(tmp_path, batch=BATCH, output={"name": "mine"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    path = tmp_path / "runs" / "mine"
    write_shadows(tmp_path)
    with a_head(2) as head:
        first = launch(tmp_path, head, tmp_path / "run.yaml")
        until_rounds(first, path, 2)
        lose(head)
        lost = time.monotonic()
        _, said = first.communicate(timeout=2 * END_S)
        assert time.monotonic() - lost < END_S
        assert first.returncode == 4, said
        last = said.strip().splitlines()[-1]
        assert last.startswith("error: cluster: its head at ") and head.address in last and "Traceback" not in said
        assert f"go on with run --resume {path}" in last
        kept = len(RunDirectory(path).finished_rounds())
        contents = read_ledger(path / "ledger.jsonl")
        whole = {(number, shard) for number in range(kept) for shard in range(4)}
        assert kept >= 2 and whole <= set(contents.records), "every shard that counts is in the ledger"

        with a_head(2) as other:
            second = launch(tmp_path, other, "--resume", path)
            until_rounds(second, path, kept + 2)
            second.send_signal(signal.SIGINT)
            _, said = second.communicate(timeout=60)
        assert second.returncode == 130, said
    directory = RunDirectory.open(path)
    resumed = Answer(directory.result(), directory)
    rounds = len(resumed.rounds)
    assert rounds >= kept + 2

    raw["batch"]["rounds"] = rounds
    prepared = prepare(config_from_dict(raw | {"output": {"dir": str(tmp_path / "other")}}))
    rollout = build_rollout(prepared.config, prepared.checkpoint.directory, prepared.policy_id)
    resumed.assert_same(run_here(prepared, "reference", [rollout]))
