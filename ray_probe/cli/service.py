"""Commands that start, use, scale, drain and end a service."""

import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ray_probe.cli.connection import connected
from ray_probe.cli.options import (
    Actors,
    Address,
    AsJson,
    ConfigAddress,
    ConfigFile,
    Host,
    HostNames,
    Name,
    Namespace,
    OneIdentity,
    OnResult,
    Out,
    Port,
    Settings,
    Url,
    Verbose,
)
from ray_probe.cli.output import EXIT_INTERRUPTED, Answer, answered, of_result, stdout_for_results
from ray_probe.cli.serve import asked_of
from ray_probe.cli.streams import tell
from ray_probe.errors import ClusterError, ConfigError, ProbeError, bad_value
from ray_probe.system.signals import interrupted, signals_interrupt

if TYPE_CHECKING:
    from ray_probe.controller.replies import Scaled, Status
    from ray_probe.run.result import Result
    from ray_probe.service.client import ProbeClient
    from ray_probe.service.serving import Asked, Served

SCALE_S = 30.0


def up(
    config: ConfigFile,
    name: Annotated[str | None, typer.Option(help="What it is called.", show_default=False)] = None,
    set_: Settings = None,
    actors: Actors = None,
    address: ConfigAddress = None,
    out: Out = None,
    on_result: OnResult = None,
    http: Annotated[bool, typer.Option("--http", help="Serve the live page and the HTTP interface too.")] = False,
    port: Port = None,
    host: Host = None,
    host_name: HostNames = None,
    as_json: AsJson = False,
) -> int:
    """Start a service that measures checkpoints and answers queries."""
    from ray_probe.cli.options import overrides
    from ray_probe.service import lifecycle

    asked = asked_of(port, host, host_name)
    if http:
        asked.check()
    elif asked != asked_of(None, None, None):
        raise ConfigError("--http: missing; --port, --host and --host-name belong to it")
    served = None
    try:
        with signals_interrupt(), stdout_for_results():
            found = lifecycle.up(config, overrides(set_ or [], actors, address, out, on_result), name, tell)
            served = _served(asked, found.entry.name) if http else None
    except KeyboardInterrupt:
        tell("interrupted; what was started has been ended")
        return EXIT_INTERRUPTED
    entry = found.entry
    value = {"name": entry.name, "address": entry.address, "namespace": entry.namespace,
             "directory": entry.directory, "going_on": found.queued}  # fmt: skip
    value |= {"url": served.url, "token_file": served.token_file} if served is not None else {}
    shown = lifecycle.lines(found) + ([] if served is None else [f"page:     {served.lines()[0]}", *served.lines()[1:]])
    kept = f"service {entry.name!r} is up all the same"
    return answered(Answer(value, lambda: "\n".join(shown), kept=kept), as_json)


def _served(asked: "Asked", name: str) -> "Served":
    from ray_probe.service import serving

    try:
        return serving.serve(asked, name)
    except ProbeError as error:
        remedy = f"service {name!r} is up all the same; `serve --run {name}` tries again"
        raise type(error)(f"{error}; {remedy}") from None


def down(name: Name = None, address: Address = None, namespace: Namespace = None) -> int:
    """End a service and everything that it started."""
    from ray_probe.service import ending

    with signals_interrupt(), stdout_for_results():
        ended = ending.down(name, tell, address, namespace)
    said = f"service {ended!r} is down; its files stay, and `up` continues its queue"
    return answered(Answer({"ended": ended}, lambda: said), as_json=False)


def probe(
    checkpoint: Annotated[str, typer.Argument(help="Directory of the checkpoint.", show_default=False)],
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter directory.", show_default=False)] = None,
    prompts: Annotated[str | None, typer.Option(help="Other prompts (data.prompts).", show_default=False)] = None,
    set_: Settings = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow it to its end and print the results.")] = False,
    verbose: Verbose = False,
    snapshot: Annotated[
        bool, typer.Option("--snapshot", help="Pin its files until they are measured, by hard links.")
    ] = False,
    snapshot_copy: Annotated[
        bool, typer.Option("--snapshot-copy", help="Pin a copy, for trainers that write into their files.")
    ] = False,
    against: Annotated[
        str | None, typer.Option(help="Compare with this checkpoint: measure the change.", show_default=False)
    ] = None,
    against_adapter: Annotated[str | None, typer.Option(help="PEFT adapter on it.", show_default=False)] = None,
    series: Annotated[str | None, typer.Option(help="Its series (series.name).", show_default=False)] = None,
    step: Annotated[int | None, typer.Option(help="Step of the trainer (series.step).", show_default=False)] = None,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Label in its series (series.tags); repeatable.")
    ] = None,
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    url: Url = None,
    as_json: AsJson = False,
) -> int:
    """Have a service measure a checkpoint as it is now."""
    from ray_probe.config.strict_yaml import override_of

    settings = dict(override_of(setting) for setting in set_ or []) | _place_in_series(series, step, tag)
    how: Literal["link", "copy"] | None = "copy" if snapshot_copy else "link" if snapshot else None
    with connected(name, address, namespace, "service", url) as client:
        identity = client.probe(checkpoint, adapter, prompts, settings, how, against, against_adapter)
        result = _waited(client, identity) if wait else None
        info, _ = client.measured(identity)
    if result is not None:
        return answered(of_result(result, info.directory, verbose), as_json)
    said = f"{identity} is {info.state}; see it with `results {identity}`"
    return answered(Answer(info.to_json(), lambda: said, EXIT_INTERRUPTED if wait else 0), as_json)


