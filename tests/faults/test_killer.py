"""Twelve SIGKILLs at seeded moments over all roles, the driver among them, during 150 shards.

A moment is so many records in the ledger, and a seeded part of a second: so the kills fall all over the run, however
fast the machine is. What is killed is a process, found from outside.
"""

import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from support.answers import Answer
from support.drive import SHARDS, driven_config
from support.light import here, light_prepared
from support.processes import actors_of
from support.ray_runs import run_here

from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation.prepared import baseline_rule

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(450)]

SEED = 20260501
ROUNDS = 15
SHARD_S = 0.02
ROLES = ("LightActor",) * 5 + ("FitterActor",) * 3 + ("WriterActor",) * 2 + ("driver",) * 2
LONGEST_PAUSE_S = 0.3
SLOWER = 8
DEADLINE_S = 200.0


@dataclass
class Drive:
    """A run by drivers in processes of their own, one after the other where one is killed."""

    address: str
    path: Path
    shard_s: float = SHARD_S
    process: subprocess.Popen[bytes] = field(init=False)

    def begin(self) -> None:
        arguments = [self.address, str(self.path), str(self.shard_s), str(ROUNDS)]
        self.process = subprocess.Popen([sys.executable, "-m", "support.drive", *arguments])

    @property
    def records(self) -> int:
        """Records in the ledger."""
        ledger = self.path / "ledger.jsonl"
        return ledger.read_bytes().count(b'"entry":"record"') if ledger.exists() else 0

    @property
    def answer(self) -> Answer:
        directory = RunDirectory(self.path)
        return Answer(directory.result(), directory)


@dataclass
class Killer:
    """Kills what a seed says, when it says so."""

    drive: Drive
    killed: list[str] = field(default_factory=list)

    def work(self) -> None:
        """Returns when the run has ended by itself."""
        numbers = random.Random(SEED)
        roles = list(ROLES)
        numbers.shuffle(roles)
        moments = sorted(numbers.sample(range(1, (ROUNDS - 2) * SHARDS), len(roles)))
        deadline = time.monotonic() + DEADLINE_S
        while self.drive.process.poll() is None:
            assert time.monotonic() < deadline
            if len(self.killed) < len(roles) and self.drive.records >= moments[len(self.killed)]:
                time.sleep(numbers.uniform(0.0, LONGEST_PAUSE_S))
                self._kill(roles[len(self.killed)])
            time.sleep(0.01)

    def _kill(self, role: str) -> None:
        if role == "driver":
            self.drive.process.kill()
            self.drive.process.wait()
            self.drive.begin()
        else:
            self._one_of(role).kill()
        self.killed.append(role)

    def _one_of(self, role: str) -> psutil.Process:
        while not (there := actors_of(role)):
            assert self.drive.process.poll() is None
            time.sleep(0.05)
        return there[-1]


def fault_free_s(address: str, path: Path) -> float:
    """Wall time of the run that nothing happens to, seconds."""
    drive, started = Drive(address, path), time.monotonic()
    drive.begin()
    assert drive.process.wait(DEADLINE_S) == 0
    return time.monotonic() - started


def test_twelve_kills_over_all_roles_lose_nothing_and_double_nothing(cluster: str, files: Path) -> None:
    prepared = light_prepared(driven_config(files, ROUNDS))
    expected = run_here(prepared, "expected", here(baseline_rule(prepared.config)))
    undisturbed_s = fault_free_s(cluster, files / "undisturbed")
    drive = Drive(cluster, files / "killed")
    killer, started = Killer(drive), time.monotonic()
    drive.begin()
    killer.work()
    wall_s = time.monotonic() - started
    assert drive.process.returncode == 0
    assert sorted(killer.killed) == sorted(ROLES) and len(killer.killed) == 12
    answer = drive.answer
    answer.assert_same(expected)
    answer.assert_each_record_once()
    assert answer.result["counts"]["shards"] == ROUNDS * SHARDS == 150
    if wall_s > SLOWER * undisturbed_s:  # the machine may have become busy with something else meanwhile
        undisturbed_s = max(undisturbed_s, fault_free_s(cluster, files / "undisturbed-again"))
    print(
        f"{wall_s:.1f} s with {len(killer.killed)} kills, {undisturbed_s:.1f} s without: {wall_s / undisturbed_s:.1f}"
    )
    assert wall_s <= SLOWER * undisturbed_s
