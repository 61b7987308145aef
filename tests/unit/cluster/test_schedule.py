"""Whoever dies and whatever fails, a group of rounds ends with every shard counted once or given up after three tries.

The simulation does what `cluster.round_work` does with the schedule, with actors that are dictionaries: each remembers
whose tokens it holds and whose gradients it has summed, and forgets all of it when it dies. An actor may also be out of
reach for a while, with its task done or not, and is replaced then: that is charged to nobody.
"""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from ray_probe.cluster.pool.failure_policy import LESS_MEMORY, MAX_ATTEMPTS, MAX_SPARED, Blame
from ray_probe.cluster.rounds.schedule import Schedule, Task
from ray_probe.run.messages import ShardKey
from ray_probe.run.preparation.plan import Shard

SEEDS = range(2500)
ROUND = 7


def some_shards(count: int, number: int = ROUND) -> list[Shard]:
    return [Shard(number, index, (), 0, 1) for index in range(count)]


def schedule_of(count: int) -> Schedule:
    schedule = Schedule()
    schedule.open_round(some_shards(count))
    return schedule


@dataclass
class Actor:
    task: Task | None = None
    holds: set[ShardKey] = field(default_factory=set)
    summed: list[ShardKey] = field(default_factory=list)
    leaving: bool = False
    unreachable: bool = False


