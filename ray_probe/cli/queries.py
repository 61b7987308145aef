"""Commands that ask a service or a run in progress for its state and its results."""

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ray_probe.cli.connection import connected
from ray_probe.cli.options import Address, AsJson, Identity, Name, Namespace, Url, Verbose
from ray_probe.cli.output import Answer, answered, of_result
from ray_probe.errors import ConfigError, bad_value

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ray_probe.controller.replies import MeasurementInfo
    from ray_probe.run.result import Result
    from ray_probe.service.client import ProbeClient


def status(
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    url: Url = None,
    as_json: AsJson = False,
) -> int:
    """Show the state of a service or a run in progress: actors, progress, queue."""
    with connected(name, address, namespace, url=url) as client:
        found = client.status()
    return answered(Answer(found.to_json(), lambda: _tables().status_table(found)), as_json)


def beta(
    version: Annotated[int | None, typer.Option(metavar="V", help="An earlier one.", show_default=False)] = None,
    identity: Identity = None,
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    url: Url = None,
    as_json: AsJson = False,
) -> int:
    """Show the fitted baseline: coefficients by feature, version, tokens behind it."""
    with connected(name, address, namespace, url=url) as client:
        found = client.beta(version, identity)
    return answered(Answer(found.to_json(), lambda: _tables().beta_table(found)), as_json)


def variance(
    identity: Identity = None,
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    url: Url = None,
    as_json: AsJson = False,
) -> int:
    """Show advantage statistics by baseline and the gradient's variance so far."""
    with connected(name, address, namespace, url=url) as client:
        found = client.variance(identity)
    return answered(Answer(found.to_json(), lambda: _tables().variance_table(found)), as_json)


class Format(StrEnum):
    """The format of results."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    MD = "md"


def results(
    places: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ID|RUN_DIR|NAME]...", show_default=False,
            help="m0001, or the directory of a run; with --series names of series, or directories that hold runs.",
        ),
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="How they are written.")] = Format.TABLE,
    series: Annotated[bool, typer.Option("--series", help="Show checkpoints by step, and the change between.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="With --series: also draw it.", show_default=False)
    ] = None,
    verbose: Verbose = False,
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    url: Url = None,
    as_json: AsJson = False,
) -> int:
    """Show all measurements of a service, or one, or a finished run's directory."""
    if as_json and form not in (Format.TABLE, Format.JSON):
        raise ConfigError(bad_value("--format", form.value, "--json is another format; leave one of the two out"))
    form = Format.JSON if as_json else form
    places = places or []
    if series:
        return _series(places, form, plot, _Service(name, address, namespace, url))
    if plot is not None or len(places) > 1:
        field, value = ("--plot", str(plot)) if plot is not None else ("ID", places)
        raise ConfigError(bad_value(field, value, "only --series draws, and shows several at once"))
    return _results(places[0] if places else None, form, verbose, _Service(name, address, namespace, url))


class _Service(NamedTuple):
    """The options that name a service."""

    name: str | None
    address: str | None
    namespace: str | None
    url: str | None

    @property
    def is_named(self) -> bool:
        """Whether any is given."""
        return any(option is not None for option in self)

    def connected(self) -> "AbstractContextManager[ProbeClient]":
        """Connect a client to the service."""
        return connected(self.name, self.address, self.namespace, "service", self.url)


def _series(places: Sequence[str], form: Format, plot: Path | None, service: _Service) -> int:
    """Show series of a service, or of directories."""
    from ray_probe.cli.series import directories_of, named, series_answer, series_in

    directories = None if service.is_named else directories_of(places)
    if directories is not None:
        found = series_in(directories)
    else:
        with service.connected() as client:
            found = named(client.series(), places)
    return answered(series_answer(found, form.value, plot), form == Format.JSON)


def _results(identity: str | None, form: Format, verbose: bool, service: _Service) -> int:
    """Show all measurements of a service, one of them, or a run's directory."""
    from ray_probe.cli.finished import result_json, run_directory
    from ray_probe.run.comparison.chain import step_directories
    from ray_probe.run.result import Result

    directory = None if identity is None or service.is_named else run_directory(identity)
    if directory is not None and step_directories(directory):
        return _chain(directory, form)
    if directory is not None:
        raw = result_json(directory)  # printed as it is: another version may have written other keys
        finished = Result.from_json(raw)
        answer = replace(of_result(finished, directory, verbose), value=raw)
        return answered(_formatted(answer, form, finished), form == Format.JSON)
    result = None
    with service.connected() as client:
        if identity is None:
            items = client.results()
        else:
            info, result = client.measured(identity)
            items = (info,)
    if result is not None:
        answer = of_result(result, info.directory, verbose)
    else:
        values = [item.to_json() for item in items]
        answer = Answer(values if identity is None else values[0], lambda: _tables().results_table(items))
    return answered(_formatted(answer, form, items if result is None else result), form == Format.JSON)


def _chain(directory: Path, form: Format) -> int:
    """Show the chain of comparisons whose steps lie in a directory."""
    from ray_probe.cli.measure import of_chain
    from ray_probe.report import chain_report
    from ray_probe.run.comparison.chain import read_chain

    chain = read_chain(directory)
    answer = of_chain(chain.to_json(), directory)
    if form in (Format.CSV, Format.MD):
        text = chain_report.chain_csv(chain) if form == Format.CSV else chain_report.chain_markdown(chain)
        answer = replace(answer, text=lambda: text.removesuffix("\n"), last_lines=())
    return answered(answer, form == Format.JSON)


def _formatted(answer: Answer, form: Format, found: "Result | Sequence[MeasurementInfo]") -> Answer:
    """Return the answer with its text in this format.

    Args:
        answer: with the text of a table.
        form: of the text.
        found: what the text is made of: one result, or measurements.
    """
    from ray_probe.cli.tables import listing
    from ray_probe.report import export
    from ray_probe.run.result import Result

    if form in (Format.TABLE, Format.JSON):
        return answer
    if isinstance(found, Result):
        text = export.result_csv(found) if form == Format.CSV else export.result_markdown(found)
    else:
        text = listing.listing_csv(found) if form == Format.CSV else listing.listing_markdown(found)
    return replace(answer, text=lambda: text.removesuffix("\n"), last_lines=())


def logs(
    identity: Identity = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="How many of the last.")] = 100,
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    url: Url = None,
    as_json: AsJson = False,
) -> int:
    """Show the last lines of a measurement's log, or of the service's own."""
    with connected(name, address, namespace, url=url) as client:
        found = client.logs(identity, lines)
    return answered(Answer(list(found), lambda: "\n".join(found)), as_json)


def _tables() -> Any:
    from ray_probe.cli.tables import service_tables

    return service_tables
