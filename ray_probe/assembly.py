"""Putting a rollout together from a configuration: model, processor, components, gradient."""

from collections.abc import Callable
from pathlib import Path

from ray_probe.checkpoints import check_vocabulary, load_model, load_tokenizer
from ray_probe.config import ProbeConfig
from ray_probe.gradients import GradientSum
from ray_probe.probe_components import ProbeComponents
from ray_probe.rollout import Rollout
from ray_probe.rules import baseline_rule
from ray_probe.sequence_processor import SequenceProcessor


def build_rollout(
    config: ProbeConfig,
    directory: Path,
    policy_id: str,
    device: str = "cpu",
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> Rollout:
    """Load the checkpoint and put a rollout together.

    Args:
        config: the run's configuration.
        directory: the checkpoint's directory on this node.
        policy_id: what records are marked with.
        device: `cpu` or `cuda`.
        on_progress: told of tokens done.
    """
    model = load_model(directory, config.model.dtype, device)
    tokenizer = load_tokenizer(directory)
    check_vocabulary(directory, model, tokenizer)
    rule = baseline_rule(config)
    processor = SequenceProcessor(model, tokenizer, config.generation, rule.features, on_progress)
    components = ProbeComponents(processor, config.estimator.x_estimator_mode, config.generation.rb_requires_grad)
    return Rollout(components, GradientSum(model, config.model.trainable), rule, policy_id)