class Simulation:
    """The rounds up to a commit under random faults; checks at every step what must hold at every step."""

    def __init__(self, seed: int, lagged: bool) -> None:
        self.random = random.Random(seed)
        self.rounds = {ROUND + n: some_shards(self.random.randint(1, 6), ROUND + n) for n in range(seed % 3 + 1)}
        self.schedule = Schedule()
        self.actors: dict[int, Actor] = {}
        self.started = 0
        self.faults = self.random.choice([0, 3, 10, 40])
        self.failing = {s.key: self.random.choice([0.0, 0.0, 0.1, 0.5, 1.0]) for s in self.shards()}
        self.charged: Counter[ShardKey] = Counter()
        self.spared: Counter[ShardKey] = Counter()
        self.cut_off = {s.key: 0.05 if seed % 2 else 0.0 for s in self.shards()}
        if seed % 4 == 3:
            self.cut_off[self.random.choice(list(self.cut_off))] = 1.0
        self.records: set[ShardKey] = set()
        self.closed_with: dict[int, list[int]] = {}
        self.lagged = lagged
        self.redone_of_earlier_rounds = 0
        for _ in range(self.random.randint(1, 4)):
            self.arrive()

    def shards(self) -> list[Shard]:
        return [shard for shards in self.rounds.values() for shard in shards]

    def run(self) -> None:
        for number, shards in self.rounds.items():
            self.newest = number
            self.schedule.open_round(shards)
            if self.lagged:
                self.schedule.fit_ready(self.newest)
            self.work_off()
        while not self.reduce():
            self.work_off()
        self.check_end()

    def work_off(self) -> None:
        while not self.schedule.complete:
            self.step()
        self.close_records()

    def step(self) -> None:
        if self.random.random() < 0.1:
            self.arrive()
        self.deal(self.random.randint(0, len(self.actors)))
        while not self.busy() and not self.schedule.complete:
            if not self.staying():
                self.arrive()
            staying = self.staying()
            self.deal(len(self.actors))
            assert self.busy() or self.staying() != staying, "it stands still"
        busy = self.busy()
        idle = [number for number in self.actors if number not in busy]
        lost = [number for number, actor in self.actors.items() if actor.unreachable]
        if idle and self.fault(0.1):
            self.die(self.random.choice(idle))
        elif lost and self.random.random() < 0.5:
            self.come_back(self.random.choice(lost))
        elif reached := [number for number in busy if number not in lost]:
            self.come_to_an_end(self.random.choice(reached))
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
        """Actors at a task, those out of reach too."""
        return [number for number, actor in self.actors.items() if actor.task is not None]

    def staying(self) -> list[int]:
        return [number for number, actor in self.actors.items() if not actor.leaving]

    def deal(self, at_most: int) -> None:
        idle = [number for number, actor in self.actors.items() if actor.task is None]
        for number in self.random.sample(idle, min(at_most, len(idle))):
            actor = self.actors[number]
            actor.leaving = actor.leaving or self.fault(0.05)
            task = self.schedule.next_task(number, self.staying(), actor.leaving)
            if task is not None:
                self.check_task(number, task)
                actor.task = task
            elif actor.leaving and not self.schedule.depends_on(number):
                assert not actor.summed, "it has nothing that would be lost"
                del self.actors[number]

    def check_task(self, number: int, task: Task) -> None:
        key = task.shard.key
        others = [actor for other, actor in self.actors.items() if other != number]
        assert all(actor.task is None or actor.task.shard.key != key for actor in others), "asked twice at once"
        assert all(key not in actor.summed for actor in self.actors.values()), "counted already"
        assert self.charged[key] < MAX_ATTEMPTS, "given up"
        if task.kind == "accumulate":
            assert key in self.actors[number].holds, "only who collected it has its tokens"
            assert self.lagged or key[0] in self.closed_with, "the fit is not there"
        else:
            assert all(key not in actor.holds for actor in self.actors.values()), "another has it in hand"
            assert not self.actors[number].leaving, "it goes, and takes on nothing new"
            self.redone_of_earlier_rounds += key[0] < self.newest

    def come_to_an_end(self, number: int) -> None:
        actor = self.actors[number]
        task, actor.task = actor.task, None
        assert task is not None
        key = task.shard.key
        if self.random.random() < self.cut_off[key]:
            actor.task, actor.unreachable = task, True
        elif self.random.random() < self.failing[key]:
            self.charge(actor, task.shard)
            if self.random.random() < 0.3:
                self.die(number)
        elif self.fault(0.1):
            self.charge(actor, task.shard)
            self.die(number)
        elif task.kind == "collect":
            assert self.schedule.collected(task.shard) is (key in self.records)
            self.records.add(key)
            actor.holds.add(key)
        else:
            self.schedule.accumulated(task.shard)
            actor.summed.append(key)

    def come_back(self, number: int) -> None:
        """Nobody knows how far it is with its task: it may have done it. It is replaced."""
        actor = self.actors[number]
        task, actor.task = actor.task, None
        assert task is not None
        key = task.shard.key
        if self.spared[key] < MAX_SPARED:
            self.spared[key] += 1
            told = self.schedule.failed(task.shard, "not reachable", "spared")
            assert told.endswith("rescheduled, not counted as an attempt")
        else:
            self.charge(actor, task.shard, "spared")
        self.die(number)

    def charge(self, actor: Actor, shard: Shard, blame: Blame = "charged") -> None:
        self.charged[shard.key] += 1
        actor.holds.discard(shard.key)
        told = self.schedule.failed(shard, f"cause {self.charged[shard.key]}", blame)
        assert ("given up" in told) is (self.charged[shard.key] == MAX_ATTEMPTS)

    def die(self, number: int) -> None:
        kept = {other: shards for other, shards in self.schedule.accumulated_by().items() if other != number}
        lost = self.actors.pop(number)
        assert +self.schedule.actor_lost(number) == Counter(key[0] for key in lost.summed)
        assert self.schedule.accumulated_by() == kept, "what others have summed stays"
        assert self.all_records() == self.records, "records that are in stay in"

    def all_records(self) -> set[ShardKey]:
        return {(number, index) for number in self.rounds for index in self.schedule.records(number)}

    def close_records(self) -> None:
        number, records = self.newest, self.schedule.records(self.newest)
        if number not in self.closed_with and self.schedule.records_complete(number) and records:
            self.closed_with[number] = records
            self.schedule.fit_ready(number)

    def reduce(self) -> bool:
        """Ask each actor for its sum; one of them may die of it."""
        for number, shards in self.schedule.accumulated_by().items():
            if self.fault(0.2):
                self.die(number)
                return False
            assert tuple(sorted(self.actors[number].summed)) == shards
        return True

    def check_end(self) -> None:
        counted = Counter(key for actor in self.actors.values() for key in actor.summed)
        for number, shards in self.rounds.items():
            given_up = {s.id: f"cause {MAX_ATTEMPTS}" for s in shards if self.charged[s.key] == MAX_ATTEMPTS}
            assert self.schedule.given_up(number) == given_up
            for shard in shards:
                assert counted[shard.key] == (shard.id not in given_up)
                assert self.charged[shard.key] <= MAX_ATTEMPTS and self.spared[shard.key] <= MAX_SPARED
            assert self.closed_with.get(number, []) == self.schedule.records(number), "the fit holds what counts"
        summed = {n: tuple(sorted(actor.summed)) for n, actor in self.actors.items() if actor.summed}
        assert self.schedule.accumulated_by() == summed
        assert self.all_records() == self.records >= set(counted)


