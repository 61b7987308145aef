"""What two runs of the same plan must have in common."""

import math

import numpy as np
import pytest

from ray_probe.fitter.ledger import read_ledger
from ray_probe.run.directory import RunDirectory
from ray_probe.run.result import Result
from ray_probe.run.rounds_file import FinishedRound


class Answer:
    """What must be the same: beta to the bit, counts, and the gradient to rounding."""

    def __init__(self, answer: Result, directory: RunDirectory) -> None:
        self.result = result = answer.to_json()
        self.directory = directory
        self.beta = result["beta"]
        self.counts = {k: v for k, v in result["counts"].items() if k not in ("actors", "shards_retried")}
        self.rounds = directory.finished_rounds()
        self.gradient = np.load(directory.state / f"gradient-{len(self.rounds) - 1:06d}.npy")

    def assert_same(self, other: "Answer") -> None:
        assert self.beta == other.beta
        assert [line.fit for line in self.rounds] == [line.fit for line in other.rounds], "bit for bit"
        assert self.counts == other.counts
        assert [counted(line) for line in self.rounds] == [counted(line) for line in other.rounds], "each shard once"
        assert np.linalg.norm(self.gradient - other.gradient) <= 1e-5 * np.linalg.norm(other.gradient)
        assert self.result["entropy"] == {
            name: pytest.approx(value, rel=1e-5) for name, value in other.result["entropy"].items()
        }
        assert self.result.get("change") == other.result.get("change"), "bit for bit"
        groups = [[line.group for line in one.rounds] for one in (self, other)]
        if "change" not in self.result and groups[0] == groups[1]:
            self._assert_same_noise(other)
        assert (self.result["partial"], self.result["conflicts"]) == (
            other.result["partial"],
            other.result["conflicts"],
        )

    def _assert_same_noise(self, other: "Answer") -> None:
        """The same windows, and products of commits that differ by the rounding of gradients."""
        assert [line.gradient_window for line in self.rounds] == [line.gradient_window for line in other.rounds]
        mine, others = self.result["gradient"], other.result["gradient"]
        assert mine["why_null"] == others["why_null"]
        rounding = 1e-4 * others["norm_raw"] ** 2
        for name, unit in (("norm_sq_debiased", 1.0), ("trace_cov", self.counts["sequences"])):
            assert (mine[name] is None) is (others[name] is None)
            if others[name] is not None:
                assert mine[name] == pytest.approx(others[name], rel=0.0, abs=rounding * unit)

    def assert_each_record_once(self) -> None:
        """The ledger holds every shard of the plan, once, in rounds that were closed once."""
        contents = read_ledger(self.directory.ledger)
        batch = self.result["config"]["batch"]
        shards = range(math.ceil(batch["prompts_per_round"] / batch["shard_prompts"]))
        assert sorted(contents.records) == [(n, shard) for n in range(batch["rounds"]) for shard in shards]
        assert [closed.shards for closed in contents.closed] == [tuple(shards)] * batch["rounds"]


def counted(line: FinishedRound) -> list[int]:
    """The shards whose gradient a round holds, from its line in rounds.jsonl."""
    return sorted(shard for shards in line.shards_by_actor.values() for shard in shards)


def most_actors(directory: RunDirectory) -> int:
    """How many actors took part in the round that most took part in; 0 before the first round."""
    return max((len(line.shards_by_actor) for line in directory.finished_rounds()), default=0)
