"""The commands of a service: start, end, queue, scale and ask; each imports what it needs when it is called."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_probe.errors import ClusterError, ConfigError, bad_value
from ray_probe.interrupts import interrupted, signals_interrupt

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ray_probe.service.client import ProbeClient
    from ray_probe.service.replies import Scaled, Status

SCALE_S = 30.0
WIDTH = 100
EXIT_INTERRUPTED = 130

ConfigFile = Annotated[Path, typer.Argument(help="YAML file.", show_default=False)]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the config; repeatable.")
]
Actors = Annotated[str | None, typer.Option(metavar="N", help="Rollout actors (cluster.actors).", show_default=False)]
ConfigAddress = Annotated[
    str | None, typer.Option(help="Ray cluster to join: auto or host:port (cluster.address).", show_default=False)
]
Out = Annotated[Path | None, typer.Option(help="Parent of the run directory (output.dir).", show_default=False)]
Name = Annotated[
    str | None, typer.Option("--run", metavar="NAME", help="Which service or run; needed if there are several.")
]
Address = Annotated[
    str | None, typer.Option(help="Its Ray cluster, auto or host:port; by itself found by name.", show_default=False)
]
Namespace = Annotated[str | None, typer.Option(help="Its Ray namespace.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Identity = Annotated[str | None, typer.Argument(metavar="[ID]", help="A measurement, m0001.", show_default=False)]


def up(
    config: ConfigFile,
    name: Annotated[str | None, typer.Option(help="What it is called.", show_default=False)] = None,
    set_: Settings = None,
    actors: Actors = None,
    address: ConfigAddress = None,
    out: Out = None,
    as_json: AsJson = False,
) -> int:
    """Start a service: it stays, measures the checkpoints that it is given, and answers."""
    from ray_probe.runner import overrides
    from ray_probe.service import launch

    try:
        with signals_interrupt(), _stdout_for_results():
            found = launch.up(config, overrides(set_ or [], actors, address, out), name, _tell)
    except KeyboardInterrupt:
        _tell("interrupted; what was started has been ended")
        return EXIT_INTERRUPTED
    if as_json:
        _print_json({"name": found.entry.name, "address": found.entry.address, "namespace": found.entry.namespace,
                     "directory": found.entry.directory, "going_on": found.queued})  # fmt: skip
    else:
        print("\n".join(launch.lines(found)))
    return 0


def down(name: Name = None, address: Address = None, namespace: Namespace = None) -> int:
    """End a service and all that it started."""
    from ray_probe.service import launch

    with signals_interrupt(), _stdout_for_results():
        ended = launch.down(name, _tell, address, namespace)
    print(f"service {ended!r} is down; its files stay, and `up` goes on with what was queued")
    return 0


def probe(
    checkpoint: Annotated[str, typer.Argument(help="Directory of the checkpoint.", show_default=False)],
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter directory.", show_default=False)] = None,
    prompts: Annotated[str | None, typer.Option(help="Other prompts (data.prompts).", show_default=False)] = None,
    set_: Settings = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow it to its end and print the results.")] = False,
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: AsJson = False,
) -> int:
    """Have a service measure a checkpoint."""
    from ray_probe.yaml_loader import override_of

    settings = dict(override_of(setting) for setting in set_ or [])
    with _client(name, address, namespace) as client:
        identity = client.probe(checkpoint, adapter, prompts, settings)
        result = _waited(client, identity) if wait else None
        info, _ = client.result(identity)
    if result is not None:
        return show_result(result, info.directory, as_json)
    _answer(as_json, info.to_json(), lambda: f"{identity} is {info.state}; see it with `results {identity}`")
    return EXIT_INTERRUPTED if wait else 0


def status(name: Name = None, address: Address = None, namespace: Namespace = None, as_json: AsJson = False) -> int:
    """How a service or a run in progress is doing: actors, progress, queue."""
    with _client(name, address, namespace) as client:
        found = client.status()
    _answer(as_json, found.to_json(), lambda: _tables().status_table(found))
    return 0


def beta(
    version: Annotated[int | None, typer.Option(metavar="V", help="An earlier one.", show_default=False)] = None,
    identity: Identity = None,
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: AsJson = False,
) -> int:
    """The fitted baseline: coefficients by feature, version, tokens behind it."""
    with _client(name, address, namespace) as client:
        found = client.beta(version, identity)
    _answer(as_json, found.to_json(), lambda: _tables().beta_table(found))
    return 0


def variance(
    identity: Identity = None,
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: AsJson = False,
) -> int:
    """Advantage statistics by baseline mode, and the gradient's variance, of the whole rounds so far."""
    with _client(name, address, namespace) as client:
        found = client.variance(identity)
    _answer(as_json, found.to_json(), lambda: _tables().variance_table(found))
    return 0


def results(
    identity: Identity = None,
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: AsJson = False,
) -> int:
    """All measurements, or one with all of its figures."""
    with _client(name, address, namespace) as client:
        items = client.results() if identity is None else ()
        info, result = (None, None) if identity is None else client.result(identity)
    if info is not None and result is not None:
        return show_result(result, info.directory, as_json)
    shown = items if info is None else (info,)
    value = [item.to_json() for item in items] if info is None else info.to_json()
    _answer(as_json, value, lambda: _tables().results_table(shown))
    return 0


def logs(
    identity: Identity = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="How many of the last.")] = 100,
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: AsJson = False,
) -> int:
    """The last lines of a measurement's log, or of the service's own."""
    with _client(name, address, namespace) as client:
        found = client.logs(identity, lines)
    _answer(as_json, list(found), lambda: "\n".join(found))
    return 0


