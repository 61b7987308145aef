"""Micro-batches hold every response once, within limits, with little padding."""

import random

import pytest

from ray_probe.model.micro_batches import MOST_PADDING, plan_micro_batches


@pytest.mark.parametrize("seed", range(200))
def test_every_response_is_in_one_micro_batch_within_its_limits(seed: int) -> None:
    numbers = random.Random(seed)
    lengths = [numbers.randint(1, numbers.choice([5, 60, 2000])) for _ in range(numbers.randint(1, 300))]
    sequences, tokens = numbers.randint(1, 64), numbers.randint(1, 8000)
    batches = plan_micro_batches(lengths, sequences, tokens)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        width, real = max(lengths[place] for place in batch), sum(lengths[place] for place in batch)
        assert len(batch) <= sequences
        assert width * len(batch) <= tokens or len(batch) == 1
        assert 1 - real / (width * len(batch)) <= MOST_PADDING + 1e-12


def test_equal_lengths_fill_a_micro_batch() -> None:
    assert [len(batch) for batch in plan_micro_batches([10] * 20, 8, 1000)] == [8, 8, 4]
    assert [len(batch) for batch in plan_micro_batches([10] * 20, 8, 45)] == [4] * 5


def test_the_plan_depends_on_lengths_alone_and_not_on_what_came_before() -> None:
    lengths = [3, 9, 9, 1, 4]
    assert plan_micro_batches(lengths, 2, 100) == plan_micro_batches(lengths, 2, 100) == [[1, 2], [4, 0], [3]]
