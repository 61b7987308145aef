"""The fitter counts each shard once, gives one answer whatever the order, and comes back from its ledger."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ray_probe.cluster.actors import FitterActor
from ray_probe.core.baselines import BaselineRule, Fit
from ray_probe.core.records import Record, Shape, record_of_tokens, with_prompts
from ray_probe.core.ridge import solve
from ray_probe.core.variance import in_sample_mean_squares
from ray_probe.errors import ConfigError, RecordError
from ray_probe.fitter import Fitter
from ray_probe.ledger import read_ledger
from ray_probe.messages import Delivery

CAP = 8
FEATURES = ("H", "top1", "pos_frac")
POLICY = "0123abcd"
FITS: tuple[Fit, ...] = ("leave_one_out", "in_sample", "lagged")


def rule(fit: Fit = "leave_one_out") -> BaselineRule:
    return BaselineRule("regression", fit, 1e-3, 0.9, FEATURES, CAP)


def some_record(round_number: int, shard: int) -> Record:
    numbers = np.random.default_rng([round_number, shard])
    lengths = numbers.integers(1, CAP + 1, 4)
    phi_TD = numbers.normal(size=(lengths.sum(), len(FEATURES)))
    target_TK = 9.0 + phi_TD @ np.array([[1.0], [-3.0], [0.1]]) + numbers.normal(size=(lengths.sum(), 1))
    position_T = np.concatenate([np.arange(length) for length in lengths])
    rows = np.stack([np.ones(4), numbers.normal(size=4), lengths], axis=1)
    return with_prompts(record_of_tokens(phi_TD, target_TK, position_T, CAP), np.array([shard, shard, 0, 1]), rows)


def delivery(round_number: int, shard: int) -> Delivery:
    return Delivery(POLICY, FEATURES, round_number, shard, some_record(round_number, shard).pack())


def other_bytes(round_number: int, shard: int) -> Delivery:
    packed = some_record(round_number, shard).pack()
    packed[-2] += 1e-9
    return replace(delivery(round_number, shard), packed=packed)


def work_rounds(fitter: Fitter, rounds: int, shards: int = 5, first: int = 0) -> None:
    for number in range(first, rounds):
        for shard in range(shards):
            fitter.accept(delivery(number, shard))
        fitter.close_round(number, range(shards))


def bits(fitter: Fitter) -> tuple[object, ...]:
    """Everything that a fitter has learnt, to the bit."""
    fit = fitter.current
    average, ridge = fit.position_average(), fit.ridge
    return (
        fit.version,
        fit.round,
        fit.total.pack().tobytes(),
        fit.latest.pack().tobytes(),
        average.mean_B.tobytes(),
        average.seen_B.tobytes(),
        None if ridge is None else (ridge.beta_DK.tobytes(), ridge.condition_number, ridge.r2_K),
    )


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
    "past round": (replace(delivery(0, 1), round=-1), "round: got -1; round 0 is open"),
    "later round": (delivery(1, 1), "round: got 1; round 0 is open"),
    "more features than the run": (with_record(Record.zero(Shape(4, 1, CAP))), "features=4.*features=3"),
    "other bins": (with_record(Record.zero(Shape(3, 1, 9))), "bins=9"),
    "no sequence": (with_record(Record.zero(rule().shape)), "0 sequences"),
    "NaN in the sums": (
        with_record(replace(some_record(0, 1), target_sum_K=np.array([np.nan]))), "NaN or infinity; it was not merged",
    ),
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
    assert [(e.round, e.shard) for e in read_ledger(tmp_path / "ledger.jsonl")] == [(0, 0)]
    assert fitter.close_round(0, [0]).total.pack().tobytes() == delivery(0, 0).packed.tobytes()


def test_a_record_for_a_round_that_is_over_is_refused():
    fitter = Fitter(rule(), POLICY)
    work_rounds(fitter, 2)
    before = bits(fitter)
    with pytest.raises(RecordError, match="round: got 1; round 2 is open"):
        fitter.accept(delivery(1, 9))
    with pytest.raises(RecordError, match="round: got 0; round 2 is open"):
        fitter.accept(delivery(0, 0))
    assert bits(fitter) == before


def test_beta_has_the_same_bits_in_any_order_of_arrival():
    shards, numbers = 12, np.random.default_rng(0)
    records = [[some_record(number, shard) for shard in range(shards)] for number in range(2)]
    sent = [[delivery(number, shard) for shard in range(shards)] for number in range(2)]
    found, naive = set(), set()
    for _ in range(200):
        fitter, running = Fitter(rule(), POLICY), Record.zero(rule().shape)
        for number in range(2):
            for shard in numbers.permutation(shards).tolist():
                fitter.accept(sent[number][shard])
                running = running + records[number][shard]
            fitter.close_round(number, range(shards))
        found.add(bits(fitter))
        naive.add(solve(running.gram_DD, running.cross_DK, 1e-3).tobytes())
    assert len(found) == 1
    assert len(naive) > 1, "control: a running sum in order of arrival depends on the order"


@pytest.mark.parametrize("fit", FITS)
def test_closing_a_round_again_returns_the_same_fit(fit: Fit):
    fitter = Fitter(rule(fit), POLICY)
    work_rounds(fitter, 1)
    for shard in range(5):
        fitter.accept(delivery(1, shard))
    first = fitter.close_round(1, range(5))
    before = bits(fitter)
    assert fitter.close_round(1, range(5)) is first
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
    with pytest.raises(RecordError, match=r"round 0: cannot be closed; no record of shards \[0, 2\] is in"):
        fitter.close_round(0, [0, 1, 2])
    with pytest.raises(RecordError, match="round 1: cannot be closed; round 0 is open"):
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
    with pytest.raises(RecordError, match="round: got 1; round 3 is open"):
        fitter.accept(delivery(1, 1))


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
    assert [beta["version"] for beta in alone] == [0, 1, 2]
    assert fitter.beta(3) == fitter.beta() and fitter.beta()["version"] == 3
    for version in (-1, 4):
        with pytest.raises(ConfigError, match=rf"^version: got {version}; there are versions 0 to 3$"):
            fitter.beta(version)


def test_variance_is_the_residuals_own_and_says_in_sample():
    fitter = Fitter(rule(), POLICY)
    assert fitter.variance() == {
        "version": 0, "tokens": 0, "sequences": 0,
        "in_sample": {"none": None, "constant": None, "residual_mu": None, "regression": None},
    }  # fmt: skip
    work_rounds(fitter, 2)
    found, fit = fitter.variance(), fitter.current
    assert (found["version"], found["tokens"], found["sequences"]) == (2, fit.total.tokens, 40)
    assert found["in_sample"] == pytest.approx(
        in_sample_mean_squares(fit.total, fit.position_average().mean_B, fit.ridge.beta_DK)
    )
    squares = found["in_sample"]
    assert (
        0
        < squares["constant"]
        < squares["none"]
        == pytest.approx(float(fit.total.target_gram_KK[0, 0]) / fit.total.tokens)
    )


def test_beta_says_what_the_result_needs():
    fitter = Fitter(rule(), POLICY)
    empty = fitter.beta()
    assert (empty["version"], empty["round"], empty["values"], empty["fallback"]) == (0, -1, None, "residual_mu")
    assert (empty["r2"], empty["condition_number"], empty["tokens"]) == (None, None, 0)
    work_rounds(fitter, 2)
    fit, beta = fitter.current, fitter.beta()
    assert beta == {
        "features": list(FEATURES), "values": fit.ridge.beta_DK[:, 0].tolist(), "version": 2, "round": 1,
        "ridge_lambda": 1e-3, "tokens": fit.total.tokens, "sequences": 40, "r2": fit.ridge.r2_K[0],
        "condition_number": fit.ridge.condition_number, "fallback": None,
    }  # fmt: skip


@pytest.mark.parametrize("fit", FITS)
def test_a_fitter_comes_back_from_its_ledger_to_the_bit(fit: Fit, tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    lists = [[0, 1, 2, 3, 4], [1, 4], [0, 1, 2, 3, 4]]
    first, undisturbed = Fitter(rule(fit), POLICY, path), Fitter(rule(fit), POLICY)
    for number, shards in enumerate(lists):
        for shard in (3, 1, 4, 0, 2):  # in round 1, those not listed are given up after their record is in
            first.accept(delivery(number, shard))
            undisturbed.accept(delivery(number, shard))
        first.close_round(number, shards)
        undisturbed.close_round(number, shards)
        back = Fitter(rule(fit), POLICY, path, lists[: number + 1])
        assert bits(back) == bits(undisturbed)
        first = back
    work_rounds(first, 4, first=3)
    work_rounds(undisturbed, 4, first=3)
    assert bits(first) == bits(undisturbed)
    assert first.close_round(3, range(5)).round == (2 if fit == "lagged" else 3)


def test_rounds_that_were_not_finished_are_dropped(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    fitter = Fitter(rule(), POLICY, path)
    work_rounds(fitter, 2)
    fitter.accept(other_bytes(2, 0))
    back = Fitter(rule(), POLICY, path, [range(5)])
    assert (back.current.version, back.current.round) == (1, 0)
    assert [(e.round, e.shard) for e in read_ledger(path)] == [(0, shard) for shard in range(5)]
    assert back.accept(delivery(1, 0)).status == "accepted", "the round is done again"
    new = Fitter(rule(), POLICY, path)
    assert new.current.version == 0 and read_ledger(path) == []


def test_a_finished_round_whose_records_are_gone_is_refused_and_the_ledger_left_alone(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    work_rounds(Fitter(rule(), POLICY, path), 1)
    before = path.read_bytes()
    with pytest.raises(RecordError, match=r"round 0: cannot be closed; no record of shards \[5\] is in"):
        Fitter(rule(), POLICY, path, [range(6)])
    assert path.read_bytes() == before
    with pytest.raises(RecordError, match=r"no record of shards \[0, 1\] is in"):
        Fitter(rule(), POLICY, tmp_path / "lost.jsonl", [[0, 1]])


def test_a_record_is_on_disk_before_it_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, seen = tmp_path / "ledger.jsonl", []
    fitter = Fitter(rule(), POLICY, path)
    monkeypatch.setattr("os.fsync", lambda descriptor: seen.append([e.shard for e in read_ledger(path)]))
    fitter.accept(delivery(0, 2))
    fitter.accept(delivery(0, 1))
    fitter.accept(delivery(0, 1))
    assert seen == [[2], [2, 1]], "whole in the file, then fsynced, once a record"


@pytest.mark.parametrize("fault", ["fsync", "short write", "write"])
def test_a_record_that_cannot_be_written_is_not_accepted(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, write = tmp_path / "ledger.jsonl", os.write
    fitter = Fitter(rule(), POLICY, path)
    fitter.accept(delivery(0, 0))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if fault == "short write":
            patch.setattr("os.write", lambda descriptor, line: write(descriptor, line[: len(line) // 2]))
        else:
            patch.setattr(f"os.{fault}", full)
        with pytest.raises(RecordError, match=r"ledger.jsonl: cannot be written .*disk full"):
            fitter.accept(delivery(0, 1))
    assert path.read_bytes() == before, "nothing torn is left for the next record to go on in"
    with pytest.raises(RecordError, match="no record"):
        fitter.close_round(0, [0, 1])
    assert fitter.accept(delivery(0, 1)).status == "accepted", "sent again when there is room"
    fitter.close_round(0, [0, 1])
    assert bits(Fitter(rule(), POLICY, path, [[0, 1]])) == bits(fitter)


def test_one_fitter_after_the_other_leaves_no_file_open(tmp_path: Path):
    actor = FitterActor()
    open_files = []
    for number in range(4):
        opening = actor.open(rule(), POLICY, str(tmp_path / f"{number}.jsonl"), ())
        assert actor.accept(opening, delivery(0, 0)).status == "accepted"
        open_files.append(len(os.listdir("/proc/self/fd")))
    assert len(set(open_files)) == 1
    assert [len(read_ledger(tmp_path / f"{number}.jsonl")) for number in range(4)] == [1] * 4
