import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.replies import a_progress
from support.results import a_result

from ray_probe.controller.queue import Measurement
from ray_probe.controller.state import EVENTS_KEPT, STATE_FILE, ControllerState, summary
from ray_probe.errors import ConfigError, OutputError, ProbeError
from ray_probe.run.directory import RunDirectory
from ray_probe.run.progress import Progress
from ray_probe.run.result import Counts, Result
from ray_probe.system.clock import utc_now
from ray_probe.system.digests import sealed


class FakeProbe:
    """Stands for a measurement at work: it has a result, and no more."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def result(self) -> Result:
        return Result(counts=Counts(rounds=self.rounds))


def a_board(directory: Path | None = None, measurements: int = 2) -> ControllerState:
    board = ControllerState(directory)
    for _ in range(measurements):
        submit(board)
    return board


def submit(board: ControllerState) -> Measurement:
    identity = board.queue.next_id()
    directory = (board.directory or Path("/runs")) / identity
    item = Measurement(identity, {"model": {"path": "/c", "adapter": None}}, str(directory), utc_now())
    board.queue.submit(item)
    board.save()
    return item


def at_work(board: ControllerState, identity: str, rounds: int = 1) -> Measurement:
    item = board.change(identity, "measuring", state="running")
    board.probe = FakeProbe(rounds)
    return item


def snapshot(round_number: int, collected: int = 0, note: str | None = None) -> Progress:
    return replace(a_progress(), round=round_number, collected=collected, note=note)


def told(board: ControllerState, identity: str, cursor: int = 0) -> list[tuple[int, int] | str]:
    """Round and records of snapshots, texts of notes."""
    events = board.events(identity, cursor)[1]
    return [event.note or (event.round, event.collected) for event in events]


def test_the_queue_is_found_again_after_a_restart_with_what_ran_first(tmp_path: Path) -> None:
    board = a_board(tmp_path, 3)
    board.change("m0001", state="done", finished=utc_now())
    board.change("m0002", "measuring", state="running", started=utc_now(), begun=True, policy_id="5f0c9a")
    board.queue.draining = True
    board.save()
    found = ControllerState(tmp_path)
    assert [item.id for item in found.queue.waiting] == ["m0002", "m0003"]
    assert found.queue.get("m0001") == board.queue.get("m0001")
    assert found.queue.get("m0002") == replace(board.queue.get("m0002"), state="queued")
    assert found.queue.draining
    assert (found.state, found.problem, found.progress) == ("starting", None, None)


def test_the_state_on_disk_is_whole_json_and_all_there_is(tmp_path: Path) -> None:
    board = a_board(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]
    raw = json.loads((tmp_path / STATE_FILE).read_text())
    assert raw["schema_version"] == 1
    assert [item["id"] for item in raw["measurements"]] == ["m0001", "m0002"]
    before = (tmp_path / STATE_FILE).read_bytes()
    board.event("m0001", snapshot(0))
    assert (tmp_path / STATE_FILE).read_bytes() == before, "progress is not worth a write"


def test_without_a_directory_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a_board().change("m0001", "measuring", state="running")
    assert list(tmp_path.iterdir()) == []


DAMAGE = {
    "cut short": '{"schema_version": 1, "draining": fal',
    "a field missing": sealed({"schema_version": 1}).decode(),
    "an unknown field": sealed(
        {"schema_version": 1, "draining": False, "measurements": [{"id": "m0001", "shape": 2}]}
    ).decode(),
    "of another version": sealed({"schema_version": 2, "draining": False, "measurements": []}).decode(),
    "not an object": "[]",
    "not sealed": '{"schema_version": 1, "draining": false, "measurements": []}',
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_state_that_cannot_be_read_is_refused_in_one_line_and_left_as_it_is(tmp_path: Path, damage: str) -> None:
    (tmp_path / STATE_FILE).write_text(DAMAGE[damage])
    with pytest.raises(ProbeError, match=r"service\.json: cannot be read .*; ") as refused:
        ControllerState(tmp_path)
    assert "\n" not in str(refused.value)
    assert (tmp_path / STATE_FILE).read_text() == DAMAGE[damage]


def test_a_flipped_bit_in_the_queue_is_refused_wherever_it_is(tmp_path: Path) -> None:
    a_board(tmp_path)
    whole = (tmp_path / STATE_FILE).read_bytes()
    for place in range(len(whole)):
        (tmp_path / STATE_FILE).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ConfigError, match=r"service\.json: cannot be read .*sha256 does not fit"):
            ControllerState(tmp_path)


def test_a_change_is_on_disk_before_it_is_told(tmp_path: Path) -> None:
    board = a_board(tmp_path)
    item = board.change("m0001", "loading", state="running")
    assert (item.state, board.state) == ("running", "loading")
    assert ControllerState(tmp_path).queue.items[0] == replace(item, state="queued")


def test_a_state_of_the_whole_ends_its_problem_and_a_change_without_one_does_not() -> None:
    board = a_board()
    board.problem = "no room"
    board.change("m0001", cause="x")
    assert (board.state, board.problem) == ("starting", "no room")
    board.change("m0001", "loading", state="running")
    assert (board.state, board.problem) == ("loading", None)


def test_who_waits_for_a_change_is_woken() -> None:
    board, woken = a_board(), threading.Event()

    def wait() -> None:
        with board.changed:
            ready.set()
            if board.changed.wait(10.0):
                woken.set()

    ready = threading.Event()
    thread = threading.Thread(target=wait)
    thread.start()
    ready.wait(10.0)
    board.change("m0001", cause="x")
    thread.join(10.0)
    assert woken.is_set()


def test_a_full_disk_is_told_and_what_is_known_stays_true(tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    directory.mkdir()
    board = a_board(directory)
    (directory / STATE_FILE).unlink()
    directory.rmdir()
    item = board.change("m0001", "measuring", state="running")
    assert board.queue.running == item
    assert board.problem is not None
    assert "service.json: cannot be written" in board.problem
    with pytest.raises(OutputError, match="cannot be written"):
        submit(board)


def test_of_a_round_only_the_newest_snapshot_is_kept() -> None:
    board = a_board()
    for number in range(3):
        for collected in range(9):
            board.event("m0001", snapshot(number, collected))
    assert told(board, "m0001") == [(0, 8), (1, 8), (2, 8)]
    assert board.progress == snapshot(2, 8)


def test_every_note_is_kept_in_its_place_among_the_snapshots() -> None:
    board = a_board()
    board.event("m0001", Progress.outside("loading"))
    board.event("m0001", Progress.outside("loaded"))
    for collected, note in ((1, None), (2, None), (2, "actor 1 died"), (2, "actor 2 died"), (3, None), (4, None)):
        board.event("m0001", snapshot(0, collected, note))
    board.event("m0001", Progress.outside("done"))
    assert told(board, "m0001") == ["loading", "loaded", "actor 1 died", "actor 2 died", (0, 4), "done"]
    assert board.progress == snapshot(0, 4), "a note from outside rounds says nothing of how far it is"


def test_a_note_that_replaces_a_snapshot_carries_it() -> None:
    board = a_board()
    board.event("m0001", snapshot(1, 5))
    board.event("m0001", snapshot(1, 6, "retried"))
    (event,) = board.events("m0001", 0)[1]
    assert (event.collected, event.note) == (6, "retried")


@pytest.mark.parametrize("round_number", [0, 1])
def test_a_note_from_outside_rounds_takes_no_snapshot_away(round_number: int) -> None:
    board = a_board()
    board.event("m0001", snapshot(round_number, 5))
    board.event("m0001", Progress.outside("asked for 3 actors"))
    assert told(board, "m0001") == [(round_number, 5), "asked for 3 actors"]


def test_measurements_do_not_take_each_others_place() -> None:
    board = a_board()
    for identity in ("m0001", "m0002", "m0001"):
        board.event(identity, snapshot(0, 1))
    assert told(board, "m0001") == [(0, 1), (0, 1)]
    assert told(board, "m0002") == [(0, 1)]
    assert told(board, "m0009") == []


def test_a_follower_sees_what_came_after_its_cursor_and_nothing_twice() -> None:
    board = a_board()
    board.event("m0001", snapshot(0, 1))
    cursor, events = board.events("m0001", 0)
    assert len(events) == 1
    assert board.events("m0001", cursor) == (cursor, ())
    board.event("m0002", snapshot(0, 1))
    assert board.events("m0001", cursor) == (cursor, ()), "what happens to others does not move it"
    board.event("m0001", snapshot(0, 2))
    board.event("m0001", snapshot(0, 3))
    later, events = board.events("m0001", cursor)
    assert later > cursor
    assert [event.collected for event in events] == [3]
    assert board.events("m0001", later) == (later, ())
    assert told(board, "m0001", 0)[-1] == (0, 3)


def test_a_follower_that_wants_no_events_gets_none() -> None:
    board = a_board()
    board.event("m0001", snapshot(0, 1))
    assert board.events("m0001", sys.maxsize) == (sys.maxsize, ())


def test_a_follower_of_an_earlier_life_sees_what_comes_after_the_restart(tmp_path: Path) -> None:
    board = a_board(tmp_path)
    for number in range(50):
        board.event("m0001", snapshot(number))
    cursor, _ = board.events("m0001", 0)
    again = ControllerState(tmp_path)
    again.event("m0001", snapshot(50))
    assert told(again, "m0001", cursor) == [(50, 0)]


def test_memory_is_bounded_and_the_newest_events_are_those_kept() -> None:
    board = a_board()
    early, _ = board.events("m0001", 0)
    for number in range(EVENTS_KEPT + 500):
        board.event("m0001", snapshot(0, 0, f"note {number}"))
    notes = told(board, "m0001", early)
    assert notes == [f"note {number}" for number in range(500, EVENTS_KEPT + 500)]
    for collected in range(3 * EVENTS_KEPT):
        board.event("m0001", snapshot(1, collected))
    assert len(told(board, "m0001")) == EVENTS_KEPT
    assert told(board, "m0001")[-2:] == [f"note {EVENTS_KEPT + 499}", (1, 3 * EVENTS_KEPT - 1)]


def test_a_follower_in_another_thread_misses_nothing_and_sees_nothing_twice() -> None:
    board, count = a_board(), 900  # twice that is less than what is kept

    def write() -> None:
        for number in range(count):
            board.event("m0001", snapshot(0, 0, f"note {number}"))
            board.event("m0002", snapshot(number))

    thread = threading.Thread(target=write)
    thread.start()
    seen: list[str | None] = []
    cursor = 0
    while thread.is_alive() or board.events("m0001", cursor)[1]:
        cursor, events = board.events("m0001", cursor)
        seen += [event.note for event in events]
        thread.join(0.001)  # the writer's turn
    assert seen == [f"note {number}" for number in range(count)]


def test_what_is_left_is_no_longer_at_work() -> None:
    board = a_board()
    at_work(board, "m0001")
    board.event("m0001", snapshot(0))
    item = board.leave("m0001", state="queued")
    assert (board.probe, board.progress) == (None, None)
    assert item.state == board.queue.get("m0001").state == "queued"


def result_file(item: Measurement, result: dict[str, Any]) -> None:
    Path(item.directory).mkdir()
    RunDirectory(Path(item.directory)).write_result(Result.from_json(result))


def test_a_result_is_that_of_the_measurement_at_work_or_what_lies_on_disk(tmp_path: Path) -> None:
    board = a_board(tmp_path)
    assert board.result(board.queue.get("m0001")) is None
    board.change("m0001", "loading", state="running")
    assert board.result(board.queue.get("m0001")) is None
    assert board.result(at_work(board, "m0001", rounds=3)) == Result(counts=Counts(rounds=3))
    ended = board.leave("m0001", state="done", finished=utc_now())
    assert board.result(ended) is None
    result_file(ended, a_result())
    assert board.result(ended) == Result.from_json(a_result())
    path = Path(ended.directory) / "result.json"
    path.write_text(path.read_text().replace('"per_sequence": ', '"per_sequence": 1'))
    with pytest.raises(ConfigError, match=r"m0001/result\.json: is damaged"):
        board.result(ended)


def test_a_measurement_that_has_just_ended_is_not_given_the_result_of_the_next(tmp_path: Path) -> None:
    board = a_board(tmp_path)
    seen = at_work(board, "m0001", rounds=4)
    result_file(board.leave("m0001", state="done", finished=utc_now()), {"counts": {"rounds": 4}})
    at_work(board, "m0002", rounds=1)
    assert board.result(seen) == Result(counts=Counts(rounds=4))


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (None, {"rounds": 0, "sequences": 0, "entropy": None, "gradient": None, "beta_version": None, "change": None}),
        (
            a_result(),
            {"rounds": 4, "sequences": 2048, "beta_version": 4, "change": None}
            | {key: a_result()[key] for key in ("entropy", "gradient")},
        ),
    ],
)
def test_a_summary_holds_what_a_list_shows(result: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    assert summary(None if result is None else Result.from_json(result)) == expected


def test_the_time_is_utc_to_the_second() -> None:
    assert utc_now().endswith("+00:00")
    assert len(utc_now()) == len("2026-05-01T12:00:00+00:00")
