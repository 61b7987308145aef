"""Fault in, action out: every fault in every situation, deadlines by a fake clock, and no replacing without end."""

from typing import Any

import pytest

from ray_probe.cluster.actors.task_errors import concerns_the_run
from ray_probe.cluster.pool.clock import LEAP_S, LookClock
from ray_probe.cluster.pool.failure_policy import (
    MAX_FAILED_STARTS,
    MAX_IDLE_DEATHS,
    MAX_REFUSALS,
    MAX_SPARED,
    WAIT,
    AnswersAgain,
    Decision,
    Died,
    Fault,
    Limits,
    NoRoom,
    Quiet,
    Raised,
    RestartBudget,
    Situation,
    Unreachable,
    decide,
    is_charged,
    refuses_the_checkpoint,
)
from ray_probe.cluster.pool.worker import Worker
from ray_probe.cluster.rounds.fitter_monitor import FITTER_SILENT_S, fitter_hangs
from ray_probe.errors import (
    CheckpointError,
    ClusterError,
    GradientError,
    LedgerError,
    NonFiniteError,
    OutputError,
    ProbeError,
    RecordError,
    ShardError,
)

LIMITS = Limits(
    stall_deadline_s=300, start_deadline_s=600, place_deadline_s=30, idle_deadline_s=60, unreachable_deadline_s=20
)
WORKING, IDLE, STARTING = Situation("working"), Situation("idle"), Situation("starting")
REPLACEMENT = Situation("starting", loaded_elsewhere=True, placed_elsewhere=True)
REFUSED = Situation("starting", refused=True)
NO_DISK, BAD_MODEL = OutputError("ledger.jsonl: cannot be written"), CheckpointError("model.path: other weights")
NO_DEVICE, NOT_FINITE = ClusterError("cluster.gpus_per_actor: none"), NonFiniteError("logits: NaN")


class OutOfMemoryError(RuntimeError):
    """Of the same name as torch's."""


class AcceleratorError(RuntimeError):
    """Of the same name as torch's."""


def raised(error: Exception) -> Raised:
    return Raised(error, "told")


def gone(cause: str, shard: Any = None, by_memory: bool = False) -> Decision:
    return Decision(cause, replace=True, shard=shard, by_memory=by_memory)


def stays(by_memory: bool = False) -> Decision:
    return Decision("told", replace=False, shard="charged", by_memory=by_memory)


def ends(error: ProbeError) -> Decision:
    return Decision("told", error=error)


NOT_REACHED = "not reachable for 20 s (reset)"
CAME_BACK = "was not reachable for a while (reset)"
TABLE = [
    ("an error of the task", raised(RuntimeError("shapes")), WORKING, stays()),
    ("NaN in one shard", raised(NOT_FINITE), WORKING, stays()),
    ("a shard that is not held", raised(ShardError("collect it first")), WORKING, stays()),
    ("memory of the device", raised(OutOfMemoryError("CUDA out of memory")), WORKING, stays(by_memory=True)),
    ("memory of the node", raised(RuntimeError("can't allocate memory: 8 bytes")), WORKING, stays(by_memory=True)),
    ("a broken device", raised(AcceleratorError("illegal access")), WORKING, gone("told", "charged")),
    ("a broken device, older torch", raised(RuntimeError("CUDA error: assert")), WORKING, gone("told", "charged")),
    ("a full disk", raised(NO_DISK), WORKING, ends(NO_DISK)),
    ("a fitter that is gone", raised(NO_DEVICE), WORKING, ends(NO_DEVICE)),
    ("a checkpoint that cannot be loaded", raised(BAD_MODEL), STARTING, ends(BAD_MODEL)),
    ("no device", raised(NO_DEVICE), STARTING, ends(NO_DEVICE)),
    ("a checkpoint that another has loaded", raised(BAD_MODEL), REPLACEMENT, gone("told")),
    ("a checkpoint that was refused", raised(BAD_MODEL), REFUSED, WAIT),
    ("a bug in the start", raised(RuntimeError("no such device")), STARTING, gone("told")),
    ("death at a shard", Died("SIGKILL", by_memory=True), WORKING, gone("SIGKILL", "charged", True)),
    ("death with the node", Died("node", node_lost=True), WORKING, gone("node", "spared")),
    ("death while idle", Died("SIGKILL"), IDLE, gone("SIGKILL")),
    ("death at the start", Died("exit 1"), STARTING, gone("exit 1")),
    ("a hiccup at a shard", Unreachable("reset", 19.9), WORKING, WAIT),
    ("a hiccup while idle", Unreachable("reset", 19.9), IDLE, WAIT),
    ("out of reach at a shard", Unreachable("reset", 20.0), WORKING, gone(NOT_REACHED, "spared")),
    ("out of reach while idle", Unreachable("reset", 20.0), IDLE, gone(NOT_REACHED)),
    ("out of reach at the start", Unreachable("reset", 20.0), STARTING, gone(NOT_REACHED)),
    ("back, with a shard in unknown state", AnswersAgain("reset"), WORKING, gone(CAME_BACK, "spared")),
    ("back at the start", AnswersAgain("reset"), STARTING, gone(CAME_BACK)),
    ("back, and it had nothing to do", AnswersAgain("reset"), IDLE, WAIT),
    ("a slow token", Quiet(300.0), WORKING, WAIT),
    ("no token", Quiet(300.1), WORKING, gone("no token in 300 s", "charged")),
    ("a slow start", Quiet(600.0), STARTING, WAIT),
    ("no start", Quiet(600.1), STARTING, gone("did not start in 600 s")),
    ("a slow answer", Quiet(60.0), IDLE, WAIT),
    ("no answer", Quiet(60.1), IDLE, gone("idle, and no answer in 60 s")),
    ("no room yet", NoRoom(30.0, 2, "1 GPU", "0 GPU"), STARTING, WAIT),
    ("no room for one more", NoRoom(999.0, 2, "1 GPU", "0 GPU"), REPLACEMENT, WAIT),
]


