"""The plan follows from prompts, seed and batch alone; every prompt comes once a pass, every response has its seed."""

import inspect
from collections import Counter
from typing import Any

import numpy as np
import pytest

from ray_probe.errors import PromptsError
from ray_probe.run.preparation.plan import Plan, PromptRef, Shard


def plan(prompts: int = 10, usable: tuple[int, ...] | None = None, **changes: Any) -> Plan:
    texts = tuple(f"prompt {i}" for i in range(prompts))
    batch = {"prompts_per_round": 4, "responses_per_prompt": 3, "shard_prompts": 2, "rounds": 5}
    settings = {"seed": 0, "repeat": True} | batch | changes
    return Plan(texts, tuple(range(prompts)) if usable is None else usable, **settings)


def shards(a_plan: Plan) -> list[Shard]:
    return [shard for number in range(a_plan.rounds) for shard in a_plan.round(number)]


def refs(a_plan: Plan) -> list[PromptRef]:
    return [ref for shard in shards(a_plan) for ref in shard.prompts]


def order(a_plan: Plan, pass_number: int = 0) -> list[int]:
    return [ref.index for ref in refs(a_plan) if ref.pass_number == pass_number]


def test_the_plan_depends_on_prompts_seed_and_batch_alone():
    assert shards(plan()) == shards(plan())
    assert "actors" not in " ".join(inspect.signature(Plan).parameters)
    backwards = plan()
    assert [backwards.round(number) for number in range(4, -1, -1)] == [plan().round(n) for n in range(4, -1, -1)]
    assert order(plan(seed=1)) != order(plan(seed=0))
    assert order(plan(prompts=11)) != order(plan(prompts=10))


def test_the_order_of_prompts_does_not_depend_on_how_they_are_cut_into_rounds_and_shards():
    whole = [(ref.pass_number, ref.index) for ref in refs(plan(prompts_per_round=20, rounds=1))]
    for batch in ({"prompts_per_round": 5, "rounds": 4}, {"prompts_per_round": 10, "rounds": 2, "shard_prompts": 7}):
        assert [(ref.pass_number, ref.index) for ref in refs(plan(**batch))] == whole


def test_a_pass_takes_every_prompt_once_and_the_next_is_reshuffled():
    everything = refs(plan(rounds=10))
    by_pass = [[ref.index for ref in everything if ref.pass_number == number] for number in range(4)]
    assert all(sorted(indices) == list(range(10)) for indices in by_pass)
    assert len({tuple(indices) for indices in by_pass}) == 4
    assert [ref.pass_number for ref in everything] == [position // 10 for position in range(40)]


def test_a_round_may_span_two_passes():
    spanning = plan(prompts_per_round=4).round(2)
    found = [ref for shard in spanning for ref in shard.prompts]
    assert [ref.pass_number for ref in found] == [0, 0, 1, 1]
    assert [ref.index for ref in found] == order(plan())[8:] + order(plan(), 1)[:2]
    more_than_all = plan(prompts=3, prompts_per_round=7)
    assert Counter(ref.index for ref in refs(more_than_all)[:6]) == {0: 2, 1: 2, 2: 2}


def test_the_last_shard_of_a_round_holds_what_is_left():
    sizes = [len(shard.prompts) for shard in plan(prompts_per_round=7, shard_prompts=3).round(1)]
    assert sizes == [3, 3, 1]
    assert [len(shard.prompts) for shard in plan(shard_prompts=100).round(0)] == [4]


def test_shards_are_named_by_round_and_index():
    found = shards(plan())
    assert [shard.id for shard in found] == [f"{number}/{index}" for number in range(5) for index in range(2)]
    assert all(shard.id == f"{shard.round}/{shard.index}" for shard in found)
    assert all(ref.text == f"prompt {ref.index}" for ref in refs(plan()))


def test_every_response_has_a_seed_of_its_own():
    for a_plan in (plan(rounds=12), plan(prompts=3, prompts_per_round=7, rounds=3)):
        seeds = [seed for shard in shards(a_plan) for group in shard.response_seeds() for seed in group]
        assert len(seeds) == a_plan.rounds * a_plan.prompts_per_round * 3 == len(set(seeds))
        assert {len(seed) for seed in seeds} == {4}


def test_a_seed_says_run_pass_prompt_and_replicate_and_not_the_shard():
    for shard in shards(plan(seed=77)):
        for ref, group in zip(shard.prompts, shard.response_seeds(), strict=True):
            assert group == [(77, ref.pass_number, ref.index, replicate) for replicate in range(3)]
    cut = [
        sorted(seed for shard in shards(plan(**batch)) for group in shard.response_seeds() for seed in group)
        for batch in ({"shard_prompts": 1}, {"shard_prompts": 4}, {"prompts_per_round": 20, "rounds": 1})
    ]
    assert cut[0] == cut[1] == cut[2]


def test_too_few_prompts_are_refused_when_they_must_not_repeat():
    assert len(set(order(plan(repeat=False, rounds=2)))) == 8
    with pytest.raises(PromptsError) as caught:
        plan(repeat=False, rounds=3)
    assert str(caught.value) == (
        "data.repeat: got False; 12 prompts are needed and 10 can be used; "
        "set it to true, add prompts, or lower batch.rounds or batch.prompts_per_round"
    )
    with pytest.raises(PromptsError, match="8 prompts are needed and 7 can be used"):
        plan(usable=tuple(range(7)), repeat=False, rounds=2)
    plan(usable=tuple(range(8)), repeat=False, rounds=2)


def test_only_usable_prompts_are_used_under_their_index_in_the_file():
    usable = (1, 4, 5, 9)
    found = refs(plan(usable=usable))
    assert {ref.index for ref in found} == set(usable)
    assert all(sorted(order(plan(usable=usable), number)) == list(usable) for number in range(5))
    assert {ref.text for ref in found} == {f"prompt {i}" for i in usable}
    with pytest.raises(PromptsError, match=r"no prompt is left to use; raise data.max_prompt_tokens"):
        plan(usable=())


def test_the_order_is_uniform():
    firsts = Counter(order(plan(prompts=5, prompts_per_round=5, rounds=1, seed=seed))[0] for seed in range(2000))
    assert np.array([firsts[i] for i in range(5)]) == pytest.approx(400, abs=80)


def test_people_read_rounds_from_1_and_results_hold_them_from_0():
    shard = plan().round(2)[1]
    assert (shard.id, shard.label) == ("2/1", "shard 1 of round 3")