def _place_in_series(series: str | None, step: int | None, tags: list[str] | None) -> dict[str, object]:
    """Return the settings that give a measurement its place in a series.

    Raises:
        ConfigError: a label is not KEY=VALUE.
    """
    named: dict[str, object] = {"series.name": series, "series.step": step}
    settings = {key: value for key, value in named.items() if value is not None}
    pairs = [tag.partition("=") for tag in tags or []]
    for tag, (key, _, value) in zip(tags or [], pairs, strict=True):
        if not key or not value:
            raise ConfigError(bad_value("--tag", tag, "need KEY=VALUE, both not empty"))
    return settings | ({"series.tags": {key: value for key, _, value in pairs}} if pairs else {})


def cancel(
    identity: OneIdentity,
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    url: Url = None,
    as_json: AsJson = False,
) -> int:
    """Cancel a waiting or running measurement; its whole rounds are kept."""
    with connected(name, address, namespace, "service", url) as client:
        info = client.cancel(identity)
    said = "stops after what its actors do at the moment" if info.state == "running" else f"is {info.state}"
    return answered(Answer(info.to_json(), lambda: f"{identity} {said}"), as_json)


def drain(
    undo: Annotated[bool, typer.Option("--undo", help="Take on again.")] = False,
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    url: Url = None,
    as_json: AsJson = False,
) -> int:
    """Have a service accept nothing new and finish its queue."""
    with connected(name, address, namespace, "service", url) as client:
        client.drain(not undo)
        waiting = len(client.status().queued)
    said = "takes on again" if undo else f"takes nothing new; {waiting} measurements wait"
    return answered(Answer({"draining": not undo, "waiting": waiting}, lambda: f"{client.name} {said}"), as_json)


def scale(
    number: Annotated[int, typer.Argument(metavar="N", help="Rollout actors from now on.", show_default=False)],
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    url: Url = None,
    as_json: AsJson = False,
) -> int:
    """Change the number of rollout actors; waits up to 30 s for them."""
    with connected(name, address, namespace, url=url) as client:
        scaled = client.scale(number)
        for message in scaled.messages:
            tell(message)
        found = _until_there(client, number)
    code = 0 if found.actors_alive >= number else ClusterError.exit_code
    value = scaled.to_json() | {"alive": found.actors_alive}
    return answered(Answer(value, lambda: _scaled(scaled, found), code), as_json)


def _until_there(client: "ProbeClient", number: int) -> "Status":
    deadline = time.monotonic() + SCALE_S
    while True:
        found = client.status()
        # Surplus actors leave when their work is committed, however long that takes.
        leave_later = found.actors_leaving and found.measurement is not None
        there = found.actors_alive == number and not found.actors_leaving
        if leave_later or there or time.monotonic() >= deadline:
            return found
        time.sleep(0.25)


def _scaled(scaled: "Scaled", found: "Status") -> str:
    if found.actors_leaving:
        said = f"asked {scaled.asked}, have {len(found.actors)}"
        return f"{said}: {found.actors_leaving} leave once what they have done is committed"
    said = f"asked {scaled.asked}, have {found.actors_alive}"
    said += f", {found.actors_starting} loading" if found.actors_starting else ""
    if found.actors_alive + found.actors_starting < scaled.asked:
        said += ": the request stands, and is met when there is room"
        said += f"; last failure: {found.last_failure}" if found.last_failure else ""
    return said


def _waited(client: "ProbeClient", identity: str) -> "Result | None":
    """Follow a measurement to its end; None where Ctrl-C stopped following it."""
    from ray_probe.report.progress_display import ProgressDisplay

    try:
        with signals_interrupt(), ProgressDisplay() as display:
            return client.ended(identity, display, interrupted)
    except KeyboardInterrupt:
        tell(f"{identity} continues; stop it with `cancel {identity}`")
        return None
