"""Writes docs/configuration.md from the models in ray_probe/config/schema.py."""

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ray_probe.config import ProbeConfig
from ray_probe.config.section import section_of

PAGE = Path(__file__).with_name("configuration.md")
TABLE = ["", "| key | default | meaning |", "| --- | --- | --- |"]
CITATION = re.compile(r"\s*\([^()]*(?:docs/|\bspec )[^()]*\)")
HEADING = """\
# Configuration

<!-- Written by docs/generate_configuration.py (`make docs`). Change ray_probe/config/schema.py instead. -->

A configuration is a YAML file. Unknown and duplicate keys are refused, `1e-3` is a number, and NaN and infinity are
refused; the message names the key, the value and the remedy. `--set KEY=VALUE` sets any key from the command line, and
`config.yaml` in the run directory holds the resolved configuration.
"""


def _sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, str, type[BaseModel]]]:
    """Yields path, meaning and model of every section, parents first."""
    for name, field in model.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            # A citation of another page is for readers of the code.
            yield f"{path}{name}", CITATION.sub("", inspect.getdoc(inner) or ""), inner
            yield from _sections(inner, f"{path}{name}.")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    shown = ", ".join(map(str, value)) if isinstance(value, tuple) else value
    return f"`[{shown}]`" if isinstance(value, tuple) else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _row(section: str, name: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{section}.{field.alias or name}` | {_default(field)} | {meaning} |"


def page() -> str:
    """Returns the text of docs/configuration.md."""
    lines = [HEADING]
    for section, meaning, model in _sections(ProbeConfig):
        keys = [(name, field) for name, field in model.model_fields.items() if not _is_section(field)]
        lines += [f"## {section}", "", meaning, *TABLE, *(_row(section, *key) for key in keys), ""]
    return "\n".join(lines)


def _is_section(field: FieldInfo) -> bool:
    """Returns whether the field always holds a section, so that it has no row."""
    return section_of(field.annotation) is field.annotation


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
