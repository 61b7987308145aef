"""The page of every key is what its generator writes, and has every key once."""

import re
import subprocess
import sys

from pydantic import BaseModel
from support.pages import ROOT, page

from ray_probe.config import ProbeConfig
from ray_probe.config.section import section_of

PAGE = page("docs/configuration.md")


def config_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Keys of a section, then those of its sections; one that may be null is a key of its own too."""
    own, inner = [], []
    for name, field in section.model_fields.items():
        found = section_of(field.annotation)
        if found is not None:
            inner += config_keys(found, f"{prefix}{name}.")
        if found is not field.annotation:
            own.append(f"{prefix}{field.alias or name}")
    return own + inner


def test_the_page_is_what_the_generator_writes() -> None:
    code = "import generate_configuration; print(generate_configuration.page(), end='')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs", capture_output=True, text=True, check=True)
    assert done.stdout == PAGE.text, "write it again: make docs"


def test_every_key_of_a_config_is_in_its_tables_once_and_no_other() -> None:
    assert re.findall(r"^\| `([\w.]+)` \|", PAGE.text, re.MULTILINE) == config_keys(ProbeConfig)
