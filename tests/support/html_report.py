"""Reads what a report.html holds."""

import json
import re
from html.parser import HTMLParser
from typing import Any

from ray_probe.page.report_file import DATA_ID


class ReportParts(HTMLParser):
    """The elements of a report as a browser finds them.

    Args:
        text: of the file.

    Attributes:
        tags: names and attributes of all elements, in order.
        raw: content of each script and style, with the element's attributes.
        text: everything else, white space joined.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self._words: list[str] = []
        self._inside: tuple[str, dict[str, str | None]] | None = None
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = (tag, dict(attrs))
            self.raw.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        """Note the end of a script or style."""
        if self._inside is not None and self._inside[0] == tag:
            self._inside = None

    def handle_data(self, data: str) -> None:
        """Note text."""
        if self._inside is None:
            self._words.append(data)
        else:
            tag, attributes, before = self.raw[-1]
            self.raw[-1] = (tag, attributes, before + data)

    @property
    def policy(self) -> dict[str, list[str]]:
        """The content security policy by directive."""
        (content,) = [
            attributes["content"] or "" for tag, attributes in self.tags
            if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
        ]  # fmt: skip
        return {name: sources for name, *sources in (part.split() for part in content.split(";"))}


def data_of(text: str) -> dict[str, Any]:
    """Return the data block of a report."""
    (found,) = [raw for _, attributes, raw in ReportParts(text).raw if attributes.get("id") == DATA_ID]
    data: dict[str, Any] = json.loads(found)
    return data


def loaded_from(text: str) -> list[str]:
    """Return all that could be loaded from elsewhere: links of elements, urls of styles, imports."""
    parts = ReportParts(text)
    links = [
        value for tag, attributes in parts.tags for name, value in attributes.items()
        if name in ("src", "href", "action", "data", "poster", "srcset") and value != "data:,"
    ]  # fmt: skip
    styles = " ".join(raw for tag, _, raw in parts.raw if tag == "style")
    return [str(link) for link in links] + re.findall(r"@import[^;]*|url\([^)]*\)", styles)