def cancel(
    identity: Annotated[str, typer.Argument(metavar="ID", help="A measurement, m0001.", show_default=False)],
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: AsJson = False,
) -> int:
    """Take back a measurement that waits, or stop the one at work; its whole rounds are kept."""
    with _client(name, address, namespace) as client:
        info = client.cancel(identity)
    said = "stops after what its actors do at the moment" if info.state == "running" else f"is {info.state}"
    _answer(as_json, info.to_json(), lambda: f"{identity} {said}")
    return 0


def drain(
    undo: Annotated[bool, typer.Option("--undo", help="Take on again.")] = False,
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: AsJson = False,
) -> int:
    """Have a service take nothing new and work off what waits."""
    with _client(name, address, namespace) as client:
        client.drain(not undo)
        waiting = len(client.status().queued)
    said = "takes on again" if undo else f"takes nothing new; {waiting} measurements wait"
    _answer(as_json, {"draining": not undo, "waiting": waiting}, lambda: f"{client.name} {said}")
    return 0


def scale(
    number: Annotated[int, typer.Argument(metavar="N", help="Rollout actors from now on.", show_default=False)],
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: AsJson = False,
) -> int:
    """Change the number of rollout actors while they work; waits up to 30 s for them."""
    with _client(name, address, namespace) as client:
        scaled = client.scale(number)
        for message in scaled.messages:
            _tell(message)
        found = _until_there(client, number)
    _answer(as_json, scaled.to_json() | {"alive": found.actors_alive}, lambda: _scaled(scaled, found))
    return 0 if found.actors_alive >= number else ClusterError.exit_code


def doctor(
    config: Annotated[Path | None, typer.Argument(help="YAML file of a run.", show_default=False)] = None,
    set_: Settings = None,
    address: ConfigAddress = None,
    as_json: AsJson = False,
) -> int:
    """Look at all that a run needs, one line each; exit 0 only if everything holds."""
    from rich.console import Console

    from ray_probe.config import load_config
    from ray_probe.doctor import diagnose, exit_code, to_json
    from ray_probe.report.doctor_table import show
    from ray_probe.runner import overrides

    if config is None and set_:
        raise ConfigError(bad_value("--set", set_[0], "give CONFIG too"))
    loaded = None if config is None else load_config(config, overrides(set_ or [], None, address, None))
    console = Console(file=sys.stdout)  # bound before Ray's words are sent elsewhere
    checks = diagnose(loaded, address=address if loaded is None else None)
    with _stdout_for_results(), contextlib.closing(checks):  # it holds a Ray connection
        done = list(checks) if as_json else show(checks, console)
    if as_json:
        _print_json(to_json(done))
    return exit_code(done)


def _until_there(client: "ProbeClient", number: int) -> "Status":
    deadline = time.monotonic() + SCALE_S
    while (found := client.status()).actors_alive != number and time.monotonic() < deadline:
        if found.actors_alive > number and found.measurement is not None:
            break  # those too many leave when their work is committed, however long that takes
        time.sleep(0.25)
    return found


def _scaled(scaled: "Scaled", found: "Status") -> str:
    said = f"asked {scaled.asked}, have {found.actors_alive}"
    if found.actors_alive > scaled.asked:
        return f"{said}: {found.actors_alive - scaled.asked} leave once what they have done is committed"
    if found.actors_alive < scaled.asked:
        return f"{said}: the request stands, and is met when there is room" + (
            f"; last failure: {found.last_failure}" if found.last_failure else ""
        )
    return said


def _waited(client: "ProbeClient", identity: str) -> dict[str, Any] | None:
    """Follow a measurement; on Ctrl-C it goes on without us."""
    from ray_probe.report.display import ProgressDisplay

    try:
        with signals_interrupt(), ProgressDisplay() as display:
            return client.wait(identity, display, interrupted)
    except KeyboardInterrupt:
        _tell(f"{identity} goes on; stop it with `cancel {identity}`")
        return None


def show_result(result: dict[str, Any], directory: str | Path, as_json: bool) -> int:
    """Print a result as a table or as JSON; returns the exit code that it stands for."""
    from ray_probe.report.table import result_table

    def table() -> "RenderableType":
        return result_table(result)

    _answer(as_json, result, table)
    if not as_json:
        print(f"results, plots and log: {directory}")
    return exit_code(result)


def exit_code(result: dict[str, Any]) -> int:
    """What a run that came to its end exits with: 1 for conflicts, 3 for a partial result, else 0."""
    if result["conflicts"]:
        return 1
    return 3 if result["partial"] else 0


def _tables() -> Any:
    from ray_probe.report import service_tables

    return service_tables


@contextlib.contextmanager
def _client(name: str | None, address: str | None, namespace: str | None) -> Iterator["ProbeClient"]:
    from ray_probe.service.client import ProbeClient

    with _stdout_for_results(), ProbeClient.connect(address, namespace, name) as client:
        yield client


@contextlib.contextmanager
def _stdout_for_results() -> Iterator[None]:
    """Ray prints what befalls it to stdout, which belongs to the answer."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _answer(as_json: bool, value: Any, text: Callable[[], "RenderableType"]) -> None:
    """Print an answer, for machines or for people."""
    if as_json:
        _print_json(value)
        return
    said = text()
    if isinstance(said, str):
        print(said)
        return
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else WIDTH).print(said)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
