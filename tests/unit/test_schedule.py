"""Whoever dies and whatever fails, a round ends with every shard counted once or given up after three attempts.

The simulation does what `cluster.round_work` does with the schedule, with actors that are dictionaries: each remembers
whose tokens it holds and whose gradients it has summed, and forgets all of it when it dies.
"""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from ray_probe.cluster.schedule import MAX_ATTEMPTS, RoundSchedule, Task
from ray_probe.plan import Shard

SEEDS = range(3000)


def some_shards(count: int) -> list[Shard]:
    return [Shard(7, index, (), 0, 1) for index in range(count)]


@dataclass
class Actor:
    task: Task | None = None
    holds: set[int] = field(default_factory=set)
    summed: list[int] = field(default_factory=list)


class Simulation:
    """One round under random faults; checks at every step what must hold at every step."""

    def __init__(self, seed: int, lagged: bool) -> None:
        self.random = random.Random(seed)
        self.shards = some_shards(self.random.randint(1, 8))
        self.schedule = RoundSchedule(self.shards)
        self.schedule.fit_ready = lagged
        self.actors: dict[int, Actor] = {}
        self.started = 0
        self.faults = self.random.choice([0, 3, 10, 40])
        self.failing = {s.index: self.random.choice([0.0, 0.0, 0.1, 0.5, 1.0]) for s in self.shards}
        self.charged: Counter[int] = Counter()
        self.records: set[int] = set()
        self.closed_with: list[int] | None = None
        self.lagged = lagged
        for _ in range(self.random.randint(1, 4)):
            self.arrive()

    def run(self) -> None:
        while True:
            while not self.schedule.complete:
                self.step()
            self.close_records()
            if self.reduce():
                break
        self.check_end()

    def step(self) -> None:
        if not self.actors or self.random.random() < 0.1:
            self.arrive()
        self.deal(self.random.randint(0, len(self.actors)))
        if not self.busy():
            self.deal(len(self.actors))
        busy = self.busy()
        assert busy or self.schedule.complete, "it stands still"
        idle = [number for number in self.actors if number not in busy]
        if idle and self.fault(0.1):
            self.die(self.random.choice(idle))
        elif busy:
            self.come_to_an_end(self.random.choice(busy))
        self.close_records()

    def arrive(self) -> None:
        self.actors[self.started] = Actor()
        self.started += 1

    def fault(self, chance: float) -> bool:
        """Whether a fault that no shard is charged with happens; there are so many, then no more."""
        happens = self.faults > 0 and self.random.random() < chance
        self.faults -= happens
        return happens

    def busy(self) -> list[int]:
        return [number for number, actor in self.actors.items() if actor.task is not None]

    def deal(self, at_most: int) -> None:
        idle = [number for number, actor in self.actors.items() if actor.task is None]
        for number in self.random.sample(idle, min(at_most, len(idle))):
            task = self.schedule.next_task(number, list(self.actors))
            if task is not None:
                self.check_task(number, task)
                self.actors[number].task = task

    def check_task(self, number: int, task: Task) -> None:
        index = task.shard.index
        others = [actor for other, actor in self.actors.items() if other != number]
        assert all(actor.task is None or actor.task.shard.index != index for actor in others), "asked twice at once"
        assert all(index not in actor.summed for actor in self.actors.values()), "counted already"
        assert self.charged[index] < MAX_ATTEMPTS, "given up"
        if task.kind == "accumulate":
            assert index in self.actors[number].holds, "only who collected it has its tokens"
            assert self.lagged or self.closed_with is not None, "the fit is not there"
        else:
            assert all(index not in actor.holds for actor in self.actors.values()), "another has it in hand"

    def come_to_an_end(self, number: int) -> None:
        actor = self.actors[number]
        task, actor.task = actor.task, None
        assert task is not None
        index = task.shard.index
        if self.random.random() < self.failing[index]:
            self.charge(actor, task.shard)
            if self.random.random() < 0.3:
                self.die(number)
        elif self.fault(0.1):
            self.charge(actor, task.shard)
            self.die(number)
        elif task.kind == "collect":
            assert self.schedule.collected(task.shard) is (index in self.records)
            self.records.add(index)
            actor.holds.add(index)
        else:
            self.schedule.accumulated(task.shard)
            actor.summed.append(index)

    def charge(self, actor: Actor, shard: Shard) -> None:
        self.charged[shard.index] += 1
        actor.holds.discard(shard.index)
        assert self.schedule.failed(shard, f"cause {self.charged[shard.index]}") is (
            self.charged[shard.index] == MAX_ATTEMPTS
        )

    def die(self, number: int) -> None:
        kept = {other: shards for other, shards in self.schedule.accumulated_by().items() if other != number}
        lost = self.actors.pop(number)
        assert self.schedule.actor_lost(number) == len(lost.summed)
        assert self.schedule.accumulated_by() == kept, "what others have summed stays"
        assert set(self.schedule.records) == self.records, "records that are in stay in"

    def close_records(self) -> None:
        if self.closed_with is None and self.schedule.records_complete and self.schedule.records:
            self.closed_with = self.schedule.records
            self.schedule.fit_ready = True

    def reduce(self) -> bool:
        """Ask each actor for its sum; one of them may die of it."""
        for number, shards in self.schedule.accumulated_by().items():
            if self.fault(0.2):
                self.die(number)
                return False
            assert tuple(sorted(self.actors[number].summed)) == shards
        return True

    def check_end(self) -> None:
        counted = Counter(index for actor in self.actors.values() for index in actor.summed)
        given_up = {s.id: f"cause {MAX_ATTEMPTS}" for s in self.shards if self.charged[s.index] == MAX_ATTEMPTS}
        assert self.schedule.given_up == given_up
        for shard in self.shards:
            assert counted[shard.index] == (shard.id not in given_up)
            assert self.charged[shard.index] <= MAX_ATTEMPTS
        summed = {n: tuple(sorted(actor.summed)) for n, actor in self.actors.items() if actor.summed}
        assert self.schedule.accumulated_by() == summed
        assert self.schedule.records == sorted(self.records)
        assert self.closed_with == (self.schedule.records or None), "the fit holds the records that count"
        assert self.records >= set(counted)


