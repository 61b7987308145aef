"""Runs without a model: an actor that holds a light rollout imports no torch, so it is replaced in a moment."""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray

from ray_probe.checkpoints.memory_forecast import MemoryDemand
from ray_probe.checkpoints.tokenizer.eos import Eos
from ray_probe.cluster.actors.rollout import RolloutActor
from ray_probe.config.loading import config_from_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.core.estimator.baselines import BaselineRule
from ray_probe.rollout.loader import LoadRequest
from ray_probe.run.messages import ActorFacts
from ray_probe.run.preparation.plan import Plan
from ray_probe.run.preparation.prepared import CheckpointId, PreparedRun, PromptFacts, baseline_rule
from ray_probe.system.failpoints import fail_at
from support.light_comparison import LightComparison
from support.light_rollout import LAYOUT as LAYOUT
from support.light_rollout import LightRollout

CAP = 8
FEATURES = ("H", "top1", "pos_frac")
PROMPTS = 40
BUCKET = 1000  # numbers: the gradient has several thousand
HEAVY = ("torch", "transformers")
POLICY = "light"


class LightActor(RolloutActor):
    """The real actor around a light rollout; `slow` gives one that takes its time."""

    shard_s = 0.0

    def __init__(self) -> None:
        super().__init__()
        fail_at("light_init")

    def start(self, order: LoadRequest) -> ActorFacts:
        fail_at("light_start")
        rule = baseline_rule(config_from_dict(order.config))
        kind = LightRollout if order.against is None else LightComparison
        self._rollout = kind(rule, order.policy_id, self._on_progress, self.shard_s)
        return ActorFacts(kind.layout, "cpu", 1, 10**9, pid=os.getpid(), node=ray.util.get_node_ip_address())

    def bucket(self, start: int, stop: int, *others: Any) -> Any:
        fail_at("light_bucket", str(start))
        return super().bucket(start, stop, *others)

    def heavy(self) -> list[str]:
        """What this process has imported and should not have."""
        return [name for name in HEAVY if name in sys.modules]


def here(rule: BaselineRule, rollouts: int = 1) -> list[LightRollout]:
    """Rollouts for a run in this process; of a comparison where the rule has two targets."""
    kind = LightRollout if rule.targets == 1 else LightComparison
    return [kind(rule, POLICY) for _ in range(rollouts)]


def slow(shard_s: float) -> type[LightActor]:
    """Actors that take so long for each half of a shard."""
    return type("LightActor", (LightActor,), {"shard_s": shard_s})


def light_config(directory: Path, **sections: dict[str, Any]) -> ProbeConfig:
    """The config of a run of three rounds of six shards."""
    raw: dict[str, dict[str, Any]] = {
        "model": {"path": "light"},
        "data": {"prompts": [f"prompt {number}" for number in range(PROMPTS)]},
        "batch": {"prompts_per_round": 6, "responses_per_prompt": 3, "shard_prompts": 1, "rounds": 3},
        "generation": {"max_new_tokens": CAP},
        "estimator": {"baseline": {"features": [*FEATURES, "position_mean"]}},
        "output": {"dir": str(directory)},
    }
    for name, values in sections.items():
        raw[name] = _merged(raw.get(name, {}), values)
    return config_from_dict(raw)


def light_prepared(config: ProbeConfig) -> PreparedRun:
    """What a check of the inputs would give, where there is no checkpoint to look at."""
    texts, batch = tuple(config.data.prompts), config.batch
    plan = Plan(
        texts, tuple(range(len(texts))), config.data.seed, batch.prompts_per_round, batch.responses_per_prompt,
        batch.shard_prompts, batch.rounds, config.data.repeat,
    )  # fmt: skip
    prompts = PromptFacts(source="<list>", sha256="", rendered_sha256=None, count=len(texts), longest_tokens=2)
    return PreparedRun(
        config, CheckpointId(Path(POLICY), POLICY, None, ""), prompts, plan,
        POLICY, datetime(2026, 5, 1, tzinfo=UTC), MemoryDemand(0, 0, 0, 0, 0, 1), Eos((0,), "config.json"),
        None if config.compare.against is None else CheckpointId(Path(config.compare.against), POLICY, None, ""),
    )  # fmt: skip


def light_run(directory: Path, actors: int = 2, **sections: dict[str, Any]) -> PreparedRun:
    """Such a run on so many actors, ready to start."""
    return light_prepared(light_config(directory, cluster={"actors": actors}, **sections))


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A section with another's settings laid over it."""
    inner = {key: _merged(one[key], value) for key, value in other.items() if isinstance(value, dict) and key in one}
    return one | other | inner