@pytest.mark.parametrize(("fault", "situation", "decision"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_every_fault_has_its_action(fault: Fault, situation: Situation, decision: Decision) -> None:
    assert decide(fault, situation, LIMITS) == decision


def test_no_room_for_anybody_ends_the_run_with_what_is_asked_and_what_is_free() -> None:
    error = decide(NoRoom(30.1, 2, "1 CPU, 1 GPU", "4 CPU, 0 GPU"), STARTING, LIMITS).error
    assert isinstance(error, ClusterError) and error.exit_code == 4
    assert str(error).startswith("cluster.actors: got 2; none was placed in 30 s: each asks for 1 CPU, 1 GPU, free are")


@pytest.mark.parametrize("fault", [fault for _, fault, _, _ in TABLE], ids=[row[0] for row in TABLE])
def test_a_shard_is_charged_or_spared_exactly_when_one_is_in_hand(fault: Fault) -> None:
    for situation in (WORKING, IDLE, STARTING, REPLACEMENT, REFUSED):
        decision = decide(fault, situation, LIMITS)
        leaves_it = decision != WAIT and decision.error is None
        assert (decision.shard is not None) == (situation.doing == "working" and leaves_it)
        assert decision.cause or decision == WAIT, "people are told why"


@pytest.mark.parametrize("kind", [NonFiniteError, ShardError, ValueError, MemoryError, ZeroDivisionError])
def test_an_error_of_one_shard_does_not_end_the_run(kind: type[Exception]) -> None:
    assert not concerns_the_run(kind("x"))


@pytest.mark.parametrize("kind", [OutputError, LedgerError, RecordError, CheckpointError, ClusterError, GradientError])
def test_an_error_of_the_run_ends_it_with_its_own_type_and_exit_code(kind: type[ProbeError]) -> None:
    decision = decide(raised(kind("x")), WORKING, LIMITS)
    assert type(decision.error) is kind and decision.error.exit_code == kind.exit_code


def test_a_shard_is_not_spared_for_ever() -> None:
    assert [is_charged("spared", before) for before in (0, MAX_SPARED - 1, MAX_SPARED)] == [False, False, True]
    assert is_charged("charged", 0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.watch = LookClock(self.now)

    def after(self, seconds: float) -> float:
        self.now += seconds
        return self.watch.look(self.now)


class Handle:
    """Of an actor that is asked and never answers by itself."""

    def __init__(self) -> None:
        self.asked = 0

    def tokens_done(self) -> str:
        self.asked += 1
        return f"reference {self.asked}"


def at_a_shard(clock: Clock) -> Worker:
    worker = Worker(Handle(), had_room=True, since=clock.after(0))
    worker.submit("collect 0/0", 0, "reference 0", clock.after(0))
    return worker


def verdict(worker: Worker, now: float) -> Decision:
    return decide(Quiet(worker.quiet_s(now)), Situation(worker.doing), LIMITS)


def test_a_long_response_is_not_killed_for_being_long() -> None:
    clock = Clock()
    worker = at_a_shard(clock)
    for tokens in range(2000):  # more than two days
        now = clock.after(4.0)
        worker.answered(tokens // 25, now, now)  # a token in 100 s
        assert verdict(worker, now) == WAIT


def test_a_shard_without_a_token_more_is_stopped_at_its_deadline_however_well_the_actor_answers() -> None:
    clock = Clock()
    worker = at_a_shard(clock)
    worker.answered(7, clock.after(1.0), clock.after(0))
    ends_s = 0.0
    while verdict(worker, clock.after(1.0)) == WAIT:
        ends_s += 1.0
        worker.answered(7, clock.after(0), clock.after(0))
    assert ends_s == pytest.approx(LIMITS.stall_deadline_s, abs=2.0)


@pytest.mark.parametrize("gap_s", [3600.0, 1e7, -1e6])
def test_a_pause_of_our_own_or_a_leap_of_the_clock_counts_against_nobody(gap_s: float) -> None:
    clock = Clock()
    worker = at_a_shard(clock)
    before = clock.after(1.0)
    assert before <= clock.after(gap_s) <= before + LEAP_S
    assert verdict(worker, clock.after(0)) == WAIT
    while verdict(worker, clock.after(1.0)) == WAIT:
        assert clock.watch.seconds < LIMITS.stall_deadline_s + LEAP_S, (
            "it is stopped all the same, by the seconds after"
        )


def test_time_is_counted_as_it_passes_when_nobody_paused() -> None:
    clock = Clock()
    assert sum(0.5 for _ in range(100) if clock.after(0.5)) == clock.watch.seconds == 50.0


def test_who_was_not_heard_of_lately_is_asked_once_and_who_was_is_not() -> None:
    clock = Clock()
    worker = Worker(Handle(), had_room=True, since=clock.after(0))
    worker.heard_at = clock.after(0)
    worker.ask(clock.after(LIMITS.fresh_s / 2), LIMITS)
    assert worker.handle.asked == 0
    for _ in range(3):
        worker.ask(clock.after(LIMITS.fresh_s), LIMITS)
    assert worker.handle.asked == 1, "one question at a time"
    busy = at_a_shard(clock)
    busy.ask(clock.after(LIMITS.ask_every_s / 2), LIMITS)
    assert busy.heartbeat is None
    busy.ask(clock.after(LIMITS.ask_every_s), LIMITS)
    assert busy.heartbeat is not None


def test_starting_that_fails_three_times_in_a_row_is_not_tried_again_until_that_is_forgiven() -> None:
    starts = RestartBudget()
    for _ in range(MAX_FAILED_STARTS - 1):
        starts.lost("starting")
    starts.worked()
    for _ in range(MAX_FAILED_STARTS):
        assert starts.go_on(asked=1)
        starts.lost("starting")
    assert not starts.go_on(asked=1)
    starts.forgive()
    assert starts.go_on(asked=1)


def test_a_checkpoint_that_was_refused_three_times_is_refused_in_later_rounds_too() -> None:
    refused = Raised(CheckpointError("model.path: overwritten"), "overwritten")
    assert refuses_the_checkpoint(refused, Situation("starting", loaded_elsewhere=True))
    assert not refuses_the_checkpoint(refused, Situation("working"))
    assert not refuses_the_checkpoint(Raised(ClusterError("no CUDA device"), ""), Situation("starting"))
    starts = RestartBudget()
    for _ in range(MAX_REFUSALS):
        assert starts.go_on(asked=4)
        starts.lost("starting", refused=True)
        starts.forgive()  # a round begins
        starts.worked()
    assert starts.refused and not starts.go_on(asked=4)
    starts.reset()
    assert starts.go_on(asked=4), "there is another checkpoint, or a person asks"


def test_actors_that_die_idle_are_not_replaced_without_end_and_deaths_at_shards_do_not_count() -> None:
    starts = RestartBudget()
    for _ in range(1000):
        starts.lost("working")
    for _ in range(2 * MAX_IDLE_DEATHS):
        assert starts.go_on(asked=2)
        starts.worked()  # each of them had started well
        starts.lost("idle")
    assert not starts.go_on(asked=2)


def test_a_silent_fitter_is_killed_once_until_it_answers() -> None:
    assert not fitter_hangs(FITTER_SILENT_S, FITTER_SILENT_S, killed=False)
    assert fitter_hangs(FITTER_SILENT_S + 0.1, FITTER_SILENT_S, killed=False)
    assert not fitter_hangs(10 * FITTER_SILENT_S, FITTER_SILENT_S, killed=True)
