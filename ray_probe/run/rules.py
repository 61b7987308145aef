"""From a configuration to the rules of `core`, which takes plain numbers; nothing heavy is imported."""

from ray_probe.config import ProbeConfig
from ray_probe.core.estimator.baselines import BaselineRule


def baseline_rule(config: ProbeConfig) -> BaselineRule:
    """The baseline of a configuration."""
    baseline = config.estimator.baseline
    return BaselineRule(
        baseline.mode, baseline.fit, baseline.ridge_lambda, baseline.ema_decay, tuple(baseline.features),
        config.generation.max_new_tokens,
    )  # fmt: skip
