"""SIGTERM ends a run in every phase within 5 s and keeps its finished rounds.

The command itself, on clusters of its own. A failpoint holds the run in a phase; then its process group is signalled,
as `timeout` and batch systems do, or every one of its processes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support.checkpoints import raw_config
from support.failpoints import arm, fired

from ray_probe.run.directory import RunDirectory
from ray_probe.system.failpoints import VARIABLE

pytestmark = [pytest.mark.cluster, pytest.mark.own_cluster, pytest.mark.timeout(240)]

LAUNCH = Path(__file__).parents[2] / "launch.py"
PHASE_S = 120.0
END_S = 5.0
ROUNDS = 3


@dataclass(frozen=True)
class Phase:
    """Where a run is held.

    Attributes:
        point: the failpoint that it stands still at.
        only: its detail.
        rounds: finished then, at least.
        whole: all rounds are finished, and the result is on disk.
    """

    point: str
    only: str | None = None
    rounds: int = 0
    whole: bool = False


PHASES = {
    "start of Ray": Phase("head_before_ray"),
    "load": Phase("roll_before_load"),
    "rounds": Phase("roll_before_gradient", "1/0", 1),
    "commit": Phase("write_before_commit", "2", 1),
    "plots": Phase("plots_before_write", None, ROUNDS, True),
    "closing": Phase("end_before_close", None, ROUNDS, True),
}

QUICK = ("start of Ray", "commit")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of a path short enough for Ray's sockets, with all that the run and its Ray write."""
    path = Path(tempfile.mkdtemp(prefix="rps-", dir="/tmp"))
    for name in ("tmp", "points"):
        (path / name).mkdir()
    yield path
    shutil.rmtree(path)


class Command:
    """`launch.py run`, or `up`, as the leader of a process group, in a home of its own."""

    def __init__(self, place: Path, prefix: tuple[str, ...] = (), command: str = "run") -> None:
        self.place = place
        raw = raw_config(place, batch={"rounds": ROUNDS}, output={"name": "mine"}, cluster={"actors": 1})
        (place / "run.yaml").write_text(yaml.safe_dump(raw))
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own = {"HOME": str(place), "XDG_STATE_HOME": str(place / "state"), "TMPDIR": str(place / "tmp")}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(LAUNCH), command, str(place / "run.yaml")], text=True, process_group=0,
            env=kept | own | {VARIABLE: str(place / "points")}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.run = place / "runs" / "mine"

    def until(self, point: str) -> None:
        deadline = time.monotonic() + PHASE_S
        while not fired(self.place / "points", point):
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()
            time.sleep(0.02)

    def family(self) -> list[psutil.Process]:
        """The command's process, and all that it has started."""
        driver = psutil.Process(self.process.pid)
        return [driver, *driver.children(recursive=True)]

    def ended(self, send: Callable[[], Any]) -> str:
        """Send a signal; returns what the command says. It has ended in time, and all that it has started with it."""
        family = self.family()
        start = time.monotonic()
        send()
        out, said = self.process.communicate(timeout=60)
        seconds = time.monotonic() - start
        assert seconds < END_S, said
        assert out == "" and "Traceback" not in said
        _, left = psutil.wait_procs(family, 5)
        assert left == [], said
        assert list((self.place / "tmp").iterdir()) == [], "no private directory, and no token in it"
        assert list((self.place / "state").rglob("*.json")) == []
        return said