@pytest.mark.parametrize("lagged", [False, True])
def test_every_group_of_rounds_ends_with_every_shard_counted_once_or_given_up(lagged: bool):
    given_up = redone = earlier = spared = worn_out = 0
    for seed in SEEDS:
        simulation = Simulation(seed, lagged)
        simulation.run()
        given_up += any(simulation.schedule.given_up(number) for number in simulation.rounds)
        redone += simulation.schedule.retried.total() > 0
        earlier += simulation.redone_of_earlier_rounds > 0
        spared += any(key not in simulation.charged for key in simulation.spared)
        worn_out += MAX_SPARED in simulation.spared.values()
    assert given_up > 300 and redone > 1000 and earlier > 200, "the faults did happen"
    assert spared > 300 and worn_out > 300


def collect(schedule: Schedule, actor: int) -> Shard:
    task = schedule.next_task(actor)
    assert task is not None and task.kind == "collect"
    schedule.collected(task.shard)
    return task.shard


def accumulate(schedule: Schedule, actor: int) -> Shard:
    task = schedule.next_task(actor)
    assert task is not None and task.kind == "accumulate"
    schedule.accumulated(task.shard)
    return task.shard


def test_a_round_without_faults_deals_each_shard_once():
    schedule = schedule_of(3)
    assert [collect(schedule, actor).index for actor in (5, 6, 5)] == [0, 1, 2]
    assert schedule.records_complete(ROUND) and schedule.records(ROUND) == [0, 1, 2] and not schedule.complete
    assert schedule.next_task(5) is None, "the fit is not there"
    schedule.fit_ready(ROUND)
    assert [accumulate(schedule, actor).index for actor in (5, 5, 6)] == [0, 2, 1]
    assert schedule.complete and schedule.accumulated_by() == {5: ((7, 0), (7, 2)), 6: ((7, 1),)}
    assert schedule.next_task(5) is None
    assert (schedule.retried.total(), schedule.given_up(ROUND)) == (0, {})


def test_with_the_fit_there_from_the_start_gradients_wait_for_nothing():
    schedule = schedule_of(2)
    schedule.fit_ready(ROUND)
    assert collect(schedule, 0).index == accumulate(schedule, 0).index == 0
    assert not schedule.records_complete(ROUND)
    assert collect(schedule, 0).index == accumulate(schedule, 0).index == 1
    assert schedule.complete and schedule.records_complete(ROUND)


def test_a_death_loses_the_shards_of_that_actor_alone_and_no_record():
    schedule = schedule_of(5)
    for actor in (0, 1, 0, 1):
        collect(schedule, actor)
    schedule.fit_ready(ROUND)
    accumulate(schedule, 0)
    accumulate(schedule, 1)
    assert schedule.actor_lost(0)[ROUND] == 1
    assert schedule.accumulated_by() == {1: ((7, 1),)}
    assert schedule.records(ROUND) == [0, 1, 2, 3]
    assert schedule.retried[ROUND] == 2
    assert accumulate(schedule, 1).index == 3, "held elsewhere, not lost"
    for index in (0, 2, 4):
        assert collect(schedule, 2).index == accumulate(schedule, 2).index == index, "the others are done again"
    assert schedule.complete
    assert not schedule.actor_lost(9), "nobody"


def test_a_death_in_a_later_round_has_the_shards_of_earlier_ones_done_again_under_their_own_fit():
    schedule = schedule_of(2)
    collect(schedule, 0)
    collect(schedule, 1)
    schedule.fit_ready(ROUND)
    accumulate(schedule, 0)
    accumulate(schedule, 1)
    schedule.open_round(some_shards(2, ROUND + 1))
    assert not schedule.complete
    collect(schedule, 0)
    assert schedule.next_task(0).shard.id == "8/1", "the fit of round 8 is not there; that of 7 does not do"
    assert +schedule.actor_lost(0) == {ROUND: 1}
    assert (schedule.retried[ROUND], schedule.retried[ROUND + 1]) == (1, 2)
    assert collect(schedule, 1).id == "7/0"
    assert accumulate(schedule, 1).id == "7/0", "its round's fit is there still"
    assert [collect(schedule, 1).id for _ in range(2)] == ["8/0", "8/1"]
    schedule.fit_ready(ROUND + 1)
    assert [accumulate(schedule, 1).id for _ in range(2)] == ["8/0", "8/1"]
    assert schedule.complete and schedule.accumulated_by() == {1: ((7, 0), (7, 1), (8, 0), (8, 1))}


def test_an_actor_that_is_to_leave_finishes_what_it_holds_and_is_needed_until_the_commit():
    schedule = schedule_of(3)
    collect(schedule, 0)
    assert schedule.next_task(0, [1], leaving=True) is None
    assert schedule.depends_on(0) and not schedule.depends_on(1)
    schedule.fit_ready(ROUND)
    task = schedule.next_task(0, [1], leaving=True)
    assert task is not None and str(task) == "accumulate 7/0"
    schedule.accumulated(task.shard)
    assert schedule.depends_on(0), "its sum is not committed"


