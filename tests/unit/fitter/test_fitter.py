"""The fitter counts each shard once, gives one answer whatever the order, and comes back from its ledger."""

import errno
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.records import CAP, FEATURES, POLICY, bits, delivery, other_bytes, rule, some_record, work_rounds

from ray_probe.core.estimator.baselines import BaselineRule, Fit
from ray_probe.core.estimator.records import Record, Shape
from ray_probe.core.estimator.ridge import solve
from ray_probe.core.estimator.variance import in_sample_mean_squares
from ray_probe.errors import ConfigError, LedgerError, OutputError, RecordError
from ray_probe.fitter.fitter import Counts, Fitter
from ray_probe.fitter.ledger import read_ledger
from ray_probe.fitter.ledger_format import encode
from ray_probe.run.messages import Delivery, InSample

FITS: tuple[Fit, ...] = ("leave_one_out", "in_sample", "lagged")


def test_a_shard_is_accepted_once_however_often_it_comes():
    fitter = Fitter(rule(), POLICY)
    first, again = fitter.accept(delivery(0, 3)), fitter.accept(delivery(0, 3))
    assert (first.status, first.kept) == ("accepted", None)
    assert (again.status, again.kept) == ("duplicate", None)
    fit = fitter.close_round(0, [3])
    assert fit.total.pack().tobytes() == some_record(0, 3).pack().tobytes()
    assert fitter.accept(delivery(0, 3)).status == "duplicate", "also once its round is closed"
    assert fitter.current.total.sequences == 4


def test_of_two_records_for_a_shard_the_first_counts_and_is_handed_back():
    fitter = Fitter(rule(), POLICY)
    fitter.accept(delivery(0, 3))
    receipt = fitter.accept(other_bytes(0, 3))
    assert receipt.status == "different"
    assert receipt.kept.tobytes() == delivery(0, 3).packed.tobytes()
    assert fitter.close_round(0, [3]).total.pack().tobytes() == delivery(0, 3).packed.tobytes()
    late = fitter.accept(other_bytes(0, 3))
    assert (late.status, late.kept.tobytes()) == ("different", delivery(0, 3).packed.tobytes())


def test_what_the_sender_does_to_its_array_changes_nothing():
    fitter, sent = Fitter(rule(), POLICY), delivery(0, 0)
    fitter.accept(sent)
    sent.packed[5:] = 1.0
    assert fitter.accept(delivery(0, 0)).status == "duplicate"
    assert fitter.close_round(0, [0]).total.pack().tobytes() == delivery(0, 0).packed.tobytes()


def with_record(record: Record) -> Delivery:
    return replace(delivery(0, 1), packed=record.pack())


