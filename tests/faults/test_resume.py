"""A run that is gone on with: records of its open rounds are duplicates, and every gradient has its round's fit."""

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.answers import Answer
from support.light import here, light_run
from support.ray_runs import run_here

from ray_probe.cluster.backend import RayBackend
from ray_probe.cluster.rounds import commit_group
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.fitter.ledger import read_ledger
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.run.backend import Stopped
from ray_probe.run.directory import RunDirectory
from ray_probe.run.messages import ShardSums
from ray_probe.run.preparation.prepared import PreparedRun, baseline_rule
from ray_probe.run.progress import Progress
from ray_probe.run.round_checks import check_baseline

pytestmark = pytest.mark.cluster

ROUNDS, COMMIT, SHARDS = 6, 3, 6
PLAN = {"leave_one_out": (1, True), "in_sample": (1, False), "lagged": (0, False)}
"""By `fit`: how far the version that a round's gradients use is past the round, and whether their own record is out."""


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[ShardSums]:
    """The gradients that the run has looked at."""
    seen: list[ShardSums] = []

    def check(report: ShardSums, fit: PublishedFit) -> None:
        check_baseline(report, fit)
        seen.append(report)

    monkeypatch.setattr(commit_group, "check_baseline", check)
    return seen


def stopped(backend: RayBackend, prepared: PreparedRun, directory: RunDirectory) -> None:
    """A run that is stopped in its fifth round, the second one since the commit, with half of its gradients in."""
    last: list[Progress] = []
    backend.load(prepared, wait_for=2)
    backend.open(directory)
    stop = lambda: bool(last) and last[-1].round == COMMIT + 1 and last[-1].accumulated >= 2  # noqa: E731
    with pytest.raises(Stopped):
        OfflineEntropyProbe(prepared.config, prepared.plan, backend, directory, last.append, stop).run()


def gone_on(backend: RayBackend, prepared: PreparedRun, directory: RunDirectory) -> Answer:
    """The rest of it, in which an actor dies once it has gradients of three rounds."""
    killed: list[int] = []

    def killer(progress: Progress) -> None:
        if not killed and progress.round == COMMIT + 2 and progress.accumulated >= 2 and len(backend.pids) == 2:
            killed.append(min(backend.pids.values()))
            os.kill(killed[0], signal.SIGKILL)

    backend.load(prepared, wait_for=2)
    backend.open(directory, [line.records for line in directory.finished_rounds()])
    result = OfflineEntropyProbe(prepared.config, prepared.plan, backend, directory, killer).run()
    assert killed
    return Answer(result, directory)


@pytest.mark.parametrize("fit", PLAN)
def test_what_is_done_again_after_a_resume_and_a_death_has_the_bits_and_the_fit_of_its_round(
    backend: RayBackend, files: Path, checked: list[ShardSums], fit: str
) -> None:
    sections: dict[str, Any] = {
        "batch": {"rounds": ROUNDS}, "output": {"commit_rounds": COMMIT}, "estimator": {"baseline": {"fit": fit}},
    }  # fmt: skip
    prepared = light_run(files, **sections)
    expected = run_here(prepared, f"{fit}-here", here(baseline_rule(prepared.config)))
    directory = RunDirectory.create(files, fit)
    stopped(backend, prepared, directory)
    assert len(directory.finished_rounds()) == COMMIT
    before, left = len(checked), directory.ledger.read_bytes()
    in_ledger = {key for key in read_ledger(directory.ledger).records if key[0] >= COMMIT}
    assert SHARDS < len(in_ledger) <= 2 * SHARDS, "all of a round, and some of the next"

    answer = gone_on(backend, prepared, directory)
    answer.assert_same(expected)
    assert directory.ledger.read_bytes().startswith(left)
    records = [(number, shard) for number in range(ROUNDS) for shard in range(SHARDS)]
    assert sorted(read_ledger(directory.ledger).records) == records
    counts = backend.fitter.counts()
    assert (counts.records, counts.conflicts, counts.openings) == (len(records), (), 2)
    assert counts.duplicates >= len(in_ledger), "each of them was done again, and counted once"

    assert {report.round for report in checked[before:]} == set(range(COMMIT, ROUNDS)), "no finished round again"
    past, out = PLAN[fit]
    for report in checked:
        assert (report.version, report.own_left_out) == (report.round + past, out)
    times = Counter((report.round, report.shard) for report in checked[before:])
    assert any(times[number, shard] > 1 for number in (COMMIT, COMMIT + 1) for shard in range(SHARDS)), (
        "after the death"
    )
