"""Callers who come together share one piece of work, each with an answer of its own, and none is left waiting."""

import errno
import os
import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.failpoints import arm, failpoints_in
from support.records import POLICY, bits, delivery, rule, work_rounds

from ray_probe.errors import OutputError, RecordError
from ray_probe.fitter.fitter import Fitter
from ray_probe.fitter.host import FitterHost
from ray_probe.fitter.ledger import read_ledger
from ray_probe.fitter.shared_write import GroupCommit
from ray_probe.run.messages import Receipt

CALLERS = 8
WAIT_S = 30.0


class Doubling:
    """Doubles numbers, refuses 13, and lets the first group wait until `go` is set."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.go = threading.Event()
        self.begun = threading.Event()

    def __call__(self, group: Sequence[int]) -> list[int | Exception]:
        self.groups.append(list(group))
        self.begun.set()
        assert self.go.wait(WAIT_S)
        return [ValueError(str(number)) if number == 13 else 2 * number for number in group]


def after_a_first(work: Doubling, numbers: Sequence[int]) -> list[int | BaseException]:
    """What callers get who all come while the first call, of 0, is at work."""
    commit = GroupCommit(work)
    with ThreadPoolExecutor(len(numbers) + 1) as pool:
        first = pool.submit(commit, 0)
        assert work.begun.wait(WAIT_S)
        others = [pool.submit(commit, number) for number in numbers]
        while len(commit._waiting) < len(numbers):
            threading.Event().wait(0.001)
        work.go.set()
        assert first.result(WAIT_S) == 0
        return [other.exception(WAIT_S) or other.result() for other in others]


def test_who_comes_while_one_is_at_work_shares_the_next_piece_of_work_and_gets_its_own_answer():
    work = Doubling()
    assert after_a_first(work, [1, 2, 3, 4]) == [2, 4, 6, 8]
    assert [sorted(group) for group in work.groups] == [[0], [1, 2, 3, 4]]


def test_an_error_is_told_to_the_one_who_brought_it_alone():
    answers = after_a_first(Doubling(), [1, 13, 3])
    assert [answers[0], answers[2]] == [2, 6]
    assert isinstance(answers[1], ValueError) and str(answers[1]) == "13"


def test_what_the_work_itself_raises_is_told_to_all_and_the_next_call_goes_on():
    broken = [True]

    def work(group: Sequence[int]) -> Sequence[int | Exception]:
        if broken[0]:
            raise OutputError("disk full")
        return list(group)

    commit = GroupCommit(work)
    with pytest.raises(OutputError, match="disk full"):
        commit(1)
    broken[0] = False
    assert commit(2) == 2


def test_records_of_many_threads_are_each_on_disk_when_acknowledged_and_count_once(tmp_path: Path):
    host = FitterHost()
    opening = host.open(rule(), POLICY, tmp_path / "ledger.jsonl", [])
    shards = list(range(40)) * 2

    def deliver(shard: int) -> str:
        receipt = host.accept(opening, delivery(0, shard))
        assert (0, shard) in read_ledger(tmp_path / "ledger.jsonl").records
        return receipt.status

    with ThreadPoolExecutor(CALLERS) as pool:
        answers = list(pool.map(deliver, shards))
    assert sorted(answers) == ["accepted"] * 40 + ["duplicate"] * 40
    assert sorted(read_ledger(tmp_path / "ledger.jsonl").records) == [(0, shard) for shard in range(40)]
    with host.alone() as fitter:
        fitter.close_round(0, range(5))
    work_rounds(undisturbed := Fitter(rule(), POLICY), 1)
    assert bits(host.fitter) == bits(undisturbed)


def test_in_a_group_a_bad_record_is_no_others_concern_and_a_shard_twice_counts_once(tmp_path: Path):
    fitter = Fitter(rule(), POLICY, tmp_path / "ledger.jsonl")
    other_bytes = replace(delivery(0, 1), packed=delivery(0, 2).packed)
    torn = replace(delivery(0, 3), packed=delivery(0, 3).packed[:-1])
    late = replace(delivery(0, 4), round=7)
    first, refused, again, other, over = fitter.accept_all([delivery(0, 1), torn, delivery(0, 1), other_bytes, late])
    assert [answer.status for answer in (first, again, other) if isinstance(answer, Receipt)] == [
        "accepted", "duplicate", "different",
    ]  # fmt: skip
    assert isinstance(refused, RecordError) and isinstance(over, RecordError)
    assert list(read_ledger(tmp_path / "ledger.jsonl").records) == [(0, 1)]


def test_a_group_that_is_torn_was_not_acknowledged_and_its_whole_lines_count_once(tmp_path: Path):
    fitter = Fitter(rule(), POLICY, tmp_path / "ledger.jsonl")
    group = [delivery(0, shard) for shard in range(3)]
    with failpoints_in(tmp_path) as points:
        arm(points, "fit_torn", action="raise", only="0/2")
        with pytest.raises(RuntimeError, match="fit_torn 0/2"):
            fitter.accept_all(group)
    fitter.close()
    again = Fitter(rule(), POLICY, tmp_path / "ledger.jsonl")
    assert again.counts.torn_bytes > 0, "two whole lines and half of the third were written"
    statuses = [answer.status for answer in again.accept_all(group) if isinstance(answer, Receipt)]
    assert statuses == ["duplicate", "duplicate", "accepted"]
    work_rounds(again, 1)
    work_rounds(undisturbed := Fitter(rule(), POLICY), 1)
    assert bits(again) == bits(undisturbed)


def test_of_a_group_that_a_full_disk_does_not_take_nothing_counts_or_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fitter = Fitter(rule(), POLICY, tmp_path / "ledger.jsonl")
    before = (tmp_path / "ledger.jsonl").read_bytes()
    write, wrote = os.write, list[int]()

    def full(descriptor: int, data: bytes) -> int:
        if wrote:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        wrote.append(write(descriptor, data[: len(data) * 2 // 3]))
        return wrote[0]

    group = [delivery(0, shard) for shard in range(3)]
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OutputError, match="No space left"):
        fitter.accept_all(group)
    monkeypatch.undo()
    assert fitter.counts.records == 0 and (tmp_path / "ledger.jsonl").read_bytes() == before
    assert [answer.status for answer in fitter.accept_all(group) if isinstance(answer, Receipt)] == ["accepted"] * 3


def test_a_delivery_arrives_with_the_bits_that_were_sent():
    sent = replace(delivery(1, 2), packed=np.array([0.1, -0.0, 5e-324, 1e308]))
    came = pickle.loads(pickle.dumps(sent, protocol=5))
    assert came.packed.tobytes() == sent.packed.tobytes() and came.packed.dtype == np.float64
    assert (came.policy_id, came.features, came.round, came.shard, came.made_on) == (
        sent.policy_id, sent.features, sent.round, sent.shard, sent.made_on,
    )  # fmt: skip


def test_the_next_process_takes_deliveries_of_the_same_session(tmp_path: Path):
    state = tmp_path / "fitter.json"
    session = FitterHost(state, "an actor").open(rule(), POLICY, tmp_path / "ledger.jsonl", [])
    again = FitterHost(state, "an actor")
    assert again.accept(session, delivery(0, 0)).status == "accepted"
    assert again.accept(session, delivery(0, 0)).status == "duplicate"
