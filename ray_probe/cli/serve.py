"""The command that serves a service or a run over HTTP."""

from typing import TYPE_CHECKING, Annotated

import typer

from ray_probe.cli.options import Address, AsJson, Host, HostNames, Name, Namespace, Port
from ray_probe.cli.output import Answer, answered, stdout_for_results
from ray_probe.errors import ConfigError, bad_value
from ray_probe.system.signals import signals_interrupt

if TYPE_CHECKING:
    from ray_probe.service.serving import Asked, Served


def serve(
    port: Port = None,
    host: Host = None,
    host_name: HostNames = None,
    stop: Annotated[bool, typer.Option("--stop", help="End the server; the next one has another token.")] = False,
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: AsJson = False,
) -> int:
    """Serve the live page and the HTTP interface of a service or run; print its URL."""
    from ray_probe.service import serving

    if stop and (port, host, host_name) != (None, None, None):
        raise ConfigError(bad_value("--stop", True, "it takes no address; leave --port, --host and --host-name out"))
    with signals_interrupt(), stdout_for_results():
        if stop:
            ended, was_up = serving.stop(name, address, namespace)
        else:
            served = serving.serve(asked_of(port, host, host_name), name, address, namespace)
    if not stop:
        return answered(Answer(json_of(served), lambda: "\n".join(served.lines()), kept=served.url), as_json)
    said = f"{ended!r} is not served any more; its token is void" if was_up else f"{ended!r} was not served"
    return answered(Answer({"name": ended, "stopped": was_up}, lambda: said), as_json)


def asked_of(port: int | None, host: str | None, host_names: list[str] | None) -> "Asked":
    """Return what the options ask for."""
    from ray_probe.service.serving import Asked

    return Asked(host, port, tuple(host_names or ()))


def json_of(served: "Served") -> dict[str, object]:
    """Return the answer for machines."""
    return {"name": served.name, "url": served.url, "token_file": served.token_file}
