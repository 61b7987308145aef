"""How a service or a run in progress is doing, and what it has found so far."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_probe.commands.asking import asks, asks_service
from ray_probe.commands.options import Identity
from ray_probe.commands.output import Answer, of_result

if TYPE_CHECKING:
    from ray_probe.service.client import ProbeClient


@asks
def status(client: "ProbeClient") -> Answer:
    """How a service or a run in progress is doing: actors, progress, queue."""
    found = client.status()
    return Answer(found.to_json(), lambda: _tables().status_table(found))


@asks
def beta(
    client: "ProbeClient",
    version: Annotated[int | None, typer.Option(metavar="V", help="An earlier one.", show_default=False)] = None,
    identity: Identity = None,
) -> Answer:
    """The fitted baseline: coefficients by feature, version, tokens behind it."""
    found = client.beta(version, identity)
    return Answer(found.to_json(), lambda: _tables().beta_table(found))


@asks
def variance(client: "ProbeClient", identity: Identity = None) -> Answer:
    """Advantage statistics by baseline mode, and the gradient's variance, of the whole rounds so far."""
    found = client.variance(identity)
    return Answer(found.to_json(), lambda: _tables().variance_table(found))


@asks_service
def results(client: "ProbeClient", identity: Identity = None) -> Answer:
    """All measurements, or one with all of its figures."""
    if identity is None:
        items = client.results()
        return Answer([item.to_json() for item in items], lambda: _tables().results_table(items))
    info, result = client.result(identity)
    if result is not None:
        return of_result(result, info.directory)
    return Answer(info.to_json(), lambda: _tables().results_table((info,)))


@asks
def logs(
    client: "ProbeClient",
    identity: Identity = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="How many of the last.")] = 100,
) -> Answer:
    """The last lines of a measurement's log, or of the service's own."""
    found = client.logs(identity, lines)
    return Answer(list(found), lambda: "\n".join(found))


def _tables() -> Any:
    from ray_probe.report import service_tables

    return service_tables
