"""Build report.html: results and series in one file that loads nothing.

The data lie in the file as JSON. The page's own scripts draw them. Their hashes are the only ones that the file's
policy allows to run.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from ray_probe import __version__
from ray_probe.page.fallback import fallback
from ray_probe.page.words import Words
from ray_probe.run.result import Result
from ray_probe.run.rounds_file import FinishedRound
from ray_probe.run.series import Series
from ray_probe.system.files import write_atomically

REPORT = "report.html"
SCRIPTS = (
    "uPlot.iife.min.js", "format.js", "meanings.js", "dom.js", "charts.js", "change_bars.js", "parts.js", "series.js",
    "baseline.js", "render.js",
)  # fmt: skip
STYLES = ("uPlot.min.css", "style.css")
DATA_ID = "report-data"
START = f"""
"use strict";
addEventListener("DOMContentLoaded", () => {{
  RayProbe.render.report(document.querySelector("main"), JSON.parse(document.getElementById("{DATA_ID}").textContent));
}});
"""
# A "<" could end the script element; the others can confuse old parsers. In JSON they are in strings alone.
ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
<script type="application/json" id="{data_id}">{data}</script>
<script>{script}</script>
</head>
<body>
<main><noscript>{body}</noscript></main>
</body>
</html>
"""


@dataclass(frozen=True)
class Entry:
    """A measurement of a report.

    Attributes:
        name: id of the measurement, or name of its run directory.
        result: its result.
        rounds: its finished rounds, in order; empty where they are unknown.
    """

    name: str
    result: Result
    rounds: Sequence[FinishedRound] = ()

    def to_json(self) -> dict[str, object]:
        """Return what the page's scripts read."""
        rounds = [
            {"round": one.round, "sequences": one.sequences, "entropy": one.entropy.to_json()} for one in self.rounds
        ]
        return {
            "name": self.name, "result": self.result.to_json(), "words": Words.of(self.result).to_json(),
            "rounds": rounds,
        }  # fmt: skip


def static_text(name: str) -> str:
    """Return the text of one of the page's files."""
    return static_path(name).read_text(encoding="utf-8")


def static_path(name: str) -> Path:
    """Return the place of one of the page's files."""
    return Path(__file__).with_name("static") / name


def report_html(title: str, entries: Sequence[Entry], series: Sequence[Series] = ()) -> str:
    """Return the report as one HTML document.

    Args:
        title: of the report.
        entries: measurements, in the order in which they are shown.
        series: shown before the measurements, side by side.
    """
    data = {
        "title": title, "version": __version__, "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "series": [one.to_json() for one in series], "entries": [one.to_json() for one in entries],
    }  # fmt: skip
    script = "\n".join((*map(static_text, SCRIPTS), START))
    style = "\n".join(map(static_text, STYLES))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    body = fallback(title, [(entry.name, Words.of(entry.result)) for entry in entries], series)
    return _DOCUMENT.format(
        policy=policy, title=escape(title), style=style, script=script, body=body, data_id=DATA_ID,
        data=json.dumps(data, allow_nan=False, ensure_ascii=False).translate(ESCAPES),
    )  # fmt: skip


def write_report(path: Path, title: str, entries: Sequence[Entry], series: Sequence[Series] = ()) -> None:
    """Write the report to a file; a reader sees the old file or the new one.

    Raises:
        OutputError: the file cannot be written.
    """
    write_atomically(path, report_html(title, entries, series).encode())


def write_run_report(result: Result, rounds: Sequence[FinishedRound], directory: Path) -> None:
    """Write report.html of one run into its directory.

    Raises:
        OutputError: the file cannot be written.
    """
    write_report(directory / REPORT, f"Report of {directory.name}", [Entry(directory.name, result, rounds)])


def _hash(text: str) -> str:
    """Return the source expression that allows one inline script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
