"""A fitter's process that takes the place of another is open on the same measurement, and answers as it would have."""

import json
import os
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.records import POLICY, bits, delivery, rule, work_rounds

from ray_probe.cluster.actors.fitter import FitterActor
from ray_probe.errors import ConfigError, LedgerError, OutputError, RecordError
from ray_probe.fitter.fitter import Fitter
from ray_probe.fitter.host import FitterHost
from ray_probe.fitter.ledger import read_ledger
from ray_probe.run.messages import FitterSession, Receipt

OWNER = "an actor"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "fitter.json"


def opened(state: Path | None, ledger: Path, run: str = "") -> tuple[FitterHost, str]:
    host = FitterHost(state, OWNER)
    return host, host.open(rule(), POLICY, ledger, [], run)


def test_the_next_process_is_open_on_the_same_measurement_at_the_same_version(state: Path, tmp_path: Path):
    host, opening = opened(state, tmp_path / "ledger.jsonl", run="plan")
    undisturbed = Fitter(rule(), POLICY)
    for number in range(3):
        for shard in range(5):
            host.accept(opening, delivery(number, shard))
            host = FitterHost(state, OWNER)
            assert host.accept(opening, delivery(number, shard)).status == "duplicate"
        host.fitter.close_round(number, range(5), since=0)
        work_rounds(undisturbed, number + 1, first=number)
        host = FitterHost(state, OWNER)
        assert bits(host.fitter) == bits(undisturbed)
    assert host.notes == ("fitter: restored from its ledger, at version 3 (opening 19)",)


def test_what_another_actor_has_left_is_not_gone_on_with(state: Path, tmp_path: Path):
    opened(state, tmp_path / "ledger.jsonl")
    before = (tmp_path / "ledger.jsonl").read_bytes()
    other = FitterHost(state, "another actor")
    with pytest.raises(RecordError, match="no measurement is open"):
        _ = other.fitter
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_the_last_measurement_that_was_opened_is_the_one(state: Path, tmp_path: Path):
    host, first = opened(state, tmp_path / "first.jsonl")
    second = host.open(rule(), POLICY, tmp_path / "second.jsonl", [])
    for process in (host, FitterHost(state, OWNER)):
        with pytest.raises(RecordError, match="shard 0 of round 1 belongs to an earlier measurement"):
            process.accept(first, delivery(0, 0))
    assert FitterHost(state, OWNER).accept(second, delivery(0, 0)).status == "accepted"
    assert list(read_ledger(tmp_path / "second.jsonl").records) == [(0, 0)]


def test_a_measurement_that_could_not_be_opened_leaves_none_open_to_any_process(state: Path, tmp_path: Path):
    host, first = opened(state, tmp_path / "first.jsonl")
    (tmp_path / "damaged.jsonl").write_bytes(b"no ledger")
    with pytest.raises(LedgerError):
        host.open(rule(), POLICY, tmp_path / "damaged.jsonl", [])
    with pytest.raises(RecordError, match="belongs to an earlier measurement"):
        host.accept(first, delivery(0, 0))
    with pytest.raises(RecordError, match="no measurement is open"):
        FitterHost(state, OWNER).accept(first, delivery(0, 0))
    assert read_ledger(tmp_path / "first.jsonl").records == {}


def test_why_a_process_cannot_go_on_is_told_to_whoever_asks_until_another_measurement_is_opened(
    state: Path, tmp_path: Path
):
    host, opening = opened(state, tmp_path / "ledger.jsonl")
    host.accept(opening, delivery(0, 0))
    data = (tmp_path / "ledger.jsonl").read_bytes()
    (tmp_path / "ledger.jsonl").write_bytes(data.replace(b'"shard":0', b'"shard":1'))
    again = FitterHost(state, OWNER)
    for _ in range(2):
        with pytest.raises(LedgerError, match=r"ledger\.jsonl: entry 2, at byte \d+, is damaged"):
            again.accept(opening, delivery(0, 0))
        with pytest.raises(LedgerError):
            _ = again.notes
    other = again.open(rule(), POLICY, tmp_path / "other.jsonl", [])
    assert again.accept(other, delivery(0, 0)).status == "accepted"


def test_a_state_with_a_flipped_bit_is_told_by_its_name_and_does_not_keep_a_measurement_from_being_opened(
    state: Path, tmp_path: Path
):
    opened(state, tmp_path / "ledger.jsonl")
    whole = state.read_bytes()
    for place in range(len(whole)):
        state.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
        again = FitterHost(state, OWNER)
        with pytest.raises(ConfigError, match=r"fitter\.json: cannot be read .*sha256 does not fit.*run --resume"):
            _ = again.fitter
    opening = again.open(rule(), POLICY, tmp_path / "ledger.jsonl", [])
    assert FitterHost(state, OWNER).accept(opening, delivery(0, 0)).status == "accepted"


def test_a_state_that_cannot_be_kept_is_told(tmp_path: Path):
    host = FitterHost(tmp_path / "gone" / "fitter.json", OWNER)
    with pytest.raises(OutputError, match=r"fitter\.json: cannot be written"):
        host.open(rule(), POLICY, tmp_path / "ledger.jsonl", [])


def test_the_state_is_small_private_and_says_where_the_ledger_is(state: Path, tmp_path: Path):
    previous = os.umask(0o022)
    try:
        _, opening = opened(state, tmp_path / "ledger.jsonl")
    finally:
        os.umask(previous)
    kept = json.loads(state.read_bytes())
    assert (kept["opening"], kept["ledger"], kept["owner"]) == (asdict(opening), str(tmp_path / "ledger.jsonl"), OWNER)
    assert state.stat().st_mode & 0o777 == 0o600 and state.stat().st_size < 1000
    assert sorted(os.listdir(tmp_path)) == ["fitter.json", "ledger.jsonl"]


def test_one_measurement_after_the_other_leaves_no_file_open(tmp_path: Path):
    actor = FitterActor()
    open_files = []
    for number in range(4):
        opening = actor.open(rule(), POLICY, str(tmp_path / f"{number}.jsonl"), ())
        assert actor.accept(opening, delivery(0, 0)).status == "accepted"
        open_files.append(len(os.listdir("/proc/self/fd")))
    assert len(set(open_files)) == 1
    assert [len(read_ledger(tmp_path / f"{number}.jsonl").records) for number in range(4)] == [1] * 4


def test_deliveries_and_receipts_arrive_as_they_were_sent():
    sent = delivery(3, 4)
    session, arrived = pickled((FitterSession("abc"), sent))
    assert session == FitterSession("abc") and arrived.packed.tobytes() == sent.packed.tobytes()
    assert {name: value for name, value in vars(arrived).items() if name != "packed"} == {
        name: value for name, value in vars(sent).items() if name != "packed"
    }
    plain = pickled(Receipt("duplicate"))
    assert (plain.status, plain.kept) == ("duplicate", None)
    other = pickled(Receipt("different", sent.packed))
    assert other.status == "different" and other.kept is not None and other.kept.tobytes() == sent.packed.tobytes()


def pickled(message: Any) -> Any:
    return pickle.loads(pickle.dumps(message, protocol=5))
