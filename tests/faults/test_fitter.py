"""The fitter's process dies at any point: every shard counts once, versions never go back, beta has the same bits.

Records come from no model.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import cloudpickle
from support.failpoints import arm, fired
from support.records import POLICY, bits, delivery, other_bytes, rule

from ray_probe.cluster.actors.calls import kill
from ray_probe.cluster.actors.fitter import FITTER_THREADS, FitterActor, FitterHandle, fitter_actor
from ray_probe.errors import ClusterError, LedgerError, OutputError, RecordError
from ray_probe.fitter.fitter import Counts, Fitter
from ray_probe.fitter.ledger import read_ledger
from ray_probe.run.messages import Delivery, FitterSession, Receipt
from ray_probe.system.failpoints import fail_at

pytestmark = pytest.mark.cluster

SHARDS = 4
RECOVERY_S = 5.0
DEADLINE_S = 30.0
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


@pytest.fixture(scope="module")
def fitter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FitterHandle]:
    state = tmp_path_factory.mktemp("state") / "fitter.json"
    there = fitter_actor({}, state)
    yield there
    there.kill()
    assert not state.exists()


def send(fitter: FitterHandle, number: int, shard: int) -> str:
    assert fitter.session is not None
    return fitter.accept(fitter.session, delivery(number, shard), DEADLINE_S).status


def undisturbed(rounds: int) -> Fitter:
    fitter = Fitter(rule(), POLICY)
    for number in range(rounds):
        for shard in range(SHARDS):
            fitter.accept(delivery(number, shard))
        fitter.close_round(number, range(SHARDS))
    return fitter


class Poller(threading.Thread):
    """A client that asks for the version as often as it can."""

    def __init__(self, fitter: FitterHandle) -> None:
        super().__init__(daemon=True)
        self._fitter = fitter
        self._over = threading.Event()
        self.versions: list[int] = []
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.02):
            self.versions.append(self._fitter.beta().version)

    def wait_for(self, version: int) -> None:
        """Until it has heard of a version."""
        deadline = time.monotonic() + DEADLINE_S
        while not self.versions or self.versions[-1] < version:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self) -> None:
        self._over.set()
        self.join(DEADLINE_S)
        assert not self.is_alive()


KILLS = (
    "fit_before_write", "fit_torn", "fit_after_fsync", "close_before_write", "close_torn", "close_after_fsync",
    "idle", "idle", "idle", "idle",
)  # fmt: skip


@dataclass
class Round:
    """What a client has seen of a round in which the fitter was killed."""

    kill: str
    before: int = -1
    statuses: list[str] = field(default_factory=list)
    counts: Counts | None = None
    notes: list[str] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)


@dataclass
class Story:
    """A measurement with a kill in every round, and what is left of it."""

    path: Path
    rounds: list[Round]
    betas: list[dict[str, Any]]
    pids: list[int]
    versions: list[int]


@pytest.fixture(scope="module")
def story(fitter: FitterHandle, armed: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    path = tmp_path_factory.mktemp("story") / "ledger.jsonl"
    fitter.open(rule(), POLICY, path)
    poller, rounds, pids = Poller(fitter), [Round(kill) for kill in KILLS], []
    for number, part in enumerate(rounds):
        pids.append(fitter.pid())
        if part.kill == "idle":
            os.kill(pids[-1], signal.SIGKILL)
        else:
            arm(armed, part.kill, only=f"{number}/2" if part.kill.startswith("fit") else str(number))
        part.before = timed(part, lambda: fitter.beta().version)
        for shard in range(SHARDS):
            part.statuses.append(timed(part, lambda shard=shard, number=number: send(fitter, number, shard)))
        timed(part, lambda number=number: fitter.close_round(number, list(range(SHARDS)), 0))
        poller.wait_for(number + 1)
        part.counts, part.notes = fitter.counts(), fitter.new_notes()
    betas = [fitter.beta(version) for version in range(len(rounds) + 1)]
    poller.end()
    return Story(path, rounds, betas, pids, poller.versions)


def timed(part: Round, work: Callable[[], Any]) -> Any:
    started = time.monotonic()
    answer = work()
    part.waits_s.append(time.monotonic() - started)
    return answer


@pytest.mark.parametrize("number", range(len(KILLS)), ids=lambda number: f"{number}-{KILLS[number]}")
def test_a_fitter_that_is_killed_at_any_point_counts_every_shard_once(story: Story, number: int) -> None:
    part, torn = story.rounds[number], KILLS[number].endswith("torn")
    again = ["accepted", "accepted", "duplicate", "accepted"] if part.kill == "fit_after_fsync" else ["accepted"] * 4
    assert part.statuses == again, "a record that was written before the fitter died is a duplicate when it is resent"
    assert story.betas[number + 1] == undisturbed(number + 1).beta(), "the fit, to the bit"
    assert part.counts is not None and part.counts.records == (number + 1) * SHARDS
    assert (part.counts.openings, part.counts.conflicts) == (number + 2, ())
    assert sum("restored from its ledger" in note for note in part.notes) == 1
    assert sum("were cut off; it had not been acknowledged" in note for note in part.notes) == torn


def test_a_published_version_never_goes_back_over_ten_kills(story: Story) -> None:
    assert len(set(story.pids)) == len(KILLS) == 10
    assert [part.before for part in story.rounds] == list(range(10))
    assert story.versions == sorted(story.versions) and set(story.versions) >= set(range(1, 11))


def test_a_killed_fitter_answers_again_within_five_seconds(story: Story) -> None:
    waits_s = sorted(max(part.waits_s) for part in story.rounds)
    assert waits_s[len(waits_s) // 2] < RECOVERY_S, "the median: the machine may be busy with something else"


def test_what_is_left_of_ten_lives_is_the_ledger_of_one(story: Story) -> None:
    assert bits(Fitter(rule(), POLICY, story.path)) == bits(undisturbed(len(KILLS)))
    contents = read_ledger(story.path)
    assert sorted(contents.records) == [(number, shard) for number in range(10) for shard in range(SHARDS)]
    assert [closed.shards for closed in contents.closed] == [tuple(range(SHARDS))] * 10


class Sender:
    """What a rollout actor does with a record that it has."""

    def pid(self) -> int:
        return os.getpid()

    def send(self, fitter: Any, session: FitterSession, record: Delivery) -> str:
        return FitterHandle(fitter).accept(session, record, DEADLINE_S).status


@pytest.mark.parametrize("same", [True, False])
def test_a_zombie_that_delivers_beside_its_replacement_changes_nothing_and_other_bytes_are_told(
    fitter: FitterHandle, points: Path, tmp_path: Path, same: bool
) -> None:
    fitter.open(rule(), POLICY, tmp_path / "ledger.jsonl")
    zombie = ray.remote(Sender).options(num_cpus=0).remote()
    pid = ray.get(zombie.pid.remote(), timeout=DEADLINE_S)
    os.kill(pid, signal.SIGSTOP)
    late = zombie.send.remote(fitter.actor, fitter.session, delivery(0, 1) if same else other_bytes(0, 1))
    for shard in range(SHARDS):
        assert send(fitter, 0, shard) == "accepted"
    fitter.close_round(0, list(range(SHARDS)), 0)
    os.kill(pid, signal.SIGCONT)
    assert ray.get(late, timeout=DEADLINE_S) == ("duplicate" if same else "different")
    kill(zombie)
    counts = fitter.counts()
    assert (counts.duplicates, counts.conflicts) == ((1, ()) if same else (0, ((0, 1),)))
    assert any("shard 1 of round 1 came again with other bytes" in note for note in fitter.new_notes()) is not same
    assert fitter.beta() == undisturbed(1).beta(), "the first record stays"
    os.kill(fitter.pid(), signal.SIGKILL)
    assert fitter.counts().conflicts == (() if same else ((0, 1),)), "told by the next life too"


def test_a_full_disk_is_told_and_the_shard_is_not_acknowledged(fitter: FitterHandle, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    fitter.open(rule(), POLICY, path)
    send(fitter, 0, 0)
    before = path.read_bytes()
    process = psutil.Process(fitter.pid())
    process.rlimit(psutil.RLIMIT_FSIZE, (len(before) + 20, -1))
    with pytest.raises(OutputError, match=r"ledger\.jsonl: cannot be written \(File too large\); .*--resume") as told:
        send(fitter, 0, 1)
    assert "\n" not in str(told.value) and path.read_bytes() == before
    with pytest.raises(OutputError, match="cannot be written"):
        fitter.close_round(0, [0], 0)
    assert fitter.beta().version == 0
    process.rlimit(psutil.RLIMIT_FSIZE, (-1, -1))
    assert [send(fitter, 0, shard) for shard in (0, 1)] == ["duplicate", "accepted"]


def test_a_ledger_that_cannot_be_gone_on_from_is_told_by_the_next_life_in_its_own_words(
    fitter: FitterHandle, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.jsonl"
    fitter.open(rule(), POLICY, path)
    send(fitter, 0, 0)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"shard":0', b'"shard":7'))
    os.kill(fitter.pid(), signal.SIGKILL)
    with pytest.raises(LedgerError, match=r"ledger\.jsonl: entry 2, at byte \d+, is damaged") as told:
        send(fitter, 0, 1)
    assert told.value.exit_code == 2
    before = fitter.session
    fitter.open(rule(), POLICY, tmp_path / "other.jsonl")
    assert send(fitter, 0, 0) == "accepted", "the next measurement has a ledger of its own"
    with pytest.raises(RecordError, match="an earlier measurement"):
        fitter.accept(before, delivery(0, 1), DEADLINE_S)


def test_a_fitter_that_is_gone_for_good_is_told_at_once_and_one_that_stands_still_at_the_deadline(
    tmp_path: Path,
) -> None:
    fitter = fitter_actor({}, tmp_path / "fitter.json")
    session = fitter.open(rule(), POLICY, tmp_path / "ledger.jsonl")
    process = psutil.Process(fitter.pid())
    process.suspend()
    with pytest.raises(ClusterError, match=r"^fitter: no answer in 1 s; go on with run --resume$"):
        fitter.accept(session, delivery(0, 0), 1.0)
    process.resume()
    fitter.kill()
    process.wait(DEADLINE_S)  # Ray ends it in its own time; until then it may answer
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"^fitter: does not answer .*; go on with run --resume$"):
        send(fitter, 0, 0)
    assert time.monotonic() - started < 5 and not fitter.answers()


def test_the_fitter_answers_while_it_is_busy(tmp_path: Path) -> None:
    class Busy(FitterActor):
        def close_round(self, *arguments: Any) -> Any:
            time.sleep(3)

    remote = ray.remote(concurrency_groups=FITTER_THREADS)(Busy)
    fitter = FitterHandle(remote.options(num_cpus=0).remote())
    fitter.open(rule(), POLICY, tmp_path / "busy.jsonl")
    solving = fitter.actor.close_round.remote()
    assert fitter.beta(0, deadline_s=2).version == fitter.variance(deadline_s=2).version == 0
    assert not ray.wait([solving], timeout=0)[0], "it is at it still"
    fitter.kill()


def test_of_records_that_come_together_none_is_lost_or_doubled_when_the_fitter_dies_in_the_middle(
    fitter: FitterHandle, points: Path, tmp_path: Path
) -> None:
    fitter.open(rule(), POLICY, tmp_path / "ledger.jsonl")
    senders = [ray.remote(Sender).options(num_cpus=0).remote() for _ in range(3)]
    for number in range(2):
        arm(points, "fit_torn" if number else "fit_after_fsync", only=f"{number}/3")
        sent = [
            senders[shard % len(senders)].send.remote(fitter.actor, fitter.session, delivery(number, shard))
            for shard in range(SHARDS)
        ]
        assert set(ray.get(sent, timeout=DEADLINE_S)) <= {"accepted", "duplicate"}
        assert fired(points, "fit_torn" if number else "fit_after_fsync") == 1
        fitter.close_round(number, list(range(SHARDS)), 0)
    for sender in senders:
        kill(sender)
    assert fitter.counts().records == 2 * SHARDS
    assert fitter.beta() == undisturbed(2).beta()


class NaiveFitter:
    """The control: adds what it is sent, on disk before it answers, and knows no ids."""

    def __init__(self, path: str) -> None:
        self._path = path

    def accept(self, session: FitterSession, record: Delivery) -> Receipt:
        with open(self._path, "a") as stream:
            stream.write("one more\n")
            stream.flush()
            os.fsync(stream.fileno())
        fail_at("naive_after_fsync", f"{record.round}/{record.shard}")
        return Receipt("accepted")


def test_control_without_ids_a_shard_is_counted_twice(points: Path, tmp_path: Path) -> None:
    arm(points, "naive_after_fsync", only="0/7")
    naive = ray.remote(NaiveFitter).options(num_cpus=0, max_restarts=-1).remote(str(tmp_path / "counter"))
    for shard in range(20):
        FitterHandle(naive).accept(FitterSession(""), delivery(0, shard), DEADLINE_S)
    kill(naive)
    assert len((tmp_path / "counter").read_text().splitlines()) == 21, "20 shards"
