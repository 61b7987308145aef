"""The command that writes a report as one HTML file."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ray_probe.cli.options import Address, Namespace, Url
from ray_probe.errors import ConfigError, bad_value

if TYPE_CHECKING:
    from ray_probe.controller.api import ControllerApi
    from ray_probe.page.places import ReportPart

DEFAULT = Path("report.html")


def report(
    places: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN_DIR|SERVICE]...", help="Directories of runs or chains, or names of services.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file that is written.")] = DEFAULT,
    address: Address = None,
    namespace: Namespace = None,
    url: Url = None,
) -> int:  # fmt: skip
    """Write results, side by side, as one HTML file that opens without a network."""
    from ray_probe.cli.output import Answer, answered
    from ray_probe.page.report_file import write_report

    _check_place(out)
    if not places and url is None:
        raise ConfigError(bad_value("RUN_DIR|SERVICE", "nothing", "name a directory or a service, or give --url"))
    parts = list(_parts(places or [], address, namespace, url))
    entries = [entry for part in parts for entry in part.entries]
    series = [one for part in parts for one in part.series]
    named = [*(places or []), *([] if url is None else [url.partition("#")[0]])]  # a token stays out of the file
    title = parts[0].title if len(parts) == 1 else f"Report of {', '.join(named)}"
    write_report(out, title, entries, series)
    return answered(Answer(str(out), lambda: f"report: {out}"), as_json=False)


def _check_place(out: Path) -> None:
    """Raise ConfigError where the file cannot be written, before anything is read."""
    parent = out.parent
    if out.is_dir():
        raise ConfigError(bad_value("--out", str(out), "is a directory; name a file in it"))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(bad_value("--out", str(out), f"{parent} is no directory that can be written; choose another"))


def _parts(
    places: Iterable[str], address: str | None, namespace: str | None, url: str | None
) -> "Iterator[ReportPart]":
    """Yield what the directories and each service add to the report."""
    from ray_probe.cli.connection import connected
    from ray_probe.cli.finished import run_directory
    from ray_probe.page.places import part_of

    found = [(place, run_directory(place)) for place in places]
    if directories := [path for _, path in found if path is not None]:
        yield part_of(directories)
    for service in (place for place, path in found if path is None):
        with connected(service, address, namespace) as client:
            yield service_part(client)
    if url is not None:
        with connected(None, None, None, url=url) as client:
            yield service_part(client)


def service_part(api: "ControllerApi") -> "ReportPart":
    """Return the measurements with a whole round and the series of a service.

    Raises:
        ConfigError: nothing is measured yet.
    """
    from ray_probe.page.places import ReportPart
    from ray_probe.page.report_file import Entry

    found = [(info.id, api.measured(info.id)[1]) for info in api.results() if info.rounds]
    entries = [Entry(name, result) for name, result in found if result is not None]
    if not entries:
        raise ConfigError(bad_value("SERVICE", api.name, "nothing is measured yet; ask again after the first round"))
    return ReportPart(f"Report of {api.name}", entries, api.series())
