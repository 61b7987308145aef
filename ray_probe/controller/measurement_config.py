"""The configuration of a measurement of a service."""

from collections.abc import Mapping
from typing import Any

from ray_probe.config.loading import config_from_dict, to_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.errors import ConfigError, bad_value

REPORTING_SECTIONS = ("metrics", "notify")
"""Sections that the service reads from its own configuration; its measurements are without them."""
FIXED_SECTIONS = ("cluster", *REPORTING_SECTIONS)
FIXED_KEYS = ("output.dir", "output.name")


def measurement_config(base: ProbeConfig, settings: Mapping[str, Any]) -> ProbeConfig:
    """Returns the service's configuration with these settings by dotted key.

    Raises:
        ConfigError: a setting belongs to the service, or is invalid.
    """
    raw = {name: section for name, section in to_dict(base).items() if name not in REPORTING_SECTIONS}
    for key, value in settings.items():
        if key in FIXED_KEYS or key.partition(".")[0] in FIXED_SECTIONS:
            remedy = "it belongs to the service and stays as `up` was given it"
            raise ConfigError(bad_value("--set", key, remedy))
        *path, name = key.split(".")
        place = raw
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigError(bad_value("--set", key, f"{part} is no section; see the keys of a config"))
        place[name] = value
    return config_from_dict(raw)
