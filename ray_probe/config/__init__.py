"""The configuration of a run: YAML into frozen, strictly checked models."""

from ray_probe.config.schema import GenerationSettings, ProbeConfig, load_config

__all__ = ["GenerationSettings", "ProbeConfig", "load_config"]
