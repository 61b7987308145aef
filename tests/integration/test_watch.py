"""A watch on a real service: checkpoints that appear, one that is rotated away, a restart."""

import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.checkpoints import raw_config, write_checkpoint
from support.shell import Shell

pytestmark = [pytest.mark.cluster, pytest.mark.own_cluster, pytest.mark.timeout(500)]
BATCH = {"prompts_per_round": 6, "responses_per_prompt": 2, "shard_prompts": 3, "rounds": 1}


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def service(shell: Shell) -> Iterator[dict[str, Any]]:
    raw = raw_config(shell.home, batch=BATCH, cluster={"actors": 1, "max_actors": 1})
    (shell.home / "service.yaml").write_text(yaml.safe_dump(raw))
    up = json.loads(shell.run("up", "service.yaml", "--name", "demo", "--json", seconds=240))
    try:
        yield up
    finally:
        shell.run("down", "--run", "demo")


class Reading:
    """The lines of a watch that runs."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process, self.lines = process, [""]

    def until(self, found: Callable[[str], bool]) -> str:
        """Returns the first line that is looked for; the watch's end ends the wait."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found(line):
                return line
        raise AssertionError(f"it ended with {self.process.wait()}: {self.lines} {self.process.communicate()}")


def save(out: Path, step: int) -> Path:
    """Writes a checkpoint as transformers' Trainer does."""
    directory = write_checkpoint(out / f"checkpoint-{step}", seed=step)
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return directory


def test_every_checkpoint_is_measured_with_its_step_over_rotation_and_a_restart(
    shell: Shell, service: dict[str, Any]
) -> None:
    out = shell.home / "out"
    out.mkdir()
    reading = Reading(shell.start("watch", out, "--name", "grpo"))
    try:
        for step in (5, 10):
            directory = save(out, step)
            reading.until(lambda line, name=directory.name: f"{name}: queued" in line)  # type: ignore[misc]
            shutil.rmtree(directory)
        refused = shell.run("watch", out, "--name", "grpo", code=2)
        assert refused.startswith("error: --name: got 'grpo'; process ") and "watches this series" in refused
        reading.until(lambda line: "checkpoint-10: measured as m0002, m0003" in line)
    finally:
        reading.process.send_signal(signal.SIGINT)
        _, errors = reading.process.communicate(timeout=120)
    assert reading.process.returncode == 130 and "goes on with the series" in errors and "Traceback" not in errors

    save(out, 15)
    (out / "checkpoint-20").mkdir()
    (out / "checkpoint-20" / "config.json").write_text("{}")
    assert shell.run("watch", out, "--name", "grpo", "--once", code=3, seconds=240) == ""
    printed = shell.said[-2].splitlines()
    assert any("checkpoint-15: measured as m0004, m0005" in line for line in printed)
    assert any("checkpoint-20: waiting for trainer_state.json" in line for line in printed)
    assert max(map(len, printed)) <= 80 or "/" in max(printed, key=len)

    infos = shell.ask("results")
    assert [(info["id"], info["state"], info["series"], info["step"]) for info in infos] == [
        ("m0001", "done", "grpo", 5), ("m0002", "done", "grpo", 10), ("m0003", "done", "grpo", 10),
        ("m0004", "done", "grpo", 15), ("m0005", "done", "grpo", 15),
    ]  # fmt: skip
    assert [Path(info["against"] or "").name for info in infos] == ["", "checkpoint-5", "", "checkpoint-10", ""]
    results = [json.loads((Path(info["directory"]) / "result.json").read_text()) for info in infos]
    assert [result["counts"]["sequences"] for result in results] == [12, 24, 12, 24, 12]
    tokens = [result["counts"]["tokens"] for result in results]
    assert (tokens[1], tokens[3]) == (tokens[0] + tokens[2], tokens[2] + tokens[4]), "all share their responses"
    kept = [path.parent.parent.name for path in Path(service["directory"]).glob("*/state/responses")]
    assert kept == ["m0005"], "the responses of the last checkpoint alone, for the next comparison"
    left = sorted(path.name for path in (out / ".ray_probe" / "watch" / "grpo" / "pins").glob("*/*"))
    assert left == ["checkpoint-15"], "the next checkpoint is compared with it"


@pytest.mark.slow  # tests/unit/watch/test_session.py holds the watch, lifecycle and ending the service
def test_a_watch_with_a_configuration_starts_a_service_and_ends_it(shell: Shell, service: dict[str, Any]) -> None:
    out = shell.home / "finished"
    out.mkdir()
    save(out, 3)
    asked = ("watch", out, "service.yaml", "--run", "own", "--once", "--set", "batch.prompts_per_round=3")
    printed = shell.run(*asked, seconds=400)
    assert "checkpoint-3: measured as m0001" in printed and "service 'own' is down" in shell.said[-1]
    assert "'own'" in shell.run("status", "--run", "own", code=2)
    empty = shell.home / "empty"
    empty.mkdir()
    assert "no checkpoint is in it" in shell.run("watch", empty, "--run", "demo", "--once", code=2)
