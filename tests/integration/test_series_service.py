"""A series through a service: three checkpoints, each sampled once, with sinks and notifications at the end of each."""

import json
import shlex
import sys
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from support.checkpoints import raw_config, write_checkpoint
from support.services import until
from support.shell import Shell
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ray_probe.run.comparison.chain import responses_of
from ray_probe.service.client import ProbeClient

pytestmark = [pytest.mark.cluster, pytest.mark.own_cluster, pytest.mark.timeout(400)]
STEPS = (0, 50, 100)
SAVES = "import os, sys; open(sys.argv[1], 'a').write(os.environ['RAY_PROBE_STATE'] + '\\n')"


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def checkpoints(shell: Shell) -> list[Path]:
    return [write_checkpoint(shell.home / f"checkpoint-{step}", seed=step) for step in STEPS]


@pytest.fixture(scope="module")
def service(shell: Shell, checkpoints: list[Path]) -> Iterator[Path]:
    """The directory of a service."""
    command = shlex.join([sys.executable, "-c", SAVES, str(shell.home / "notified")])
    batch = {"prompts_per_round": 4, "responses_per_prompt": 4, "shard_prompts": 2, "rounds": 2}
    raw = raw_config(shell.home, batch=batch, cluster={"actors": 1, "max_actors": 1})
    raw |= {"metrics": {"tensorboard": "board/{series}"}}
    (shell.home / "service.yaml").write_text(yaml.safe_dump(raw))
    try:
        up = shell.run("up", "service.yaml", "--name", "demo", "--on-result", command, "--json", seconds=200)
        yield Path(json.loads(up)["directory"])
    finally:
        shell.run("down", "--run", "demo")


@pytest.fixture
def client(shell: Shell, service: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProbeClient]:
    monkeypatch.setenv("XDG_STATE_HOME", str(shell.home / "state"))
    with ProbeClient.connect() as client:
        yield client


def test_a_series_of_three_checkpoints_through_a_service(
    shell: Shell, service: Path, client: ProbeClient, checkpoints: list[Path]
) -> None:
    place = {"series.name": "grpo", "series.tags": {"lr": "1e-5"}}
    first = client.probe(checkpoints[0], settings={**place, "series.step": 0})
    compared: list[str] = []
    for number, (a, b) in enumerate(pairwise(checkpoints), start=1):
        kept = {"compare.responses_from": str(service / compared[-1])} if compared else {}
        settings = {
            **place, **kept, "series.step": STEPS[number], "compare.side": (number - 1) % 2,
            "compare.keep_responses": number < len(STEPS) - 1,
        }  # fmt: skip
        compared.append(client.probe(b, settings=settings, against=a))
    for identity in (first, *compared):
        client.wait(identity)
    until(lambda: not responses_of(service / compared[0]).exists())
    assert "the responses that m0002 kept for it are removed" in "\n".join(client.logs(None))
    (series,) = client.series()
    assert [(one.step, one.tags) for one in series.points] == [(step, {"lr": "1e-5"}) for step in STEPS]
    assert [(one.first_step, one.last_step) for one in series.changes] == [(0, 50), (50, 100)]
    last = series.changes[-1]
    assert last.since_first.value == pytest.approx(sum(one.total.value for one in series.changes))  # type: ignore[misc]
    assert last.since_first.se and (series.open, series.failed) == (0, 0)
    assert shell.ask("results", "--series") == [series.to_json()]
    assert shell.ask("results", "--series", service) == [series.to_json()], "the same from the files"
    listed = shell.run("results")
    assert "grpo" in listed and "step 100" in listed
    assert "NAME: got 'x'; no such series; there are grpo" in shell.run("results", "--series", "x", code=2)
    states = until(lambda: len(found := (shell.home / "notified").read_text().split()) == 3 and found)
    assert states == ["done"] * 3
    lines = [json.loads(line) for line in (service / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(STEPS)
    events = EventAccumulator(str(shell.home / "board" / "grpo")).Reload()
    assert [one.step for one in events.Scalars("probe/change")] == [50, 100]
    assert [one.step for one in events.Scalars("probe/entropy_per_response")] == [0]
    _prometheus_has(series.points[0].entropy.value)


def _prometheus_has(entropy: float | None) -> None:
    """Read Ray's own exporter until it has the figure of the series."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def found() -> Any:
        with urllib.request.urlopen(address, timeout=10.0) as answer:
            text = answer.read().decode()
        lines = [line for line in text.splitlines() if line.startswith("ray_probe_entropy_nats{")]
        return [line for line in lines if 'series="grpo"' in line and 'service="demo"' in line]

    assert float(until(found, 90.0)[0].rpartition(" ")[2]) == pytest.approx(entropy)


@pytest.mark.slow  # tests/unit/service/test_run_once.py holds the report
def test_a_run_is_reported_by_its_driver_and_a_failing_program_changes_nothing(shell: Shell, service: Path) -> None:
    command = f"sh -c 'echo $RAY_PROBE_STATE $RAY_PROBE_RESULT > {shell.home}/ran; echo no >&2; exit 3'"
    place = ["--set", "output.name=alone", "--set", "series.step=7", "--set", "metrics.tensorboard=alone"]
    result = json.loads(shell.run("run", "service.yaml", "--on-result", command, *place, "--json", seconds=200))
    run = shell.home / "runs" / "alone"
    assert (shell.home / "ran").read_text() == f"done {run / 'result.json'}\n"
    assert "warning: notify: RuntimeError: m0001: notify.command: exit code 3: no" in shell.said[-1]
    (line,) = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert line["step"] == 7 and line["probe/entropy_per_response"] == result["entropy"]["per_sequence"]
    events = EventAccumulator(str(shell.home / "alone")).Reload()
    assert [one.step for one in events.Scalars("probe/snr")] == [7]
    assert result["config"]["series"]["step"] == 7 and "notify" not in result["config"]
