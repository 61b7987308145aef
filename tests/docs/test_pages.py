"""Links of README and docs resolve, commands and targets exist, code runs."""

import re

import pytest
import typer
from support.pages import ROOT, Page, page, pages

from ray_probe.cli.main import app
from ray_probe.service.client import ProbeClient

PAGES = pages()
MAKEFILE = (ROOT / "Makefile").read_text()
every_page = pytest.mark.parametrize("shown", PAGES, ids=lambda shown: shown.name)


def commands(shown: Page) -> list[str]:
    """Returns the calls of the command line in the shell blocks of a page."""
    text = re.sub(r"(?:^|\s)#.*$", "", re.sub(r"\\\n\s*", "", "\n".join(shown.blocks("sh"))), flags=re.MULTILINE)
    return re.findall(r"(?<![\w/.-])(?<!-n )ray-probe ([a-z]+\b[^'\n&|]*)", text)


@every_page
def test_every_link_leads_to_a_page_and_a_heading_that_are_there(shown: Page) -> None:
    for link in shown.links():
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (shown.path.parent / path).resolve() if path else shown.path
        assert target.exists(), link
        assert not anchor or anchor in page(target).anchors(), link


@every_page
def test_every_command_and_option_that_is_shown_exists(shown: Page) -> None:
    known = typer.main.get_command(app)
    for call in commands(shown):
        name, *words = call.split()
        options = {option for parameter in known.commands[name].params for option in parameter.opts}  # type: ignore[attr-defined]
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= options, call


def test_many_commands_are_shown() -> None:
    assert sum(len(commands(shown)) for shown in PAGES) >= 40


@every_page
def test_every_make_target_and_benchmark_that_is_named_exists(shown: Page) -> None:
    from benchmarks.__main__ import NUMERICS, OTHERS

    targets = set(re.findall(r"(?:`|^)make ([a-z-]+)", shown.text, re.MULTILINE))
    assert targets <= set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    for names in re.findall(r"`python -m benchmarks ([a-z_ ]+)`", shown.text):
        assert set(names.split()) <= {*NUMERICS, *OTHERS}


@every_page
def test_every_python_block_compiles_and_the_client_has_what_is_called(shown: Page) -> None:
    for code in shown.blocks("python"):
        compile(code, shown.name, "exec")
        assert all(callable(getattr(ProbeClient, method)) for method in re.findall(r"client\.(\w+)\(", code))


def test_the_client_is_shown_at_work() -> None:
    shown = [code for found in PAGES for code in found.blocks("python") if "ProbeClient.connect()" in code]
    assert len(shown) == 2 and shown[0] == shown[1]
    assert set(re.findall(r"client\.(\w+)\(", shown[0])) == {"probe", "wait", "beta", "variance"}


def test_the_library_example_runs_and_leaves_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", page("docs/service.md").section("Without a service"), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    model = names["processor"].model  # type: ignore[attr-defined]
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert sum(float(parameter.grad.norm()) for parameter in model.parameters()) > 0
