"""Small runs in this process on a checkpoint of a few thousand parameters."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ray_probe.checkpoints.load import load_model
from ray_probe.checkpoints.tokenizer.load import load_tokenizer
from ray_probe.config import ProbeConfig
from ray_probe.controller.local_backend import LocalBackend
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.policy.logits import SamplingRule
from ray_probe.fitter.fitter import Fitter
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.gradient.shard_sum import GradientSum
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.probe_components import ProbeComponents
from ray_probe.rollout.builder import build_rollout
from ray_probe.rollout.rollout import Rollout
from ray_probe.run.directory import RunDirectory
from ray_probe.run.messages import ShardKey
from ray_probe.run.preparation.plan import Plan, Shard
from ray_probe.run.preparation.prepared import baseline_rule
from ray_probe.run.progress import Progress
from ray_probe.sequence_processor import SequenceProcessor
from support.models import probe_config, save_checkpoint, tiny_llama

TEXTS = ("abc", "f", "dde", "ab", "ecab", "bb", "cafe")
POLICY = "policy"
ROUNDS = 3
BUCKET = 1000
GROUP = "rounds 0 to 2"


def a_checkpoint(directory: Path) -> Path:
    return save_checkpoint(directory / "checkpoint", tiny_llama(8), "abcdef")


def settings(checkpoint: Path, mode: str = "regression", fit: str = "leave_one_out", **sections: Any) -> ProbeConfig:
    estimator = {"baseline": {"mode": mode, "fit": fit}} | sections.pop("estimator", {})
    generation = {"max_new_tokens": 8, "tf_batch_size": 3, "gen_batch_size": 4} | sections.pop("generation", {})
    batch = {"prompts_per_round": 5, "responses_per_prompt": 2, "shard_prompts": 2, "rounds": ROUNDS}
    data = {"prompts": list(TEXTS), "seed": 4}
    return probe_config(checkpoint, data=data, batch=batch, generation=generation, estimator=estimator, **sections)


def plan_of(config: ProbeConfig) -> Plan:
    batch = config.batch
    return Plan(
        TEXTS, tuple(range(len(TEXTS))), config.data.seed, batch.prompts_per_round, batch.responses_per_prompt,
        batch.shard_prompts, batch.rounds, True,
    )  # fmt: skip


def rollout_of(config: ProbeConfig) -> Rollout:
    return build_rollout(config, Path(config.model.path), POLICY)


def components_of(rollout: Rollout) -> ProbeComponents:
    return rollout._components


def processor_of(rollout: Rollout) -> SequenceProcessor:
    return components_of(rollout).processor


def gradient_of(rollout: Rollout) -> GradientSum:
    return rollout._gradient


def set_gradient(rollout: Rollout, gradient: GradientSum) -> None:
    rollout._gradient = gradient


def held_of(rollout: Rollout) -> dict[ShardKey, Any]:
    """What a rollout holds of the shards that wait for their fit."""
    return rollout._shards.held


@dataclasses.dataclass
class Job:
    """A run in this process."""

    config: ProbeConfig
    path: Path
    rollouts: list[Rollout]

    @classmethod
    def of(cls, config: ProbeConfig, path: Path, rollouts: int = 1) -> "Job":
        RunDirectory.create(path.parent, path.name)
        return cls(config, path, [rollout_of(config) for _ in range(rollouts)])

    def run(
        self, listener: Callable[[Progress], None] = lambda progress: None, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Any]:
        directory = RunDirectory(self.path)
        self.backend = LocalBackend(self.rollouts, baseline_rule(self.config), POLICY, directory, BUCKET)
        self.probe = OfflineEntropyProbe(self.config, plan_of(self.config), self.backend, directory, listener, stop)
        return self.probe.run().to_json()

    @property
    def gradient(self) -> np.ndarray:
        """Summed over all responses of committed rounds."""
        return self.backend.store.read(0, self.backend.layout.size)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "rounds.jsonl").read_text().splitlines()]


def flat(rollout: Rollout) -> np.ndarray:
    """The rollout's gradient sum."""
    return rollout.bucket(0, rollout.layout.size)


def by_name(layout: ParameterLayout, vector: np.ndarray) -> dict[str, np.ndarray]:
    return {name: vector[start:stop].reshape(shape) for name, shape, start, stop in layout.ranges()}


def untimed(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "timing"}


def collected(config: ProbeConfig) -> tuple[Rollout, tuple[Shard, ...], PublishedFit]:
    """A rollout that has collected round 0, and the fit of that round."""
    rollout, fitter, shards = rollout_of(config), Fitter(baseline_rule(config), POLICY), plan_of(config).round(0)
    rollout.begin(GROUP)
    for shard in shards:
        fitter.accept(rollout.collect(shard).delivery)
    return rollout, shards, fitter.close_round(0, [shard.index for shard in shards])


class OtherScorer(SequenceProcessor):
    """Scores under another temperature than it samples under."""

    def score_parts(self, *arguments: Any, **options: Any) -> Any:
        other = copy.copy(self)
        other.rule = SamplingRule(1.2 * self.rule.temperature, self.rule.top_p)
        return SequenceProcessor.score_parts(other, *arguments, **options)


def misscoring_rollout(config: ProbeConfig) -> Rollout:
    """One that the parity gate must stop."""
    model, rule = load_model(Path(config.model.path), "float32"), baseline_rule(config)
    scorer = OtherScorer(model, load_tokenizer(Path(config.model.path)), config.generation, rule.features)
    return Rollout(ProbeComponents(scorer), GradientSum(model, "all"), rule, POLICY, "cpu")