def test_a_record_that_comes_again_is_known():
    schedule = schedule_of(1)
    task = schedule.next_task(0)
    assert schedule.collected(task.shard) is False
    schedule.actor_lost(0)
    assert schedule.records_complete(ROUND), "the fit need not wait"
    again = schedule.next_task(1)
    assert again.kind == "collect" and schedule.collected(again.shard) is True


def test_a_shard_is_given_up_after_exactly_three_attempts_with_its_last_cause():
    schedule = schedule_of(2)
    for attempt in range(MAX_ATTEMPTS):
        assert not schedule.records_complete(ROUND)
        task = schedule.next_task(attempt)
        assert task is not None and task.shard.index == 0
        told = schedule.failed(task.shard, f"cause {attempt}")
        assert told == f"shard 0 of round 8 failed (cause {attempt}); it is " + (
            "given up after 3 attempts" if attempt == 2 else "tried again"
        )
    assert schedule.given_up(ROUND) == {"7/0": "cause 2"}
    assert collect(schedule, 0).index == 1
    assert schedule.records_complete(ROUND) and schedule.records(ROUND) == [1]
    schedule.fit_ready(ROUND)
    accumulate(schedule, 0)
    assert schedule.complete and not schedule.actor_lost(2)
    assert schedule.given_up(ROUND) == {"7/0": "cause 2"}, "given up for good"


def test_one_bad_actor_cannot_use_up_the_attempts_of_a_shard():
    schedule = schedule_of(2)
    for index in (0, 1):
        task = schedule.next_task(0, [0, 1])
        assert task is not None and task.shard.index == index
        schedule.failed(task.shard, "this actor fails at everything")
    assert schedule.next_task(0, [0, 1]) is None, "both shards are left to the other actor"
    task = schedule.next_task(1, [0, 1])
    assert task is not None and task.shard.index == 0
    assert schedule.next_task(0, [0]) is not None, "alone, it must try again"


def test_a_death_charges_only_the_shard_in_hand():
    schedule = schedule_of(2)
    for actor in range(MAX_ATTEMPTS):
        bystander = collect(schedule, actor)
        in_hand = schedule.next_task(actor)
        assert (bystander.index, in_hand.shard.index) == (0, 1)
        schedule.failed(in_hand.shard, "died")
        schedule.actor_lost(actor)
    assert schedule.given_up(ROUND) == {"7/1": "died"}
    assert collect(schedule, 9).index == 0, "lost three times, never at fault"


def test_a_shard_given_up_after_its_record_is_in_stays_in_the_fit():
    schedule = schedule_of(1)
    collect(schedule, 0)
    schedule.fit_ready(ROUND)
    for attempt in range(MAX_ATTEMPTS):
        task = schedule.next_task(0)
        assert task.kind == "accumulate"
        if "given up" not in schedule.failed(task.shard, "overflow"):
            assert collect(schedule, 0).index == 0, attempt
    assert schedule.complete and schedule.records(ROUND) == [0] and schedule.accumulated_by() == {}


def test_what_is_no_fault_of_a_shard_is_not_charged_within_reason():
    schedule = schedule_of(1)
    for actor in range(MAX_SPARED):
        told = schedule.failed(schedule.next_task(actor).shard, "its node is gone", "spared")
        assert told == "shard 0 of round 8 interrupted (its node is gone); rescheduled, not counted as an attempt"
        schedule.actor_lost(actor)
    assert schedule.given_up(ROUND) == {} and schedule.retried[ROUND] == MAX_SPARED
    for _ in range(MAX_ATTEMPTS):
        assert not schedule.complete
        schedule.failed(schedule.next_task(99).shard, "its node is gone", "spared")
    assert schedule.given_up(ROUND) == {"7/0": "its node is gone"}, "it happens to this shard every time"


@pytest.mark.parametrize("by_memory", [(True, True, True), (True, False, True)])
def test_a_shard_for_which_memory_ran_out_each_time_says_what_to_lower(by_memory: tuple[bool, ...]):
    schedule = schedule_of(1)
    for one in by_memory:
        told = schedule.failed(schedule.next_task(0).shard, "SIGKILL", by_memory=one)
    assert (LESS_MEMORY in told) is all(by_memory)
    assert all(name in LESS_MEMORY for name in ("batch.shard_prompts", "tf_batch_size", "max_new_tokens"))
