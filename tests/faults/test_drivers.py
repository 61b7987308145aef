"""A run loses its driver, its controller or its whole cluster, in the open rounds of a commit: it is gone on with.

The command itself, on clusters of its own. A driver is ended while records of rounds that are not committed lie in the
ledger; the next goes on in the same directory, with other actors on a new cluster.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support.answers import Answer
from support.checkpoints import raw_config
from support.failpoints import arm, disarm_all
from support.ray_runs import run_here

from ray_probe.config.loading import config_from_dict
from ray_probe.fitter.ledger import read_ledger
from ray_probe.rollout.builder import build_rollout
from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation.prepare import prepare
from ray_probe.run.result import Result
from ray_probe.system.failpoints import VARIABLE

pytestmark = [pytest.mark.cluster, pytest.mark.own_cluster, pytest.mark.slow, pytest.mark.timeout(360)]

LAUNCH = Path(__file__).parents[2] / "launch.py"
ROUNDS, SHARDS, COMMIT = 6, 6, 2
DEADLINE_S = 120.0
HELD_BY = re.compile(r"process (\d+) on (\S+) since \S+ \S+ UTC")
LOSSES = ["driver", "controller"]


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def last_line(self) -> str:
        assert "Traceback" not in self.err
        return self.err.strip().splitlines()[-1]


@dataclass
class Life:
    """What is left of a driver that was ended in the middle of its work."""

    ended: Ended
    finished: int
    ledger: bytes


@dataclass
class Story:
    """The lives of one run, what a second driver was told in the first, and what the last came to."""

    path: Path
    lives: dict[str, Life] = field(default_factory=dict)
    holder: int = 0
    second: Ended | None = None
    changed: list[str] = field(default_factory=list)
    last: Ended | None = None

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"


class Command:
    """`launch.py run` in a home of its own, with failpoints of its own."""

    def __init__(self, home: Path, points: Path, raw: dict[str, Any]) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._environment = kept | {"HOME": str(home), "XDG_STATE_HOME": str(home / "state"), VARIABLE: str(points)}
        self._points = points
        self.path = Path(raw["output"]["dir"]) / raw["output"]["name"]
        self.config = home / f"{raw['output']['name']}.yaml"
        self.config.write_text(yaml.safe_dump(raw))

    @contextmanager
    def started(self, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
        driver = subprocess.Popen(
            [sys.executable, str(LAUNCH), "run", *map(str, arguments)],
            env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            yield driver
        finally:
            driver.kill()
            driver.wait(DEADLINE_S)

    def run(self, *arguments: object) -> Ended:
        with self.started(*arguments) as driver:
            return ended(driver)

    @contextmanager
    def standing_still(self, number: int, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
        """A driver whose round has every record in the ledger, and whose actor does not go on to the gradients."""
        arm(self._points, "roll_before_gradient", "sleep", only=f"{number}/0", seconds=10 * DEADLINE_S)
        with self.started(*arguments) as driver:
            until(lambda: driver.poll() is not None or (self._points / "roll_before_gradient.1").exists())
            assert driver.poll() is None, driver.communicate()
            yield driver
        disarm_all(self._points)

    def life(self, driver: "subprocess.Popen[str]") -> Life:
        """What is left of a driver that ends by itself now."""
        how = ended(driver)
        rounds = len(RunDirectory.open(self.path).finished_rounds())
        return Life(how, rounds, (self.path / "ledger.jsonl").read_bytes())

    @property
    def holder(self) -> psutil.Process:
        """The controller: it holds the run directory."""
        found = HELD_BY.match((self.path / "lock").read_text())
        assert found is not None
        return psutil.Process(int(found[1]))


def ended(driver: "subprocess.Popen[str]") -> Ended:
    started = time.monotonic()
    out, err = driver.communicate(timeout=DEADLINE_S)
    return Ended(driver.returncode, out, err, time.monotonic() - started)


def until(found: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not found():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.05)


def snapshot(path: Path) -> dict[str, tuple[bytes, int]]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def command_of(home: Path, points: Path, name: str, rounds: int) -> Command:
    batch = {"rounds": rounds, "prompts_per_round": SHARDS}
    return Command(home, points, raw_config(home, batch=batch, output={"name": name, "commit_rounds": COMMIT}))


def uninterrupted(home: Path, rounds: int) -> Answer:
    """The same run in this process."""
    batch = {"rounds": rounds, "prompts_per_round": SHARDS}
    prepared = prepare(config_from_dict(raw_config(home, batch=batch, output={"dir": str(home / f"here-{rounds}")})))
    rollout = build_rollout(prepared.config, prepared.checkpoint.directory, prepared.policy_id)
    return run_here(prepared, "reference", [rollout])


def assert_undisturbed(command: Command, last: Ended, expected: Answer) -> None:
    answer = Answer(Result.from_json(json.loads(last.out)), RunDirectory.open(command.path))
    answer.assert_same(expected)
    assert answer.result["partial"] is False
    assert answer.result["entropy"] == expected.result["entropy"]
    assert answer.result["gradient"]["norm_raw"] == pytest.approx(expected.result["gradient"]["norm_raw"], rel=1e-5)


@pytest.fixture(scope="module")
def command(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    return command_of(home, tmp_path_factory.mktemp("points"), "mine", ROUNDS)


@pytest.fixture(scope="module")
def story(command: Command) -> Story:
    path = command.path
    told = Story(path)
    with command.standing_still(1, command.config, "--actors", 1) as driver:
        told.holder, before = command.holder.pid, snapshot(path)
        told.second = command.run("--resume", path)
        told.changed = [name for name, state in snapshot(path).items() if before.get(name) != state]
        driver.kill()
        told.lives["driver"] = command.life(driver)
    with command.standing_still(3, "--resume", path, "--actors", 2) as driver:
        command.holder.kill()
        told.lives["controller"] = command.life(driver)
    told.last = command.run("--resume", path, "--actors", 2, "--json")
    assert told.last.code == 0, told.last.err
    return told


def test_a_second_driver_is_told_who_holds_the_run_and_changes_nothing(story: Story) -> None:
    second = story.second
    assert second is not None and second.code == 2
    assert second.last_line.startswith("error: --resume: got ")
    assert second.last_line.endswith("is driving this run; wait for it or stop it")
    named = HELD_BY.search(second.last_line)
    assert named is not None and int(named[1]) == story.holder
    assert story.changed == []


@pytest.mark.parametrize("lost", LOSSES)
def test_a_run_that_lost_its_driver_or_its_controller_keeps_what_it_had(story: Story, lost: str) -> None:
    place = LOSSES.index(lost)
    life = story.lives[lost]
    assert life.finished == COMMIT * place, "whole commits"
    later = [story.lives[name].ledger for name in LOSSES[place + 1 :]]
    for ledger in (*later, story.ledger.read_bytes()):
        assert ledger.startswith(life.ledger), "what was acknowledged stays, byte for byte"


def test_the_answer_after_both_losses_is_that_of_the_run_undisturbed(
    command: Command, story: Story, home: Path
) -> None:
    assert story.last is not None
    assert_undisturbed(command, story.last, uninterrupted(home, ROUNDS))


def test_no_record_is_written_twice_and_no_finished_round_is_worked_on_again(story: Story) -> None:
    lines = [json.loads(line) for line in story.ledger.read_text().splitlines()]
    records = [(line["round"], line["shard"]) for line in lines if line["entry"] == "record"]
    assert sorted(records) == [(number, shard) for number in range(ROUNDS) for shard in range(SHARDS)]
    assert read_ledger(story.ledger).different == set(), "what was done again had the same bytes"
    assert [line["round"] for line in lines if line["entry"] == "opened"] == [0, COMMIT]
    firsts = re.findall(r"first round=(\d+)", (story.path / "log.txt").read_text())
    assert firsts == ["1", "1", str(COMMIT + 1)]


def test_a_killed_controller_is_told_at_once_in_one_line_with_how_to_go_on(story: Story) -> None:
    how = story.lives["controller"].ended
    assert how.code == 4 and how.seconds < 20.0
    assert re.fullmatch(
        rf"error: controller: it is gone \(its process ended .*\); go on with run --resume {story.path}", how.last_line
    )


@pytest.mark.slow
def test_a_run_that_lost_its_whole_cluster_says_so_and_is_gone_on_with_on_another(home: Path, tmp_path: Path) -> None:
    command = command_of(home, tmp_path, "lost", 2 * COMMIT)
    with command.standing_still(COMMIT + 1, command.config, "--actors", 1) as driver:
        family = psutil.Process(driver.pid).children(recursive=True)
        of_ray = [process for process in family if process.name() in ("raylet", "gcs_server")]
        assert len(of_ray) == 2
        for process in of_ray:
            process.kill()
        life = command.life(driver)
    assert life.ended.code == 4 and life.finished == COMMIT
    assert life.ended.last_line.startswith("error: cluster: its head at 127.0.0.1:")
    assert life.ended.last_line.endswith(f" is gone; go on with run --resume {command.path}")
    assert life.ended.seconds < 60.0, "before Ray ends the process without a word"
    last = command.run("--resume", command.path, "--json")
    assert last.code == 0, last.err
    assert_undisturbed(command, last, uninterrupted(home, 2 * COMMIT))
    assert (command.path / "ledger.jsonl").read_bytes().startswith(life.ledger)
