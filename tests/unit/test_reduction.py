"""Every bucket holds every actor's sum once, few are under way at a time, and a failure says who is to blame."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

from ray_probe.cluster import reduction as module
from ray_probe.cluster.reduction import IN_FLIGHT, Lost, Reduction, children
from ray_probe.errors import GradientError, OutputError
from ray_probe.layout import Layout
from ray_probe.messages import GradientReport
from ray_probe.work import Stopped

LAYOUT = Layout(("a", "b"), ((30,), (7,)))
BUCKET = 5


class Remote:
    """A method that is run at once, like one of an actor; what it returns stands for its reference."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method


class Cluster:
    """Pool, writer and object store in one, without processes."""

    def __init__(self, actors: int) -> None:
        self.alive = list(range(10, 10 + actors))
        self.sums = {actor: np.random.default_rng(actor).normal(size=LAYOUT.size) for actor in self.alive}
        self.added: dict[int, np.ndarray] = {}
        self.roots: list[int] = []
        self.under_way = self.most_under_way = 0
        self.silent: set[int] = set()
        self.fails: Exception | None = None
        self.unreached: tuple[int, ...] = ()

    def handle(self, actor: int) -> Any:
        def bucket(start: int, stop: int, *others: np.ndarray) -> np.ndarray:
            self.root = actor
            return sum(others, start=self.sums[actor][start:stop].copy())

        return SimpleNamespace(bucket=Remote(bucket))

    def ask(self, actor: int, method: str, group: str, deadline_s: float) -> GradientReport:
        if actor in self.silent:
            self.alive.remove(actor)
            raise ActorDiedError()
        return GradientReport(((0, actor),), self.unreached)

    def remove(self, actor: int, cause: str) -> None:
        self.alive.remove(actor)

    @property
    def writer(self) -> Any:
        def add(staging: str, start: int, stop: int, part: np.ndarray) -> int:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            self.roots.append(self.root)
            self.added[start] = part
            return start

        return SimpleNamespace(
            ask=lambda method, deadline_s: "staging", handle=SimpleNamespace(add=Remote(add))
        )  # fmt: skip

    def get(self, reference: Any, timeout: float) -> None:
        self.under_way -= 1
        if self.fails is not None and reference > 0:
            raise self.fails

    def attempt(self, first: bool = False, stop: Callable[[], bool] = lambda: False) -> Lost | None:
        work = Reduction(self, self.writer, LAYOUT, BUCKET, stop)
        return work.attempt("group", {actor: ((0, actor),) for actor in self.sums}, first)


@pytest.fixture
def cluster_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Cluster]:
    def make(actors: int) -> Cluster:
        cluster = Cluster(actors)
        store = SimpleNamespace(get=cluster.get, wait=lambda references, timeout: (references, []))
        monkeypatch.setattr(module, "ray", store)
        return cluster

    return make


@pytest.mark.parametrize("actors", [1, 2, 3, 4, 7, 8, 20])
def test_every_bucket_holds_every_sum_once_and_actors_take_turns_as_root(
    cluster_of: Callable[[int], Cluster], actors: int
):
    cluster = cluster_of(actors)
    assert cluster.attempt() is None
    total = np.concatenate([cluster.added[start] for start in sorted(cluster.added)])
    np.testing.assert_allclose(total, sum(cluster.sums.values()), rtol=1e-12)
    assert len(cluster.added) == 8 and len(set(cluster.roots)) == min(actors, 8)
    assert cluster.most_under_way <= IN_FLIGHT and cluster.under_way == 0


@pytest.mark.parametrize("count", range(1, 40))
def test_the_tree_is_one_of_pairs_with_every_place_in_it_once(count: int):
    below = [child for place in range(count) for child in children(place, count)]
    assert sorted(below) == list(range(1, count))
    depth = {0: 0}
    for place in range(count):
        assert len(children(place, count)) <= 2
        depth |= {child: depth[place] + 1 for child in children(place, count)}
    assert max(depth.values()) <= np.log2(count)


def test_an_actor_that_is_gone_or_silent_is_told_and_nothing_is_moved(cluster_of: Callable[[int], Cluster]):
    cluster = cluster_of(3)
    cluster.alive.remove(11)
    assert cluster.attempt() == Lost("it is gone", (11,))
    cluster = cluster_of(3)
    cluster.silent = {12}
    lost = cluster.attempt()
    assert lost is not None and lost.actors == (12,) and not cluster.added


def test_an_actor_whose_sum_is_of_other_shards_is_removed(cluster_of: Callable[[int], Cluster]):
    cluster = cluster_of(2)
    lost = Reduction(cluster, cluster.writer, LAYOUT, BUCKET, lambda: False).attempt(
        "g", {10: ((0, 10), (0, 3))}, False
    )
    assert lost is not None and lost.actors == (10,) and "((0, 10),), ((0, 10), (0, 3)) were asked for" in lost.cause
    assert cluster.alive == [11]


@pytest.mark.parametrize("error", [ActorDiedError(), GetTimeoutError("600 s"), RayError("object lost")])
@pytest.mark.parametrize("silent", [set(), {11}, {10, 12}])
def test_a_bucket_that_is_lost_has_every_actor_asked_who_is_to_blame(
    cluster_of: Callable[[int], Cluster], error: Exception, silent: set[int]
):
    cluster = cluster_of(3)
    cluster.fails = error

    def begun(method: str, deadline_s: float) -> str:
        cluster.silent = silent if method == "ready" else set()
        return "staging"

    writer = cluster.writer
    writer.ask = begun
    work = Reduction(cluster, writer, LAYOUT, BUCKET, lambda: False)
    lost = work.attempt("group", {actor: ((0, actor),) for actor in cluster.sums}, False)
    assert lost is not None and lost.actors == tuple(sorted(silent))
    assert type(error).__name__ in lost.cause


def test_what_the_writer_refuses_ends_the_run_in_its_own_words(cluster_of: Callable[[int], Cluster]):
    cluster = cluster_of(2)
    cluster.fails = OutputError("gradient.staged: cannot be written")
    with pytest.raises(OutputError, match="cannot be written"):
        cluster.attempt()


def test_only_before_the_first_commit_must_every_parameter_have_been_reached(cluster_of: Callable[[int], Cluster]):
    cluster = cluster_of(2)
    cluster.unreached = (1,)
    with pytest.raises(GradientError, match=r"1 of 2 trainable parameters got none in any shard \(b\)"):
        cluster.attempt(first=True)
    assert not cluster.added
    assert cluster.attempt(first=False) is None


def test_to_stop_is_asked_between_buckets(cluster_of: Callable[[int], Cluster]):
    cluster = cluster_of(2)
    with pytest.raises(Stopped):
        cluster.attempt(stop=lambda: len(cluster.added) >= 4)
    assert len(cluster.added) <= 4 + IN_FLIGHT