@pytest.mark.parametrize("lagged", [False, True])
def test_every_schedule_ends_with_every_shard_counted_once_or_given_up(lagged: bool):
    given_up = redone = 0
    for seed in SEEDS:
        simulation = Simulation(seed, lagged)
        simulation.run()
        given_up += bool(simulation.schedule.given_up)
        redone += simulation.schedule.retried > 0
    assert given_up > 300 and redone > 1000, "the faults did happen"


def collect(schedule: RoundSchedule, actor: int) -> Shard:
    task = schedule.next_task(actor)
    assert task is not None and task.kind == "collect"
    schedule.collected(task.shard)
    return task.shard


def accumulate(schedule: RoundSchedule, actor: int) -> Shard:
    task = schedule.next_task(actor)
    assert task is not None and task.kind == "accumulate"
    schedule.accumulated(task.shard)
    return task.shard


def test_a_round_without_faults_deals_each_shard_once():
    schedule = RoundSchedule(some_shards(3))
    assert [collect(schedule, actor).index for actor in (5, 6, 5)] == [0, 1, 2]
    assert schedule.records_complete and schedule.records == [0, 1, 2] and not schedule.complete
    assert schedule.next_task(5) is None, "the fit is not there"
    schedule.fit_ready = True
    assert [accumulate(schedule, actor).index for actor in (5, 5, 6)] == [0, 2, 1]
    assert schedule.complete and schedule.accumulated_by() == {5: (0, 2), 6: (1,)}
    assert schedule.next_task(5) is None
    assert (schedule.retried, schedule.given_up) == (0, {})


