"""A GRPO run of TRL that keeps one checkpoint, watched beside a service: all of them are measured, with their steps.

Needs TRL (pip install '.[test-slow]') and Chromium: where one is missing, this file fails.
"""

import json
import math
import re
import signal
import statistics
import subprocess
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from support.browser import chromium, tab
from support.pages import ROOT
from support.services import until
from support.shell import Shell

from ray_probe.integrations import ProbeCallback
from ray_probe.report.number_format import with_error

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.own_cluster, pytest.mark.timeout(600)]
STEPS = [5, 10, 15, 20, 25, 30]
CONFIG: dict[str, dict[str, Any]] = {
    "model": {"path": str(ROOT / "configs/models/tiny")},
    "data": {"prompts": str(ROOT / "configs/prompts/tiny.jsonl")},
    "batch": {"prompts_per_round": 16, "responses_per_prompt": 2, "shard_prompts": 2, "rounds": 1},
    "generation": {"max_new_tokens": 40},
    "cluster": {"actors": 1, "max_actors": 1},
}


@pytest.fixture(scope="module")
def trainer_runs() -> ModuleType:
    """Imported late: `make test`, which has no TRL, collects this file too."""
    return import_module("support.trainer_runs")


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def service(shell: Shell) -> Iterator[str]:
    raw = {**CONFIG, "output": {"dir": str(shell.home / "runs")}, "metrics": {"tensorboard": str(shell.home / "board")}}
    (shell.home / "config.yaml").write_text(yaml.safe_dump(raw))
    try:
        # The URL of its page, with the token.
        yield json.loads(shell.run("up", "config.yaml", "--name", "demo", "--http", "--json", seconds=300))["url"]
    finally:
        shell.run("down", "--run", "demo", seconds=300)


def test_beside_an_idle_service_the_callback_costs_training_less_than_50_ms_a_save(
    service: str, trainer_runs: ModuleType, tmp_path: Path
) -> None:
    alone, beside = list[float](), list[float]()
    for turn in range(3):  # in turns, so that a machine that slows down slows both
        for seconds, callbacks in ((alone, []), (beside, [ProbeCallback()])):
            clock = trainer_runs.Between()
            trainer_runs.plain(tmp_path / f"{turn}-{len(callbacks)}", [clock, *callbacks], steps=12, every=1)
            seconds += clock.with_save
    assert len(alone) == len(beside) == 3 * 11
    assert statistics.median(beside) - statistics.median(alone) < 0.05


def read_until(process: "subprocess.Popen[str]", found: Callable[[str], bool]) -> list[str]:
    """The lines up to the one that is looked for; the timeout of the test ends the wait."""
    assert process.stdout is not None
    lines = list[str]()
    for line in process.stdout:
        lines.append(line)
        if found(line):
            return lines
    raise AssertionError(f"it ended with {process.wait()}: {lines} {process.communicate()}")


def on_the_board(board: Path, name: str) -> list[int]:
    """The steps at which TensorBoard has a figure."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board)).Reload()
    return sorted(one.step for one in events.Scalars(name)) if name in events.Tags()["scalars"] else []


def test_every_checkpoint_of_a_grpo_run_is_measured_at_its_step(
    service: str, trainer_runs: ModuleType, shell: Shell
) -> None:
    out = shell.home / "out"
    out.mkdir()
    watch = shell.start("watch", out, "--name", "grpo")
    try:
        callback = trainer_runs.TimedProbeCallback(tags={"algorithm": "grpo"})
        trainer_runs.grpo(out, [callback], steps=30, every=5)
        lines = read_until(watch, lambda line: "checkpoint-30: measured" in line)
    finally:
        watch.send_signal(signal.SIGINT)
        _, errors = watch.communicate(timeout=60)
    assert "Traceback" not in errors
    assert not [line for line in lines if "vanished" in line or "skipped" in line]
    assert statistics.median(callback.seconds) < 0.05
    # What the interrupted watch left is measured by the same command.
    shell.run("watch", out, "--name", "grpo", "--once", seconds=300)
    assert list((out / ".ray_probe").glob("*.json")) == list((out / ".ray_probe" / "pins").iterdir()) == []
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-30"]

    infos = shell.ask("results")
    assert {(info["state"], info["series"]) for info in infos} == {("done", "grpo")}
    probes = [info for info in infos if not info["against"]]
    changes = [info for info in infos if info["against"]]
    assert sorted(info["step"] for info in probes) == STEPS
    assert sorted((info["step"], Path(info["against"]).name) for info in changes) == [
        (after, f"checkpoint-{before}") for before, after in pairwise(STEPS)
    ]
    (curve,) = shell.ask("results", "--series")
    points, changes = curve["points"], curve["changes"]
    assert (curve["name"], [point["step"] for point in points]) == ("grpo", STEPS)
    assert [(change["first_step"], change["last_step"]) for change in changes] == [*pairwise(STEPS)]
    assert all(point["tags"] == {"algorithm": "grpo"} for point in points)
    assert len({point["entropy"]["value"] for point in points}) == 6
    for figure in (*(point["entropy"] for point in points), *(change["since_first"] for change in changes)):
        assert math.isfinite(figure["value"]) and figure["se"] > 0
    assert points[-1]["entropy"]["value"] > 0
    with chromium() as browser, tab(browser) as page:
        page.page.goto(service)
        page.wait_for("step 25 to step 30:", "#headline")
        newest, change = points[-1]["entropy"], changes[-1]["total"]
        assert with_error(newest["value"], newest["se"]) in page.text("#headline")
        assert with_error(change["value"], change["se"], plus=True) in page.text("#measurements")
        assert page.text("#banner") == ""
    shell.run("report", "demo", "-o", "grpo.html")
    report = (shell.home / "grpo.html").read_text(encoding="utf-8")
    assert "grpo" in report and all(re.search(rf"checkpoint-{step}\b", report) for step in STEPS)
    # The figures of the last measurement may still be on their way.
    until(lambda: on_the_board(shell.home / "board", "probe/entropy_per_token") == STEPS)
    until(lambda: on_the_board(shell.home / "board", "probe/change") == STEPS[1:])
