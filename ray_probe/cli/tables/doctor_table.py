"""A diagnosis as lines, coloured on a terminal."""

from typing import TextIO

from rich.text import Text

from ray_probe.doctor.checks import Check
from ray_probe.report.column_layout import Prose
from ray_probe.report.table_parts import rendered

STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim", "omitted": "cyan"}
STATUS_CHARS, NAME_CHARS = 7, 19


def shown(check: Check, stream: TextIO) -> str:
    """Return a check in the terminal's width, or as one line for another stream.

    Args:
        check: the finding.
        stream: for the text; FORCE_COLOR does not make it a terminal.
    """
    said = check.detail if check.remedy is None else f"{check.detail}; {check.remedy}"
    status = (check.status.ljust(STATUS_CHARS), STYLES[check.status])
    label = Text.assemble(status, "  ", (check.name.ljust(NAME_CHARS), "bold"), "  ")
    return rendered(Prose(said, label=label), stream) if stream.isatty() else f"{label.plain}{said}\n"
