"""The configuration of a run: YAML into frozen, strictly checked models."""

from ray_probe.config.loading import load_config
from ray_probe.config.schema import GenerationSettings, ProbeConfig

__all__ = ["GenerationSettings", "ProbeConfig", "load_config"]
