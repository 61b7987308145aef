import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_probe.controller.queue import Measurement, Queue
from ray_probe.errors import ConfigError

NOW = "2026-05-01T12:00:00+00:00"
STATES = ("queued", "running", "done", "failed", "cancelled")


def item(identity: str, **fields: Any) -> Measurement:
    config = {"model": {"path": f"/checkpoints/{identity}", "adapter": None}, "data": {"prompts": ["a", "b"]}}
    return Measurement(identity, config, f"/runs/{identity}", NOW, **fields)


def a_queue(*states: str) -> Queue:
    """Measurements m0001, m0002, ... in these states."""
    queue = Queue()
    for state in states:
        submitted = item(queue.next_id())
        queue.submit(submitted)
        queue.change(submitted.id, state=state, begun=state != "queued", started=None if state == "queued" else "now")
    return queue


def ids(items: tuple[Measurement, ...]) -> list[str]:
    return [measurement.id for measurement in items]


def test_measurements_come_up_in_the_order_of_their_submission() -> None:
    queue = a_queue("done", "running", "queued", "queued")
    assert ids(queue.items) == ["m0001", "m0002", "m0003", "m0004"]
    assert ids(queue.waiting) == ["m0003", "m0004"]
    assert queue.running is not None
    assert queue.running.id == "m0002"
    assert a_queue("done", "queued").running is None


def test_ids_count_up_and_are_never_given_twice() -> None:
    queue = a_queue("failed", "cancelled", "done")
    assert queue.next_id() == "m0004"
    queue.submit(item("m0004"))
    queue.cancel("m0004", NOW)
    assert queue.next_id() == "m0005"
    assert Queue.from_json(queue.to_json()).next_id() == "m0005"
    with pytest.raises(AssertionError, match="count up"):
        queue.submit(item("m0004"))
    assert Queue(item(f"m{number:04d}") for number in range(1, 10000)).next_id() == "m10000"


def test_a_waiting_measurement_is_taken_back_at_once() -> None:
    queue = a_queue("running", "queued", "queued")
    taken = queue.cancel("m0002", NOW)
    assert (taken.state, taken.finished, taken.exit_code) == ("cancelled", NOW, 130)
    assert taken.cause == "cancelled before it began"
    assert queue.get("m0002") == taken
    assert ids(queue.waiting) == ["m0003"]


def test_one_that_waits_to_go_on_keeps_its_whole_rounds_when_it_is_taken_back() -> None:
    queue = Queue.from_json(a_queue("running").to_json())
    taken = queue.cancel("m0001", NOW)
    assert (taken.state, taken.begun, taken.exit_code) == ("cancelled", True, 130)
    assert taken.cause == "cancelled; its whole rounds are kept"


def test_one_at_work_is_left_to_its_owner_to_stop() -> None:
    queue = a_queue("running")
    before = queue.get("m0001")
    assert queue.cancel("m0001", NOW) is before
    assert queue.running is before


@pytest.mark.parametrize("state", ["done", "failed", "cancelled"])
def test_what_has_ended_cannot_be_cancelled(state: str) -> None:
    queue = a_queue(state)
    with pytest.raises(ConfigError, match=f"^ID: got 'm0001'; it is {state}; only what waits or runs") as refused:
        queue.cancel("m0001", NOW)
    assert "\n" not in str(refused.value)
    assert queue.get("m0001").state == state


def test_an_unknown_id_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"^ID: got 'm0009'; no such measurement; there are m0001, m0002$"):
        a_queue("done", "queued").get("m0009")
    with pytest.raises(ConfigError, match="there are none yet"):
        Queue().cancel("m0001", NOW)
    with pytest.raises(ConfigError) as refused:
        a_queue(*["done"] * 25).get("x")
    assert "m0015" not in str(refused.value)
    assert str(refused.value).endswith("m0016, m0017, m0018, m0019, m0020, m0021, m0022, m0023, m0024, m0025")


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (("done", "running", "queued"), "m0002"),
        (("done", "failed", "queued"), "m0002"),
        (("running", "done"), "m0001"),
    ],
)
def test_without_an_id_the_one_at_work_is_meant_else_the_newest_that_was_started(
    states: tuple[str, ...], expected: str
) -> None:
    assert a_queue(*states).get(None).id == expected


@pytest.mark.parametrize("states", [(), ("queued",), ("queued", "queued")])
def test_without_an_id_and_without_a_start_the_remedy_is_named(states: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="no measurement has been started yet; queue one: probe CHECKPOINT"):
        a_queue(*states).get(None)


def test_a_draining_queue_takes_nothing_new_and_works_off_what_waits() -> None:
    queue = a_queue("queued")
    queue.draining = True
    with pytest.raises(ConfigError, match=r"got '/checkpoints/m0002'; the service drains; undo that: drain --undo"):
        queue.submit(item("m0002"))
    assert ids(queue.items) == ids(queue.waiting) == ["m0001"]
    restored = Queue.from_json(queue.to_json())
    assert restored.draining
    restored.draining = False
    restored.submit(item("m0002"))
    assert ids(restored.waiting) == ["m0001", "m0002"]


def test_a_changed_measurement_leaves_the_earlier_one_as_it_was() -> None:
    queue = a_queue("queued", "queued")
    before = queue.get("m0001")
    after = queue.change("m0001", state="running", started=NOW)
    assert (before.state, before.started) == ("queued", None)
    assert after == replace(before, state="running", started=NOW) == queue.get("m0001")
    assert ids(queue.items) == ["m0001", "m0002"]


def test_after_a_loss_what_was_running_is_the_next_before_all_others() -> None:
    queue = a_queue("done", "running", "queued", "queued")
    queue.change("m0002", started=NOW, policy_id="5f0c9a")
    restored = Queue.from_json(json.loads(json.dumps(queue.to_json())))
    assert restored.running is None
    assert ids(restored.waiting) == ["m0002", "m0003", "m0004"]
    assert restored.get("m0002") == replace(queue.get("m0002"), state="queued")
    assert restored.get(None).id == "m0002"


def test_a_measurement_says_what_is_measured() -> None:
    assert item("m0001").checkpoint == "/checkpoints/m0001"
    assert item("m0001").adapter is None
    with_adapter = replace(item("m0001"), config={"model": {"path": "hub/name", "adapter": "/adapters/7"}})
    assert (with_adapter.checkpoint, with_adapter.adapter) == ("hub/name", "/adapters/7")


TEXT = st.one_of(st.none(), st.text(max_size=8))
ENTRIES = st.fixed_dictionaries(
    {
        "state": st.sampled_from(STATES), "started": TEXT, "finished": TEXT, "cause": TEXT, "policy_id": TEXT,
        "exit_code": st.one_of(st.none(), st.integers(0, 130)), "begun": st.booleans(),
        "summary": st.one_of(st.none(), st.just({"rounds": 2, "entropy": {"per_sequence": 0.1}, "gradient": None})),
    }
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(ENTRIES, max_size=6), st.booleans())
def test_a_queue_comes_back_from_json_as_it_was_but_for_what_ran(entries: list[dict[str, Any]], drains: bool) -> None:
    queue = Queue((item(f"m{number:04d}", **fields) for number, fields in enumerate(entries, 1)), drains)
    restored = Queue.from_json(json.loads(json.dumps(queue.to_json())))
    expected = [replace(entry, state="queued") if entry.state == "running" else entry for entry in queue.items]
    assert list(restored.items) == expected
    assert restored.draining is drains
    assert Queue.from_json(restored.to_json()).items == restored.items
