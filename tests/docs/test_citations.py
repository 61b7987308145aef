"""Code and tests cite pages and headings that exist, and no other document."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.pages import ROOT, page

CITED = re.compile(r"docs/(\w+)\.md`?((?:[,:]? \(?(?:and |under |headings? )?\"[^\"]+\"[,)]?(?: and)?)*)")
OLD = re.compile(r"\bspec(?:ification)? sections? \d", re.IGNORECASE)
CODE = [
    path
    for root in ("ray_probe", "tests", "benchmarks", "configs", "deploy", "docs")
    for path in sorted((ROOT / root).rglob("*"))
    if path.suffix in (".py", ".yaml", ".sh", ".toml")
] + [ROOT / "launch.py", ROOT / "Makefile", ROOT / "pyproject.toml"]


def citations(text: str) -> list[tuple[str, list[str]]]:
    """Names of the cited pages with the headings that follow in quotation marks."""
    joined = re.sub(r"\s*\n\s*(?:# ?)?", " ", text)
    return [(name, re.findall(r'"([^"]+)"', rest)) for name, rest in CITED.findall(joined)]


def test_a_citation_is_read_over_a_line_break() -> None:
    text = 'Sums (see docs/specification.md,\n    "Noise", "Parity"). And "other" words; docs/guide.md.'
    assert citations(text) == [("specification", ["Noise", "Parity"]), ("guide", [])]
    assert citations('docs/specification.md, "Noise" and "Parity".') == [("specification", ["Noise", "Parity"])]


def test_every_cited_page_and_heading_is_there() -> None:
    for path in CODE:
        if path == Path(__file__):
            continue
        for name, headings in citations(path.read_text(encoding="utf-8")):
            cited = ROOT / "docs" / f"{name}.md"
            assert cited.is_file(), f"{path}: docs/{name}.md"
            assert set(headings) <= set(page(cited).headings()), f"{path}: docs/{name}.md, {headings}"


def linted() -> list[str]:
    """The paths whose words `make lint` checks."""
    (line,) = re.findall(r"check_words\.py (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return str(line).split()


def test_the_words_of_readme_and_docs_are_checked_by_lint() -> None:
    assert {"README.md", "docs", "CONTRIBUTING.md", "CHANGELOG.md"} <= set(linted())


@pytest.mark.parametrize("root", linted())
def test_no_document_that_is_not_here_is_cited(root: str) -> None:
    place = ROOT / root
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.suffix in (".py", ".md")]
    assert [str(path) for path in files if OLD.search(path.read_text(encoding="utf-8"))] == []


def test_the_words_are_plain() -> None:
    command = [sys.executable, ".ci/check_words.py", *linted()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