def assert_kept(command: Command, said: str, phase: Phase) -> None:
    """What the run left is what its finished rounds say, and the last line tells of it."""
    last = said.strip().splitlines()[-1]
    if not phase.rounds:
        assert last == "interrupted before the first round; nothing was written", said
        assert not command.run.exists()
        return
    rounds = len(RunDirectory.open(command.run).finished_rounds())
    assert rounds >= phase.rounds and (not phase.whole or rounds == ROUNDS)
    assert last == f"interrupted: {rounds} rounds are kept; go on with run --resume {command.run}", said
    result = json.loads((command.run / "result.json").read_text())
    assert result["counts"]["rounds"] == rounds
    assert list(command.run.glob("*.part")) == []


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in PHASES]
)
def test_sigterm_to_the_process_group_ends_a_run_in_every_phase(place: Path, name: str) -> None:
    phase = PHASES[name]
    arm(place / "points", phase.point, "sleep", only=phase.only, seconds=10 * PHASE_S)
    command = Command(place)
    command.until(phase.point)
    said = command.ended(lambda: os.killpg(command.process.pid, signal.SIGTERM))
    assert command.process.returncode == 130, said
    assert_kept(command, said, phase)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_each_process_of_a_run_ends_it_in_order(place: Path, number: signal.Signals) -> None:
    phase = PHASES["rounds"]
    arm(place / "points", phase.point, "sleep", only=phase.only, seconds=10 * PHASE_S)
    command = Command(place)
    command.until(phase.point)

    def send() -> None:
        for process in reversed(command.family()):
            process.send_signal(number)

    said = command.ended(send)
    assert command.process.returncode == 130, said
    assert_kept(command, said, phase)


@pytest.mark.slow
def test_timeout_ends_a_run_in_order(place: Path) -> None:
    phase = PHASES["rounds"]
    arm(place / "points", phase.point, "sleep", only=phase.only, seconds=10 * PHASE_S)
    command = Command(place, ("timeout", "--preserve-status", str(PHASE_S)))
    command.until(phase.point)
    said = command.ended(lambda: os.kill(command.process.pid, signal.SIGTERM))  # which it passes on as at its end
    assert command.process.returncode == 130, said
    assert_kept(command, said, phase)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["start of Ray", "load"])
def test_sigterm_ends_an_up_that_is_not_there_yet(place: Path, name: str) -> None:
    phase = PHASES[name]
    arm(place / "points", phase.point, "sleep", seconds=10 * PHASE_S)
    command = Command(place, command="up")
    command.until(phase.point)
    said = command.ended(lambda: os.killpg(command.process.pid, signal.SIGTERM))
    assert command.process.returncode == 130, said
    assert said.strip().splitlines()[-1] == "interrupted; what was started has been ended"


@pytest.mark.slow
def test_a_killed_driver_leaves_no_process_and_no_directory(place: Path) -> None:
    phase = PHASES["rounds"]
    arm(place / "points", phase.point, "sleep", only=phase.only, seconds=10 * PHASE_S)
    command = Command(place)
    command.until(phase.point)
    family = command.family()
    command.process.kill()
    assert command.process.wait(10) == -signal.SIGKILL
    _, left = psutil.wait_procs(family, 10)
    assert left == [] and list((place / "tmp").iterdir()) == []
    assert len(RunDirectory.open(command.run).finished_rounds()) >= phase.rounds


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["gcs_server", "raylet", "head"])
def test_a_lost_head_is_reported_at_once(place: Path, lost: str) -> None:
    phase = PHASES["rounds"]
    arm(place / "points", phase.point, "sleep", only=phase.only, seconds=10 * PHASE_S)
    command = Command(place)
    command.until(phase.point)
    family = command.family()
    (head,) = psutil.Process(command.process.pid).children()
    process = head if lost == "head" else next(one for one in family if one.name() == lost)
    start = time.monotonic()
    process.kill()
    _, said = command.process.communicate(timeout=60)
    assert time.monotonic() - start < 15, "Ray's own shutdown takes 5 s without a head"
    assert command.process.returncode == 4, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: cluster: its head at 127.0.0.1:") and last.endswith(f"run --resume {command.run}")
    _, left = psutil.wait_procs(family, 10)
    assert left == [] and list((place / "tmp").iterdir()) == []
    rounds = len(RunDirectory.open(command.run).finished_rounds())
    assert json.loads((command.run / "result.json").read_text())["counts"]["rounds"] == rounds >= 1
