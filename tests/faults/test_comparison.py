"""Every process of a comparison dies, or cannot write: totals and beta have the bits of one process."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from support.answers import Answer
from support.failpoints import arm, fired
from support.light import here, light_run
from support.ray_runs import run_here, run_on

from ray_probe.cluster.backend import RayBackend
from ray_probe.controller.local_backend import LocalBackend
from ray_probe.errors import OutputError
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.run.backend import Stopped
from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation.prepared import PreparedRun, baseline_rule
from ray_probe.run.progress import Progress

pytestmark = pytest.mark.cluster

SHARDS, ROUNDS = 6, 3
AGAINST: dict[str, dict[str, Any]] = {
    "compare": {"against": "light-a"}, "batch": {"responses_per_prompt": 4}, "generation": {"top_p": 0.9},
}  # fmt: skip


def compared_run(files: Path, actors: int = 2) -> PreparedRun:
    return light_run(files, actors, **AGAINST)


@pytest.fixture(scope="module")
def compared(files: Path) -> Answer:
    prepared = compared_run(files)
    answer = run_here(prepared, "compared", here(baseline_rule(prepared.config)))
    change = answer.result["change"]
    assert change["total"]["value"] != 0.0 and change["outside"]["a_of_b"] > 0.0
    return answer


def assert_bits(answer: Answer, other: Answer) -> None:
    answer.assert_same(other)
    answer.assert_each_record_once()
    sums = [[totals.to_json()["change"] for totals in one.directory.restore(ROUNDS)] for one in (answer, other)]
    assert len(sums[0]) == ROUNDS and None not in sums[0] and sums[0] == sums[1]


DEATHS = {
    "an actor before its record is sent": ("roll_before_send", "1/3"),
    "an actor before its change is summed": ("roll_before_gradient", "1/3"),
    "the fitter in the middle of a record": ("fit_torn", "1/2"),
    "the fitter after a fit": ("close_after_fsync", "1"),
    "the writer after a commit": ("write_after_commit", "2"),
}


@pytest.mark.parametrize("case", DEATHS)
def test_a_process_of_a_comparison_that_is_killed_changes_no_bit(
    backend: RayBackend, files: Path, points: Path, compared: Answer, case: str
) -> None:
    place, only = DEATHS[case]
    arm(points, place, only=only)
    answer = run_on(backend, compared_run(files), "compared-" + case.replace(" ", "-"))
    assert fired(points, place) == 1
    assert_bits(answer, compared)
    assert (answer.result["counts"]["shards_retried"] > 0) == case.startswith("an actor")


def test_a_comparison_that_is_stopped_in_a_round_goes_on_to_the_same_bits(
    backend: RayBackend, files: Path, compared: Answer
) -> None:
    prepared, directory = compared_run(files), RunDirectory.create(files, "compared-stopped")
    last: list[Progress] = []

    def stop() -> bool:
        return bool(last) and last[-1].round == 1 and last[-1].accumulated >= 2

    backend.load(prepared, wait_for=2)
    backend.open(directory)
    with pytest.raises(Stopped):
        OfflineEntropyProbe(prepared.config, prepared.plan, backend, directory, last.append, stop).run()
    done = directory.finished_rounds()
    assert len(done) == 1
    backend.load(prepared, wait_for=2)
    backend.open(directory, [line.records for line in done])
    result = OfflineEntropyProbe(prepared.config, prepared.plan, backend, directory).run()
    assert_bits(Answer(result, directory), compared)


def worked_on(directory: RunDirectory, prepared: PreparedRun) -> Answer:
    """The run in this process, from its start or from where it ended."""
    rule = baseline_rule(prepared.config)
    backend = LocalBackend(here(rule), rule, prepared.policy_id, directory)
    return Answer(OfflineEntropyProbe(prepared.config, prepared.plan, backend, directory).run(), directory)


def test_a_comparison_whose_disk_is_full_goes_on_once_there_is_room(
    files: Path, compared: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, directory, write = compared_run(files), RunDirectory.create(files, "compared-full"), os.write
    written: list[int] = []

    def full(descriptor: int, data: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(directory.ledger):
            written.append(len(data))
            if len(written) > SHARDS + 3:
                write(descriptor, bytes(data)[:20])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OutputError, match="No space left on device"):
            worked_on(directory, prepared)
    assert len(directory.finished_rounds()) == 1
    assert_bits(worked_on(directory, prepared), compared)


def test_a_comparison_whose_ledger_is_torn_loses_what_is_torn_and_nothing_else(files: Path, compared: Answer) -> None:
    prepared, directory = compared_run(files), RunDirectory.create(files, "compared-torn")
    limited = light_run(files, **AGAINST | {"batch": {"responses_per_prompt": 4, "rounds": 2}})
    worked_on(directory, limited)
    torn = directory.ledger.read_bytes()
    directory.ledger.write_bytes(torn + torn.splitlines(keepends=True)[1][:40])
    assert_bits(worked_on(directory, prepared), compared)
    assert directory.ledger.read_bytes().startswith(torn)
