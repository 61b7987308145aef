"""Reads README and the pages of docs/: code blocks, headings, links, tables."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
OTHERS = ("CONTRIBUTING.md", "CHANGELOG.md", "deploy/README.md")
PAGES = [README, *(ROOT / name for name in OTHERS), *sorted(DOCS.glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Page(NamedTuple):
    """A page: its path and its text."""

    path: Path
    text: str

    @property
    def name(self) -> str:
        """Path below the root, as links and messages name it."""
        return str(self.path.relative_to(ROOT))

    def blocks(self, language: str) -> list[str]:
        """Code blocks of a language; "" for those without one."""
        return [body for found, body in _FENCE.findall(self.text) if found == language]

    def prose(self) -> str:
        """The text without its code blocks."""
        return _FENCE.sub("", self.text)

    def headings(self) -> list[str]:
        """Headings of every level."""
        return re.findall(r"^#+ (.+)$", self.prose(), re.MULTILINE)

    def anchors(self) -> set[str]:
        """Anchors as GitHub makes them of the headings."""
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in self.headings()}

    def links(self) -> list[str]:
        """Targets of all links and images."""
        return re.findall(r"\]\(([^()\s]+)\)", self.prose())

    def section(self, heading: str) -> str:
        """The text under a heading, up to the next of its level or above."""
        lines, level, code = list[str](), 0, False
        for line in self.text.splitlines(keepends=True):
            code ^= line.startswith("```")
            hashes = 0 if code or not (found := re.match(r"(#+) ", line)) else len(found[1])
            if level and 0 < hashes <= level:
                break
            if level:
                lines.append(line)
            elif hashes and line.strip() == f"{'#' * hashes} {heading}":
                level = hashes
        assert level, f"{self.name} has no heading {heading!r}"
        return "".join(lines)


def page(path: Path | str) -> Page:
    """Reads a page by its path, absolute or below the root."""
    path = ROOT / path
    return Page(path, path.read_text(encoding="utf-8"))


def pages() -> list[Page]:
    """Reads every page."""
    return [page(path) for path in PAGES]
