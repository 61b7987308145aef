"""A head without an answer for its time is lost; one that comes back is not."""

import socket

import pytest

from ray_probe.cluster.head.head_monitor import HeadMonitor, reachable


class Scene:
    """A clock, and a head that answers or not."""

    def __init__(self) -> None:
        self.now = 0.0
        self.up = True
        self.asked = 0

    def watch(self, lost_s: float) -> HeadMonitor:
        return HeadMonitor("host:1", lost_s, lambda: self.now, self._answers)

    def _answers(self, address: str) -> bool:
        assert address == "host:1"
        self.asked += 1
        return self.up


def test_a_head_is_lost_after_its_time_without_an_answer_and_not_before() -> None:
    scene = Scene()
    watch = scene.watch(3.0)
    assert not watch.is_lost()
    scene.up, lost = False, []
    for second in range(1, 6):
        scene.now = float(second)
        lost.append(watch.is_lost())
    assert lost == [False, False, True, True, True]


def test_a_head_that_answers_again_in_time_is_there() -> None:
    scene = Scene()
    watch = scene.watch(3.0)
    for second in range(1, 20):
        scene.now, scene.up = float(second), second % 3 == 0
        assert not watch.is_lost()


def test_a_head_is_asked_once_a_second_however_often_it_is_looked_at_and_a_sleep_counts_as_one() -> None:
    scene = Scene()
    watch = scene.watch(3.0)
    for step in range(100):
        scene.now = step / 20
        watch.is_lost()
    assert scene.asked == 4
    scene.up, scene.now = False, 10_000.0
    assert not watch.is_lost(), "this process stood still itself"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_that_listens_is_reachable_and_a_closed_one_is_not(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{host}:{server.getsockname()[1]}"
        assert reachable(address)
    assert not reachable(address)
