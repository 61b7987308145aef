"""docs/architecture.md has the packages in the layers that lint holds."""

import re
import tomllib

import pytest
from support.pages import ROOT, page

PAGE = page("docs/architecture.md")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
TABLES = re.split(r"\n\n(?!\|)", PAGE.section("Packages"))


def layers(container: str) -> list[set[str]]:
    """The layers of a contract, from the top."""
    (contract,) = [one for one in CONTRACTS if one.get("containers") == [container]]
    return [set(layer.split(" | ")) for layer in contract["layers"] if layer != "__main__"]


@pytest.mark.parametrize(("container", "first"), [("ray_probe", "cli"), ("ray_probe.cluster", "controllers")])
def test_the_layers_are_those_of_the_contract(container: str, first: str) -> None:
    (table,) = [part for part in TABLES if re.search(rf"^\| `{first}` ", part, re.MULTILINE)]
    shown = [set(re.findall(r"`([\w.]+)`", cell)) for cell in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)]
    assert shown == layers(container)


def test_every_module_that_is_named_exists() -> None:
    named = re.findall(r"`((?:\w+/)*\w+\.py)`", PAGE.text)
    assert len(named) >= 15
    assert [name for name in named if not any((ROOT / top / name).is_file() for top in ("ray_probe", ""))] == []
