"""Reads a configuration from YAML and writes it again."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic_core
from pydantic import BaseModel, ValidationError

from ray_probe.config.field_types import closest
from ray_probe.config.schema import ProbeConfig
from ray_probe.config.section import section_of
from ray_probe.config.strict_yaml import apply_override, dump_yaml_text, load_yaml
from ray_probe.errors import ConfigError, bad_value, cut

SECRET_SECTIONS = ("notify",)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> ProbeConfig:
    """Read a YAML file, apply `dotted.key=value` overrides in order, and validate.

    Without a file the overrides alone count.

    Raises:
        ConfigError: one line about the first error.
    """
    raw = {} if path is None else load_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    return config_from_dict(raw)


def config_from_dict(raw: Mapping[str, Any], source: str = "config") -> ProbeConfig:
    """Validate a plain mapping; errors about unknown keys name `source`.

    Raises:
        ConfigError: one line about the first error.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(bad_value(source, raw, f"need a mapping with keys from {_names(ProbeConfig)}"))
    try:
        # The two sections with required fields, so that an error names a missing field in full.
        return ProbeConfig.model_validate({"model": {}, "data": {}, **raw})
    except ValidationError as error:
        found = error.errors(include_url=False)
    found.sort(key=lambda item: item["type"] not in _UNKNOWN_KEY)  # a typo explains the errors that follow from it
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise ConfigError(_one_line(found[0], source) + more)


def to_dict(config: ProbeConfig) -> dict[str, Any]:
    """Returns the config in plain JSON types."""
    return config.model_dump(mode="json", by_alias=True)


def without_secrets(config: ProbeConfig) -> dict[str, Any]:
    """Returns the config for a result.

    It leaves out the command and the address that are notified: they may hold a secret.
    """
    return {name: part for name, part in to_dict(config).items() if name not in SECRET_SECTIONS}


def dump_yaml(config: ProbeConfig) -> str:
    """Returns YAML that `load_config` reads back as an equal config."""
    return dump_yaml_text(to_dict(config))


_UNKNOWN_KEY = ("extra_forbidden", "invalid_key")


def _names(section: type[BaseModel]) -> str:
    return ", ".join(_keys(section))


def _keys(section: type[BaseModel]) -> list[str]:
    """Returns a section's keys as users write them."""
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_at(path: Iterable[object]) -> Any:
    section: Any = ProbeConfig
    for part in path:
        section = section_of(section.model_fields[part].annotation)
    return section


def _one_line(error: pydantic_core.ErrorDetails, source: str) -> str:
    kind, location = error["type"], error["loc"]
    dotted = ".".join(map(str, location))
    if kind in _UNKNOWN_KEY:
        return _unknown_key([str(part) for part in location], source)
    if kind == "missing":
        what = _section_at(location[:-1]).model_fields[location[-1]].description.rstrip(".")
        return f"{dotted}: missing; need {what[0].lower()}{what[1:]}"
    if "field" in error.get("ctx", {}):
        about = error["ctx"]
        return bad_value(".".join(filter(None, (dotted, about["field"]))), about["value"], about["remedy"])
    if kind == "model_type":
        remedy = f"need a mapping with keys from {_names(_section_at(location))}"
    elif kind == "literal_error":
        remedy = f"need {error['ctx']['expected']}"
    else:
        remedy = "need true or false" if kind == "bool_type" else error["msg"]
    return bad_value(dotted, error["input"], remedy)


def _unknown_key(location: list[str], source: str) -> str:
    *path, key = location
    section = _section_at(path)
    close = closest(key, _keys(section))
    hint = f"did you mean {'.'.join([*path, close])!r}?" if close else f"known keys: {_names(section)}"
    dotted = ".".join(location)
    return f"{source}: unknown key {cut(dotted)!r}; {hint}"