def test_with_the_fit_there_from_the_start_gradients_wait_for_nothing():
    schedule = RoundSchedule(some_shards(2))
    schedule.fit_ready = True
    assert collect(schedule, 0).index == accumulate(schedule, 0).index == 0
    assert not schedule.records_complete
    assert collect(schedule, 0).index == accumulate(schedule, 0).index == 1
    assert schedule.complete and schedule.records_complete


def test_a_death_loses_the_shards_of_that_actor_alone_and_no_record():
    schedule = RoundSchedule(some_shards(5))
    for actor in (0, 1, 0, 1):
        collect(schedule, actor)
    schedule.fit_ready = True
    accumulate(schedule, 0)
    accumulate(schedule, 1)
    assert schedule.actor_lost(0) == 1
    assert schedule.accumulated_by() == {1: (1,)}
    assert schedule.records == [0, 1, 2, 3]
    assert schedule.retried == 2
    assert accumulate(schedule, 1).index == 3, "held elsewhere, not lost"
    for index in (0, 2, 4):
        assert collect(schedule, 2).index == accumulate(schedule, 2).index == index, "the others are done again"
    assert schedule.complete
    assert schedule.actor_lost(9) == 0, "nobody"


def test_a_record_that_comes_again_is_known():
    schedule = RoundSchedule(some_shards(1))
    task = schedule.next_task(0)
    assert schedule.collected(task.shard) is False
    schedule.actor_lost(0)
    assert schedule.records_complete, "the fit need not wait"
    again = schedule.next_task(1)
    assert again.kind == "collect" and schedule.collected(again.shard) is True


def test_a_shard_is_given_up_after_exactly_three_attempts_with_its_last_cause():
    schedule = RoundSchedule(some_shards(2))
    for attempt in range(MAX_ATTEMPTS):
        assert not schedule.records_complete
        task = schedule.next_task(attempt)
        assert task is not None and task.shard.index == 0
        assert schedule.failed(task.shard, f"cause {attempt}") is (attempt == 2)
    assert schedule.given_up == {"7/0": "cause 2"}
    assert collect(schedule, 0).index == 1
    assert schedule.records_complete and schedule.records == [1]
    schedule.fit_ready = True
    accumulate(schedule, 0)
    assert schedule.complete and schedule.actor_lost(2) == 0
    assert schedule.given_up == {"7/0": "cause 2"}, "given up for good"


def test_one_bad_actor_cannot_use_up_the_attempts_of_a_shard():
    schedule = RoundSchedule(some_shards(2))
    for index in (0, 1):
        task = schedule.next_task(0, [0, 1])
        assert task is not None and task.shard.index == index
        schedule.failed(task.shard, "this actor fails at everything")
    assert schedule.next_task(0, [0, 1]) is None, "both shards are left to the other actor"
    task = schedule.next_task(1, [0, 1])
    assert task is not None and task.shard.index == 0
    assert schedule.next_task(0, [0]) is not None, "alone, it must try again"


def test_a_death_charges_only_the_shard_in_hand():
    schedule = RoundSchedule(some_shards(2))
    for actor in range(MAX_ATTEMPTS):
        bystander = collect(schedule, actor)
        in_hand = schedule.next_task(actor)
        assert (bystander.index, in_hand.shard.index) == (0, 1)
        schedule.failed(in_hand.shard, "died")
        schedule.actor_lost(actor)
    assert schedule.given_up == {"7/1": "died"}
    assert collect(schedule, 9).index == 0, "lost three times, never at fault"


def test_a_shard_given_up_after_its_record_is_in_stays_in_the_fit():
    schedule = RoundSchedule(some_shards(1))
    collect(schedule, 0)
    schedule.fit_ready = True
    for attempt in range(MAX_ATTEMPTS):
        task = schedule.next_task(0)
        assert task.kind == "accumulate"
        if not schedule.failed(task.shard, "overflow"):
            assert collect(schedule, 0).index == 0, attempt
    assert schedule.complete and schedule.records == [0] and schedule.accumulated_by() == {}
