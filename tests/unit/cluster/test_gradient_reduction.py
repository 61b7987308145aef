"""Every bucket holds every actor's sum once, few are under way at a time, and a failure says who is to blame."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError

from ray_probe.cluster.rounds import gradient_reduction as module
from ray_probe.cluster.rounds.gradient_reduction import IN_FLIGHT, Lost, Reduction, children
from ray_probe.errors import GradientError, OutputError
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.gradient.store import NotStaged
from ray_probe.run.backend import Stopped
from ray_probe.run.messages import GradientReport

LAYOUT = ParameterLayout(("a", "b"), ((30,), (7,)))
BUCKET = 5


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
        self.writer = Writer(self)

    def handle(self, actor: int) -> Any:
        def bucket(start: int, stop: int, *others: np.ndarray) -> np.ndarray:
            self.root = actor
            return sum(others, start=self.sums[actor][start:stop].copy())

        return SimpleNamespace(bucket=bucket)

    def gradient_report(self, actor: int, group: str, deadline_s: float) -> GradientReport:
        if actor in self.silent:
            self.alive.remove(actor)
            raise ActorDiedError()
        return GradientReport(((0, actor),), self.unreached)

    def remove(self, actor: int, cause: str) -> None:
        self.alive.remove(actor)

    def get(self, reference: Any, timeout: float) -> None:
        self.under_way -= 1
        self.writer.die_at(reference)
        if self.fails is not None and reference > 0:
            raise self.fails

    def reduction(self, stop: Callable[[], bool] = lambda: False) -> Reduction:
        return Reduction(self, self.writer, LAYOUT, BUCKET, stop, 0)

    def attempt(
        self, first: bool = False, stop: Callable[[], bool] = lambda: False, work: Reduction | None = None
    ) -> Lost | None:
        work = work or self.reduction(stop)
        return work.attempt("group", {actor: ((0, actor),) for actor in self.sums}, first)


class Writer:
    """Keeps what it is given until it dies, which it does at these buckets, one life after the other."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._staging = ""
        self.begun = 0
        self.dies_at: list[int] = []
        self.committed: list[int] = []

    def begin(self, window: int) -> str:
        self._cluster.added, self._cluster.under_way = {}, 0
        self.begun += 1
        self._staging = f"staging {self.begun}"
        return self._staging

    def holds(self, staging: str) -> bool:
        return staging == self._staging

    def commit(self, staging: str, rounds: int) -> None:
        if not self.holds(staging):
            raise NotStaged
        self.committed.append(rounds)

    def die(self) -> None:
        self._staging = ""

    def die_at(self, bucket: int) -> None:
        if self.dies_at and self.dies_at[0] == bucket:
            del self.dies_at[0]
            self.die()
            raise ActorUnavailableError("the writer", None)

    def add(self, staging: str, start: int, stop: int, part: np.ndarray) -> int:
        cluster = self._cluster
        assert self.holds(staging), "what is staged anew is staged under the new name"
        cluster.under_way += 1
        cluster.most_under_way = max(cluster.most_under_way, cluster.under_way)
        cluster.roots.append(cluster.root)
        cluster.added[start] = part
        return start


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
    lost = cluster.reduction().attempt("g", {10: ((0, 10), (0, 3))}, False)
    assert lost is not None and lost.actors == (10,) and "((0, 10),), ((0, 10), (0, 3)) were asked for" in lost.cause
    assert cluster.alive == [11]


@pytest.mark.parametrize("error", [ActorDiedError(), GetTimeoutError("600 s"), RayError("object lost")])
@pytest.mark.parametrize("silent", [set(), {11}, {10, 12}])
def test_a_bucket_that_is_lost_has_every_actor_asked_who_is_to_blame(
    cluster_of: Callable[[int], Cluster], error: Exception, silent: set[int]
):
    cluster = cluster_of(3)
    cluster.fails = error

    def lives(staging: str) -> bool:
        cluster.silent = silent
        return True

    cluster.writer.holds = lives  # type: ignore[method-assign]
    lost = cluster.attempt()
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


@pytest.mark.parametrize("dies_at", [[0], [35], [10, 0, 35]])
def test_where_the_writer_dies_all_is_staged_anew_and_no_actor_is_blamed(
    cluster_of: Callable[[int], Cluster], dies_at: list[int]
):
    cluster = cluster_of(3)
    cluster.writer.dies_at, lives = list(dies_at), len(dies_at) + 1
    work = cluster.reduction()
    assert cluster.attempt(work=work) is None, "no attempt is used up"
    total = np.concatenate([cluster.added[start] for start in sorted(cluster.added)])
    np.testing.assert_array_equal(total, undisturbed(cluster_of, 3), "to the bit: the same sums in the same order")
    assert cluster.writer.begun == lives and work.put_in_place(1)
    assert cluster.writer.committed == [1]


def test_a_writer_that_dies_before_the_commit_has_it_attempted_again(cluster_of: Callable[[int], Cluster]):
    cluster = cluster_of(2)
    work = cluster.reduction()
    assert cluster.attempt(work=work) is None
    cluster.writer.die()
    assert not work.put_in_place(2) and not cluster.writer.committed
    assert cluster.attempt(work=work) is None and work.put_in_place(2)
    assert cluster.writer.committed == [2]


def undisturbed(cluster_of: Callable[[int], Cluster], actors: int) -> np.ndarray:
    cluster = cluster_of(actors)
    assert cluster.attempt() is None
    return np.concatenate([cluster.added[start] for start in sorted(cluster.added)])
