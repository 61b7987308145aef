"""A diagnosis as lines: coloured on a terminal, plain anywhere else, and each shown as it comes."""

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from ray_probe.doctor.checks import Check

STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim", "omitted": "cyan"}
STATUS_CHARS, NAME_CHARS = 7, 19


def show(checks: Iterable[Check], console: Console | None = None) -> list[Check]:
    """Print one line a check, as each comes; returns them all.

    Args:
        checks: what `diagnose` gives.
        console: where to print; None for stdout.
    """
    console = console or Console()
    colours = console.file.isatty()  # not console.is_terminal: FORCE_COLOR must not colour what is piped
    shown = []
    for check in checks:
        text = line(check)
        if colours:
            console.print(text, soft_wrap=True)
        else:
            print(text.plain, file=console.file, flush=True)
        shown.append(check)
    return shown


def line(check: Check) -> Text:
    """`ok       versions   ray-probe 0.1.1, ...`, with the remedy at the end."""
    said = check.detail if check.remedy is None else f"{check.detail}; {check.remedy}"
    status = (check.status.ljust(STATUS_CHARS), STYLES[check.status])
    return Text.assemble(status, "  ", (check.name.ljust(NAME_CHARS), "bold"), "  ", said)