REFUSED = {
    "other policy": (replace(delivery(0, 1), policy_id="other"), r"policy_id: got 'other'; the run has '0123abcd'"),
    "other features": (replace(delivery(0, 1), features=("H", "top1", "margin")), "features: got .*margin"),
    "other order of features": (replace(delivery(0, 1), features=FEATURES[::-1]), "features: got"),
    "past round": (replace(delivery(0, 1), round=-1), "shard: got -1/1; need two integers"),
    "later round": (delivery(1, 1), "round: got 2; round 1 is open"),
    "more features than the run": (with_record(Record.zero(Shape(4, 1, CAP))), "features=4.*features=3"),
    "other bins": (with_record(Record.zero(Shape(3, 1, 9))), "bins=9"),
    "no sequence": (with_record(Record.zero(rule().shape)), "0 sequences"),
    "NaN in the sums": (
        with_record(replace(some_record(0, 1), target_sum_K=np.array([np.nan]))), "NaN or infinity.* not merged",
    ),
    "negative shard": (replace(delivery(0, 1), shard=-1), "shard: got 0/-1; need two integers >= 0"),
    "half a shard": (replace(delivery(0, 1), shard=0.5), "got 0/0.5; need two integers"),  # type: ignore[arg-type]
    "larger than any shard's": (
        replace(delivery(0, 1), packed=np.zeros(300_000)), "got 300000 numbers; this run's have at most 262268",
    ),
    "no array": (replace(delivery(0, 1), packed=[1.0, 2.0]), "need a float64 vector"),  # type: ignore[arg-type]
    "torn": (replace(delivery(0, 1), packed=delivery(0, 1).packed[:-1]), "do not fit its own header"),
    "float32": (replace(delivery(0, 1), packed=delivery(0, 1).packed.astype(np.float32)), "float64"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_the_run_is_refused_and_not_merged(case: str, tmp_path: Path):
    bad, reason = REFUSED[case]
    fitter = Fitter(rule(), POLICY, tmp_path / "ledger.jsonl")
    fitter.accept(delivery(0, 0))
    with pytest.raises(RecordError, match=reason):
        fitter.accept(bad)
    assert list(read_ledger(tmp_path / "ledger.jsonl").records) == [(0, 0)]
    assert fitter.close_round(0, [0]).total.pack().tobytes() == delivery(0, 0).packed.tobytes()


def test_a_record_for_a_round_that_is_over_is_not_merged():
    fitter = Fitter(rule(), POLICY)
    work_rounds(fitter, 2)
    before = bits(fitter)
    with pytest.raises(RecordError, match="round: got 2; round 3 is open"):
        fitter.accept(delivery(1, 9))
    assert fitter.accept(delivery(0, 0)).status == "duplicate", "of a round that was committed, too"
    with pytest.raises(RecordError, match="shard 1 of round 1 was committed with other bytes; this one is not merged"):
        fitter.accept(other_bytes(0, 1))
    assert fitter.counts == Counts(
        records=10, duplicates=1, conflicts=((0, 1),), regenerated=(), torn_bytes=0, openings=0
    )
    assert bits(fitter) == before


SHARDS, ROUNDS = 10, 2


def arrivals(seed: int) -> list[list[int]]:
    """For each round, its shards in some order; some come several times, at once or later."""
    numbers = np.random.default_rng(seed)
    return [
        numbers.permutation([*range(SHARDS), *numbers.integers(0, SHARDS, numbers.integers(0, SHARDS))]).tolist()
        for _ in range(ROUNDS)
    ]


def run_in(order: Sequence[Sequence[int]], sent: Callable[[int, int], Delivery]) -> Fitter:
    fitter, seen = Fitter(rule(), POLICY), set()
    for number, shards in enumerate(order):
        for shard in shards:
            status = fitter.accept(sent(number, shard)).status
            assert status == ("duplicate" if (number, shard) in seen else "accepted")
            seen.add((number, shard))
        fitter.close_round(number, range(SHARDS), since=0)
        for shard in shards[::3]:  # what comes late, when its round is closed
            assert fitter.accept(sent(number, shard)).status == "duplicate"
    return fitter


def test_beta_has_the_same_bits_in_any_order_of_arrival_with_any_shards_sent_again():
    keys = [(number, shard) for number in range(ROUNDS) for shard in range(SHARDS)]
    records, sent = {key: some_record(*key) for key in keys}, {key: delivery(*key) for key in keys}
    found, naive, counted = set(), set(), set()
    for seed in range(200):
        order = arrivals(seed)
        fitter = run_in(order, lambda number, shard: sent[number, shard])
        found.add(bits(fitter))
        assert fitter.counts.records == len(keys) and fitter.current.total.sequences == 4 * len(keys)
        running = Record.zero(rule().shape)
        for number, shards in enumerate(order):
            for shard in dict.fromkeys(shards):
                running = running + records[number, shard]
        naive.add(solve(running.gram_DD, running.cross_DK, 1e-3).tobytes())
        counted.add(sum(map(len, order)))
    assert len(found) == 1
    assert len(naive) > 20, "control: a running sum in order of arrival depends on the order"
    assert max(counted) > len(keys), "control: a counter of what arrives counts more shards than there are"


def test_control_a_sum_that_knows_no_ids_counts_21_of_20_shards_when_one_is_sent_again():
    order = [*range(20), 7]
    naive, fitter = Record.zero(rule().shape), Fitter(rule(), POLICY)
    for shard in order:
        naive = naive + some_record(0, shard)
        fitter.accept(delivery(0, shard))
    fit = fitter.close_round(0, range(20))
    assert (naive.sequences // 4, fit.total.sequences // 4) == (21, 20)


@pytest.mark.parametrize("fit", FITS)
def test_closing_a_round_again_returns_the_same_fit(fit: Fit):
    fitter = Fitter(rule(fit), POLICY)
    work_rounds(fitter, 1)
    for shard in range(5):
        fitter.accept(delivery(1, shard))
    first = fitter.close_round(1, range(5))
    before = bits(fitter)
    assert fitter.close_round(1, range(5)) is first
    with pytest.raises(RecordError, match=r"round 2: was closed with shards \[0, 1, 2, 3, 4\]"):
        fitter.close_round(1, [0, 1])
    assert bits(fitter) == before
    assert first.round == (0 if fit == "lagged" else 1)
    assert fitter.current.round == 1 and fitter.current.version == 2


def test_lagged_uses_the_fit_of_exactly_the_rounds_before():
    lagged, whole = Fitter(rule("lagged"), POLICY), Fitter(rule("in_sample"), POLICY)
    for number in range(3):
        before = whole.current
        for shard in range(2):
            lagged.accept(delivery(number, shard))
            whole.accept(delivery(number, shard))
            assert lagged.current.total.pack().tobytes() == before.total.pack().tobytes()
        used = lagged.close_round(number, [0, 1])
        whole.close_round(number, [0, 1])
        assert used.total.pack().tobytes() == before.total.pack().tobytes()
        assert used.version == number


def test_a_round_with_a_record_missing_is_not_closed():
    fitter = Fitter(rule(), POLICY)
    fitter.accept(delivery(0, 1))
    with pytest.raises(RecordError, match=r"round 1: cannot be closed; no record of shards \[0, 2\] is in"):
        fitter.close_round(0, [0, 1, 2])
    with pytest.raises(RecordError, match="round 2: cannot be closed; round 1 is open"):
        fitter.close_round(1, [1])
    assert fitter.current.version == 0
    assert fitter.close_round(0, [1]).version == 1


def test_records_of_shards_that_are_not_listed_are_dropped():
    fitter, without = Fitter(rule(), POLICY), Fitter(rule(), POLICY)
    for shard in range(4):
        fitter.accept(delivery(0, shard))
    for shard in (0, 3):
        without.accept(delivery(0, shard))
    fitter.close_round(0, [3, 0])
    without.close_round(0, [0, 3])
    assert bits(fitter) == bits(without)
    for each in (fitter, without):
        work_rounds(each, 2, first=1)
    assert bits(fitter) == bits(without)


def test_a_shard_listed_twice_counts_once():
    fitter = Fitter(rule(), POLICY)
    fitter.accept(delivery(0, 0))
    assert fitter.close_round(0, [0, 0]).total.sequences == 4


def test_shards_of_every_round_since_a_commit_are_known_when_they_come_again():
    fitter = Fitter(rule(), POLICY)
    for number, since in ((0, 0), (1, 0), (2, 2)):
        for shard in range(3):
            assert fitter.accept(delivery(number, shard)).status == "accepted"
        fitter.close_round(number, range(3), since)
        before = bits(fitter)
        for known in range(since, number + 1):
            assert fitter.accept(delivery(known, 1)).status == "duplicate"
            late = fitter.accept(other_bytes(known, 2))
            assert (late.status, late.kept.tobytes()) == ("different", delivery(known, 2).packed.tobytes())
        assert bits(fitter) == before, "counted once"
    assert fitter.accept(delivery(1, 1)).status == "duplicate"
    with pytest.raises(RecordError, match="shard 1 of round 2 was committed with other bytes"):
        fitter.accept(other_bytes(1, 1))


@pytest.mark.parametrize("resumed", [False, True])
def test_every_version_can_be_asked_for(resumed: bool, tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    fitter, alone = Fitter(rule(), POLICY, path), []
    for number in range(3):
        alone.append(fitter.beta())
        work_rounds(fitter, number + 1, first=number)
    if resumed:
        fitter = Fitter(rule(), POLICY, path, [range(5)] * 3)
    assert [fitter.beta(version) for version in range(3)] == alone
    assert [beta.version for beta in alone] == [0, 1, 2]
    assert fitter.beta(3) == fitter.beta() and fitter.beta().version == 3
    for version in (-1, 4):
        with pytest.raises(ConfigError, match=rf"^version: got {version}; there are versions 0 to 3$"):
            fitter.beta(version)


def test_variance_is_the_residuals_own_and_says_in_sample():
    fitter = Fitter(rule(), POLICY)
    nothing = {"none": None, "constant": None, "residual_mu": None, "regression": None}
    assert fitter.variance() == InSample(version=0, tokens=0, sequences=0, mean_square=nothing)
    work_rounds(fitter, 2)
    found, fit = fitter.variance(), fitter.current
    assert (found.version, found.tokens, found.sequences) == (2, fit.total.tokens, 40)
    assert found.mean_square == pytest.approx(
        in_sample_mean_squares(fit.total, fit.position_average().mean_B, fit.ridge.beta_EK)
    )
    squares = found.mean_square
    assert (
        0
        < squares["constant"]
        < squares["none"]
        == pytest.approx(float(fit.total.target_gram_KK[0, 0]) / fit.total.tokens)
    )


def test_beta_says_what_the_result_needs():
    fitter = Fitter(rule(), POLICY)
    empty = fitter.beta()
    assert (empty.version, empty.round, empty.values, empty.fallback) == (0, -1, None, "residual_mu")
    assert (empty.r2, empty.condition_number, empty.tokens) == (None, None, 0)
    work_rounds(fitter, 2)
    fit, beta = fitter.current, fitter.beta()
    assert beta.to_json() == {
        "features": list(FEATURES), "values": fit.ridge.beta_EK[:, 0].tolist(), "version": 2, "round": 1,
        "ridge_lambda": 1e-3, "tokens": fit.total.tokens, "sequences": 40, "r2": fit.ridge.r2_K[0],
        "condition_number": fit.ridge.condition_number, "fallback": None,
    }  # fmt: skip


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("fit", FITS)
def test_a_fitter_comes_back_from_its_ledger_to_the_bit(fit: Fit, finished: bool, tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    lists = [[0, 1, 2, 3, 4], [1, 4], [0, 1, 2, 3, 4]]
    first, undisturbed = Fitter(rule(fit), POLICY, path), Fitter(rule(fit), POLICY)
    for number, shards in enumerate(lists):
        for shard in (3, 1, 4, 0, 2):  # in round 1, those not listed are given up after their record is in
            first.accept(delivery(number, shard))
            undisturbed.accept(delivery(number, shard))
        first.close_round(number, shards)
        undisturbed.close_round(number, shards)
        back = Fitter(rule(fit), POLICY, path, lists[: number + 1] if finished else None)
        assert bits(back) == bits(undisturbed)
        assert [back.beta(v) for v in range(number + 2)] == [undisturbed.beta(v) for v in range(number + 2)]
        again = back.close_round(number, shards)
        assert again.total.pack().tobytes() == undisturbed.close_round(number, shards).total.pack().tobytes()
        first = back
    work_rounds(first, 4, first=3)
    work_rounds(undisturbed, 4, first=3)
    assert bits(first) == bits(undisturbed)
    assert first.close_round(3, range(5)).round == (2 if fit == "lagged" else 3)


def test_a_fitter_that_is_made_again_in_the_middle_of_a_round_knows_what_was_accepted(tmp_path: Path):
    path, undisturbed = tmp_path / "ledger.jsonl", Fitter(rule(), POLICY)
    work_rounds(undisturbed, 3)
    fitter = Fitter(rule(), POLICY, path)
    for number in range(3):
        for shard in range(5):
            fitter.accept(delivery(number, shard))
            fitter = Fitter(rule(), POLICY, path)
            assert fitter.current.version == number
            assert fitter.accept(delivery(number, shard)).status == "duplicate"
            late = fitter.accept(other_bytes(number, 0))
            assert late.kept.tobytes() == delivery(number, 0).packed.tobytes()
        fitter.close_round(number, range(5))
    assert bits(fitter) == bits(undisturbed)
    assert fitter.counts == Counts(15, 1, ((0, 0), (1, 0), (2, 0)), (), 0, 16)
    assert fitter.notes == [], "told in the life in which it happened"


def test_rounds_that_were_not_finished_are_open_again_with_their_records(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    fitter = Fitter(rule(), POLICY, path)
    work_rounds(fitter, 2)
    fitter.accept(delivery(2, 0))
    back = Fitter(rule(), POLICY, path, [range(5)])
    assert (back.current.version, back.current.round) == (1, 0)
    assert {back.accept(delivery(number, 0)).status for number in (1, 2)} == {"duplicate"}, "not added again"
    assert back.counts.records == 11
    work_rounds(back, 3, first=1)
    undisturbed = Fitter(rule(), POLICY)
    work_rounds(undisturbed, 3)
    assert bits(back) == bits(undisturbed) and back.counts.records == 15
    new = Fitter(rule(), POLICY, path, [])
    assert new.current.version == 0 and new.counts.records == 15, "nothing was finished"


@pytest.mark.parametrize("fit", FITS)
def test_a_group_that_was_not_committed_may_give_up_other_shards_the_next_time(fit: Fit, tmp_path: Path):
    path, undisturbed = tmp_path / "ledger.jsonl", Fitter(rule(fit), POLICY)
    first = Fitter(rule(fit), POLICY, path)
    for fitter, shards in ((first, [0, 1, 4]), (undisturbed, [1, 2, 3, 4])):
        work_rounds(fitter, 1)
        for number in (1, 2):
            for shard in range(5):
                fitter.accept(delivery(number, shard))
            fitter.close_round(number, shards, since=1)
    back = Fitter(rule(fit), POLICY, path, [range(5)])
    for number in (1, 2):
        for shard in (4, 3, 2, 1):
            assert back.accept(delivery(number, shard)).status == "duplicate"
        back.close_round(number, [1, 2, 3, 4], since=1)
    assert bits(back) == bits(undisturbed)
    assert bits(Fitter(rule(fit), POLICY, path)) == bits(undisturbed), "the ledger alone says which close holds"


def test_a_finished_round_that_the_ledger_does_not_bear_out_is_refused_and_the_ledger_left_alone(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    work_rounds(Fitter(rule(), POLICY, path), 1)
    before = path.read_bytes()
    for finished, reason in (
        ([range(6)], r"round 1 was finished with shards \[0, .*5\], and the ledger has it closed with \[0, .* 4\]"),
        ([range(5), [0, 1]], r"round 2 was finished with shards \[0, 1\], and the ledger has it not closed; restore"),
    ):
        with pytest.raises(LedgerError, match=reason) as refused:
            Fitter(rule(), POLICY, path, finished)
        assert refused.value.exit_code == 2 and "\n" not in str(refused.value)
        assert path.read_bytes() == before
    with pytest.raises(LedgerError, match="round 1 was finished"):
        Fitter(rule(), POLICY, tmp_path / "lost.jsonl", [[0, 1]])


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("policy_id", {"policy_id": "another"}),
        ("run", {"run": "another"}),
        ("ridge_lambda", {"rule": replace(rule(), ridge_lambda=2e-3)}),
        ("fit", {"rule": rule("lagged")}),
        ("features", {"rule": replace(rule(), features=FEATURES[::-1])}),
        ("cap", {"rule": replace(rule(), cap=CAP + 1)}),
    ],
)
def test_a_ledger_of_another_run_is_refused(field: str, other: dict[str, Any], tmp_path: Path):
    path, own = tmp_path / "ledger.jsonl", {"rule": rule(), "policy_id": POLICY, "run": "plan"}
    work_rounds(Fitter(ledger_path=path, **own), 1)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=rf"ledger\.jsonl: {field}: got .*; this run's is"):
        Fitter(ledger_path=path, **(own | other))
    assert path.read_bytes() == before
    assert Fitter(ledger_path=path, **own).current.version == 1


def test_a_torn_ledger_is_told(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    work_rounds(Fitter(rule(), POLICY, path), 1)
    with path.open("ab") as stream:
        stream.write(b'{"entry":"record"')
    fitter = Fitter(rule(), POLICY, path)
    assert fitter.notes == [
        "ledger.jsonl: 17 bytes of an unfinished entry were cut off; it had not been acknowledged"
    ]
    assert (fitter.counts.torn_bytes, fitter.current.version) == (17, 1)
    assert Fitter(rule(), POLICY, path).notes == []


def test_other_bytes_are_told_once_however_often_they_come(tmp_path: Path):
    fitter = Fitter(rule(), POLICY, tmp_path / "ledger.jsonl")
    fitter.accept(delivery(0, 3))
    for _ in range(3):
        assert fitter.accept(other_bytes(0, 3)).status == "different"
    assert fitter.notes == ["shard 3 of round 1 came again with other bytes; the first record stays"]
    assert fitter.counts.conflicts == ((0, 3),)
    assert len(read_ledger(tmp_path / "ledger.jsonl").different) == 1


@pytest.mark.parametrize(
    ("first", "again", "conflict"),
    [
        ("cpu of a kind", "cpu of a kind", True),
        ("cpu of a kind", "cpu of another kind", False),
        ("cuda", "cuda", False),
        ("cuda", "cpu of a kind", False),
    ],
)
def test_other_bytes_are_a_conflict_on_one_kind_of_cpu_and_regenerated_elsewhere(
    tmp_path: Path, first: str, again: str, conflict: bool
):
    for _ in range(2):  # and after the ledger was read again
        fitter = Fitter(rule(), POLICY, tmp_path / "ledger.jsonl")
        assert fitter.accept(replace(delivery(0, 3), made_on=first)).status in ("accepted", "duplicate")
        assert fitter.accept(replace(other_bytes(0, 3), made_on=again)).status == "different"
        expected = [((0, 3),), ()] if conflict else [(), ((0, 3),)]
        assert [fitter.counts.conflicts, fitter.counts.regenerated] == expected
        fitter.close()


def test_a_record_is_on_disk_before_it_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, seen = tmp_path / "ledger.jsonl", []
    fitter = Fitter(rule(), POLICY, path)
    monkeypatch.setattr("os.fsync", lambda descriptor: seen.append(list(read_ledger(path).records)))
    fitter.accept(delivery(0, 2))
    fitter.accept(delivery(0, 1))
    fitter.accept(delivery(0, 1))
    assert seen == [[(0, 2)], [(0, 2), (0, 1)]], "whole in the file, then fsynced, once a record"


def test_a_fit_is_on_disk_before_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, seen = tmp_path / "ledger.jsonl", []
    fitter = Fitter(rule(), POLICY, path)
    fitter.accept(delivery(0, 0))
    monkeypatch.setattr(
        "os.fsync", lambda descriptor: seen.append((len(read_ledger(path).closed), fitter.current.version))
    )
    fitter.close_round(0, [0])
    assert seen == [(1, 0)] and fitter.current.version == 1


@pytest.mark.parametrize("fault", ["fsync", "write"])
def test_what_cannot_be_written_is_neither_accepted_nor_published(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "ledger.jsonl"
    fitter = Fitter(rule(), POLICY, path)
    fitter.accept(delivery(0, 0))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(f"os.{fault}", full)
        with pytest.raises(OutputError, match=r"ledger.jsonl: cannot be written .*make room"):
            fitter.accept(delivery(0, 1))
        with pytest.raises(OutputError, match=r"ledger.jsonl: cannot be written .*make room"):
            fitter.close_round(0, [0])
    assert path.read_bytes() == before and fitter.current.version == 0
    with pytest.raises(RecordError, match="no record"):
        fitter.close_round(0, [0, 1])
    back = fitter if fault == "write" else Fitter(rule(), POLICY, path)  # after a failing fsync it takes nothing more
    assert back.accept(delivery(0, 1)).status == "accepted", "sent again when there is room"
    back.close_round(0, [0, 1])
    assert bits(Fitter(rule(), POLICY, path)) == bits(back)


@pytest.mark.parametrize("scale", [1e-160, 1e75, 1e145])
def test_no_nan_is_ever_published_however_large_or_small_the_sums(scale: float):
    numbers = []
    fitter = Fitter(BaselineRule("regression", "leave_one_out", 1e-3, 0.9, FEATURES, CAP), POLICY)
    for number in range(3):
        for shard in range(3):
            record = some_record(number, shard)
            huge = replace(
                record, gram_DD=scale * record.gram_DD, cross_DK=scale * record.cross_DK,
                target_sum_K=scale * record.target_sum_K, target_gram_KK=scale * record.target_gram_KK,
                bin_sum_BK=scale * record.bin_sum_BK, bin_feature_CD=scale**0.5 * record.bin_feature_CD,
            )  # fmt: skip
            with np.errstate(all="ignore"):
                fitter.accept(replace(delivery(number, shard), packed=huge.pack()))
        with np.errstate(all="ignore"):
            fitter.close_round(number, range(3))
            beta, variance = fitter.beta(), fitter.variance().mean_square
        numbers += [*(beta.values or ()), beta.r2, beta.condition_number, *variance.values()]
    assert all(value is None or np.isfinite(value) for value in numbers)


def test_a_ledger_with_records_of_an_older_schema_is_refused_in_one_line(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    Fitter(rule(), POLICY, path).close()
    header = json.loads(path.read_bytes())
    del header["crc"], header["entry"]
    path.write_bytes(encode("header", header | {"record_version": 1}, 0)[0])
    with pytest.raises(LedgerError, match=r"^.*ledger\.jsonl: record_version: got 1; this run's is 2") as refused:
        Fitter(rule(), POLICY, path)
    assert refused.value.exit_code == 2
