"""The fitter dies in the middle of a run, or is gone for good; and what comes late, from a process thought dead."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.answers import Answer
from support.failpoints import arm, fired
from support.light import POLICY, light_run
from support.light_rollout import LightRollout
from support.ray_runs import noted, run_on

from ray_probe.cluster.backend import RayBackend
from ray_probe.errors import ClusterError, RecordError
from ray_probe.run.messages import Delivery
from ray_probe.run.preparation.prepared import PreparedRun, baseline_rule
from ray_probe.run.progress import Listener, Progress

pytestmark = pytest.mark.cluster

SHARDS = 6
DEADLINE_S = 30.0


FITTER = {
    "fit_before_write": "1/2", "fit_torn": "1/2", "fit_after_fsync": "1/2",
    "close_before_write": "1", "close_torn": "1", "close_after_fsync": "1",
}  # fmt: skip


@pytest.mark.parametrize("place", FITTER)
def test_a_fitter_that_dies_in_a_run_costs_no_shard(
    backend: RayBackend, files: Path, points: Path, reference: Answer, place: str
) -> None:
    arm(points, place, only=FITTER[place])
    notes: list[str] = []
    answer = run_on(backend, light_run(files), place, noted(notes))
    assert fired(points, place) == 1
    answer.assert_same(reference)
    answer.assert_each_record_once()
    assert answer.result["counts"]["shards_retried"] == 0
    counts = backend.fitter.counts()
    assert (counts.records, counts.openings, counts.conflicts) == (3 * SHARDS, 2, ())
    # More may come: Ray can lose the answer to what was delivered while the process was made again.
    assert counts.duplicates >= (place == "fit_after_fsync"), "it was on disk, and is delivered again"
    assert (counts.torn_bytes > 0) == place.endswith("torn")
    assert sum("restored from its ledger" in note for note in notes) == 1


@pytest.mark.parametrize("who", ["fitter", "writer"])
def test_a_fitter_or_writer_that_is_gone_for_good_ends_the_run_and_the_next_gets_another(
    backend: RayBackend, files: Path, reference: Answer, who: str
) -> None:
    def killer(backend: RayBackend) -> Listener:
        def listen(progress: Progress) -> None:
            if progress.round == 1 and progress.accumulated == progress.shards:
                (backend.fitter if who == "fitter" else backend.writer).kill()

        return listen

    with pytest.raises(ClusterError, match=f"^{who}: does not answer") as failed:
        run_on(backend, light_run(files), f"without-{who}", killer)
    assert failed.value.exit_code == 4 and "\n" not in str(failed.value)
    run_on(backend, light_run(files), f"with-another-{who}").assert_same(reference)


def late_delivery(run: PreparedRun, same: bool) -> Delivery:
    """What another process has made of shard 1/2."""
    rollout = LightRollout(baseline_rule(run.config), POLICY)
    rollout.begin("of before")
    delivery = rollout.collect(run.plan.round(1)[2]).delivery
    if not same:
        delivery.packed[-2] += 1e-9
    return delivery


class Late:
    """Delivers a record when a run has got so far, and keeps what was answered."""

    def __init__(self, delivery: Delivery, when: Callable[[Progress], bool]) -> None:
        self.delivery = delivery
        self.when = when
        self.answer: str | None = None

    def __call__(self, backend: RayBackend) -> Listener:
        fitter = backend.fitter

        def listen(progress: Progress) -> None:
            if self.answer is None and self.when(progress):
                try:
                    self.answer = fitter.accept(fitter.session, self.delivery, DEADLINE_S).status
                except RecordError as error:
                    self.answer = str(error)

        return listen


@pytest.mark.parametrize(
    ("same", "number", "answered"),
    [
        (True, 1, "duplicate"), (True, 2, "duplicate"), (False, 1, "different"),
        (False, 2, "record: shard 2 of round 2 was committed with other bytes; this one is not merged"),
    ],
)  # fmt: skip
def test_what_a_process_that_was_thought_dead_delivers_late_changes_nothing_and_other_bytes_are_told(
    backend: RayBackend, files: Path, reference: Answer, same: bool, number: int, answered: str
) -> None:
    run = light_run(files)
    late = Late(late_delivery(run, same), lambda progress: progress.round == number and progress.accumulated >= 1)
    answer = run_on(backend, run, f"late-{number}-{same}", late)
    assert late.answer == answered
    assert answer.result["conflicts"] == ([] if same else ["1/2"])
    answer.result["conflicts"] = []
    answer.assert_same(reference)
    answer.assert_each_record_once()


def test_what_is_delivered_for_a_run_that_is_over_is_not_taken(backend: RayBackend, files: Path) -> None:
    run = light_run(files)
    run_on(backend, run, "over")
    session = backend.fitter.session
    answer = run_on(backend, run, "next")
    with pytest.raises(RecordError, match="an earlier measurement"):
        backend.fitter.accept(session, late_delivery(run, True), DEADLINE_S)
    answer.assert_each_record_once()
