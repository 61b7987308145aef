"""One pass where the graphs fit, two where they do not, and what was asked for; the plan of memory decides."""

from dataclasses import replace
from typing import Any

import pytest

from ray_probe.checkpoints.memory_forecast import MemoryDemand
from ray_probe.config.loading import config_from_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.run.preparation.forward_passes import Pass, choose_pass

GB = 10**9
MEMORY = MemoryDemand(weights=1 * GB, gradients=2 * GB, activations=1 * GB, logits=0, cache=0, held_a_position=100_000)
SHARD = 4 * 4 * (36 + 64)  # positions, at the longest


def config(fit: str = "leave_one_out", actors: int = 2, **estimator: Any) -> ProbeConfig:
    return config_from_dict({
        "model": {"path": "m"}, "data": {"prompts": ["p"]}, "cluster": {"actors": actors},
        "estimator": {"baseline": {"fit": fit}, **estimator},
    })  # fmt: skip


def chosen(device_gb: float, **sections: Any) -> Pass:
    return choose_pass(config(**sections), MEMORY, 36, round((device_gb - 4) * GB))


def test_graphs_of_the_shards_that_wait_decide() -> None:
    needed_gb = 4 * SHARD * 100_000 / GB  # 8 shards a round, 2 actors
    assert chosen(4 + needed_gb + 0.001).name == "one"
    two = chosen(4 + needed_gb - 0.001)
    assert (two.name, two.held_positions) == ("two", 0)
    assert "4 shards" in two.why and "640 MB" in two.why


def test_no_graph_is_held_on_a_guess() -> None:
    unknown = replace(MEMORY, activations=0, held_a_position=0, unknown="a config without a shape")
    assert choose_pass(config(), unknown, 36, 80 * GB) == Pass("two", 0, "a config without a shape")
    asked = choose_pass(config(**{"pass": "one"}), unknown, 36, 80 * GB)
    assert (asked.name, asked.why) == ("one", "as configured; a config without a shape")
    assert choose_pass(config(**{"pass": "two"}), unknown, 36, 80 * GB).name == "two"


def test_fewer_actors_hold_more() -> None:
    assert chosen(4.7).name == "one" and chosen(4.7, actors=1).name == "two"


def test_a_lagged_fit_has_one_shard_waiting() -> None:
    assert chosen(4.2).name == "two" and chosen(4.2, fit="lagged").name == "one"


def test_a_budget_takes_the_place_of_what_is_free() -> None:
    assert chosen(100, memory_budget_gb=0.1).name == "two"
    assert chosen(4.0, memory_budget_gb=1.0).held_positions == 10_000


@pytest.mark.parametrize("asked", ["one", "two"])
def test_what_is_asked_for_is_done_and_one_pass_keeps_to_its_room(asked: str) -> None:
    found = chosen(4.01, **{"pass": asked})
    assert (found.name, found.held_positions) == (asked, 100 if asked == "one" else 0)
    assert Pass.from_json(found.to_json()) == found


def test_graphs_that_hold_copies_of_experts_are_not_held_unless_asked_for() -> None:
    memory = replace(MEMORY, held_a_batch=2 * GB)
    found = choose_pass(config(), memory, 36, 100 * GB)
    assert (found.name, found.held_positions) == ("two", 0) and "2 GB" in found.why
    assert choose_pass(config(**{"pass": "one"}), memory, 36, 100 * GB).name == "one"
