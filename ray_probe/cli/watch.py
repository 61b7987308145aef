"""The command that watches a training run's checkpoints."""

import contextlib
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from ray_probe.cli import options
from ray_probe.cli.connection import connected
from ray_probe.cli.options import Address, Name, Namespace, OnResult, Settings, Url
from ray_probe.cli.output import EXIT_INTERRUPTED, stdout_for_results
from ray_probe.cli.streams import tell, write
from ray_probe.errors import ConfigError, bad_value
from ray_probe.system.signals import interrupted, signals_interrupt

if TYPE_CHECKING:
    from ray_probe.service.client import ProbeClient
    from ray_probe.watch.entries import Entry
    from ray_probe.watch.session import WatchRequest

WIDTH = 80
REPEAT_S = 30.0
"""A reason that changes, such as the bytes of a file that grows, is shown this often."""


def watch(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The trainer's output directory.")],
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="YAML file: start a service for it.", show_default=False)
    ] = None,
    series: Annotated[str | None, typer.Option("--name", help="Name of the series; default: DIR's.")] = None,
    every: Annotated[int, typer.Option(metavar="N", help="Take each Nth checkpoint.")] = 1,
    from_step: Annotated[int, typer.Option("--from", metavar="STEP", help="Leave out earlier steps.")] = 0,
    latest: Annotated[bool, typer.Option("--latest", help="Leave out what a newer checkpoint overtakes.")] = False,
    base: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Model for missing config and tokenizer.", show_default=False),
    ] = None,
    convert: Annotated[
        str | None,
        typer.Option(metavar="'CMD {src} {dst}'", help="Converts sharded checkpoints.", show_default=False),
    ] = None,
    no_gradient: Annotated[bool, typer.Option("--no-gradient", help="Compare neighbours only.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Measure what is there, then end.")] = False,
    spool: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Requests and pins; default: DIR/.ray_probe.", show_default=False)
    ] = None,
    set_: Settings = None,
    name: Name = None,
    address: Address = None,
    namespace: Namespace = None,
    url: Url = None,
    on_result: OnResult = None,
) -> int:
    """Measure the checkpoints of a training run as they appear."""
    from ray_probe.config.strict_yaml import override_of
    from ray_probe.watch.session import WatchRequest

    _check_service(config, url, on_result)
    settings = {} if config is not None else dict(override_of(setting) for setting in set_ or [])
    request = WatchRequest(
        directory, series, spool, base, every, from_step, latest, not no_gradient, convert, settings
    ).checked()
    out = sys.stdout  # which belongs to the answer: what Ray prints goes to stderr
    try:
        with signals_interrupt(), contextlib.ExitStack() as stack:
            if config is None:
                client = stack.enter_context(connected(name, address, namespace, "service", url))
            else:
                overrides = options.overrides(set_ or [], None, address, None, on_result)
                client = stack.enter_context(_started(config, overrides, name))
            return _watched(request, client, once, out)
    except KeyboardInterrupt:
        tell("stopped; the same command goes on with the series")
        return EXIT_INTERRUPTED


def _watched(request: "WatchRequest", client: "ProbeClient", once: bool, out: TextIO) -> int:
    """Watch until the end; returns the exit code."""
    from ray_probe.service import registry
    from ray_probe.watch.session import opened

    lines = Lines(out, time.monotonic)
    known = _responses(client)
    with opened(request, client, known, registry.place(), time.monotonic, lines.say, tell) as opening:
        write(f"watching {request.root}, series {request.series!r}, on service {client.name!r}\n", out)
        try:
            opening.until_end(once, time.monotonic, lambda seconds: _wait(seconds, lines), tell)
        finally:
            lines.flush(0.0)
        opening.refuse_empty(request.root)
        return opening.code


def _wait(seconds: float, lines: "Lines") -> None:
    """Wait, unless a signal has come; shows reasons that were held back."""
    lines.flush(REPEAT_S)
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if interrupted():
            raise KeyboardInterrupt
        time.sleep(min(left, 0.2))


def _responses(client: "ProbeClient") -> int | None:
    """Return the responses a prompt of a service's configuration; None: not readable."""
    from ray_probe.cluster.controller_actor import SERVICE_CONFIG
    from ray_probe.config.loading import load_config

    path = Path(client.status().directory) / SERVICE_CONFIG
    return load_config(path).batch.responses_per_prompt if path.is_file() else None


@contextlib.contextmanager
def _started(config: Path, overrides: tuple[str, ...], name: str | None) -> "Iterator[ProbeClient]":
    """Start a service for the block, and connect to it."""
    from ray_probe.service import ending, lifecycle

    with stdout_for_results():
        started = lifecycle.up(config, overrides, name, tell)
    try:
        with connected(started.entry.name, None, None, "service") as client:
            yield client
    finally:
        with stdout_for_results():
            ending.down(started.entry.name, tell)
        tell(f"service {started.entry.name!r} is down; `up` with it, or this command, continues its queue")


def _check_service(config: Path | None, url: str | None, on_result: str | None) -> None:
    """Refuse options that do not go together with the service that is used."""
    if config is not None and url is not None:
        raise ConfigError(bad_value("--url", url.partition("#")[0], "CONFIG starts a service; give one of the two"))
    if config is None and on_result is not None:
        raise ConfigError(bad_value("--on-result", on_result, "it is of the service: give it to `up`, or add CONFIG"))


class Lines:
    """Prints a line for each new state of a checkpoint.

    Args:
        out: receives the lines.
        clock: seconds, never set back.
    """

    def __init__(self, out: TextIO, clock: Callable[[], float]) -> None:
        self._out, self._clock = out, clock
        self._shown: dict[str, tuple[str, str, float]] = {}
        self._held: dict[str, Entry] = {}

    def say(self, entry: "Entry") -> None:
        """Print an entry, or hold it back where its reason alone is new."""
        before = self._shown.get(entry.key)
        if before is None or before[0] != entry.state:
            self._print(entry)
        else:
            self._held[entry.key] = entry

    def flush(self, seconds: float) -> None:
        """Print what was held back, of checkpoints last shown `seconds` ago or more."""
        now = self._clock()
        for entry in list(self._held.values()):
            if now - self._shown[entry.key][2] >= seconds:
                self._print(entry)

    def _print(self, entry: "Entry") -> None:
        self._held.pop(entry.key, None)
        before = self._shown.get(entry.key)
        self._shown[entry.key] = (entry.state, entry.why, self._clock())
        if before is None or before[:2] != (entry.state, entry.why):
            write(line_of(entry, datetime.now(UTC)), self._out)


def line_of(entry: "Entry", now: datetime) -> str:
    """Return an entry as text of 80 columns; a command is not wrapped."""
    step = "" if entry.step is None or str(entry.step) in entry.name else f", step {entry.step}"
    head = f"{now:%H:%M:%S}  {entry.name}{step}: {entry.state}"
    if entry.state == "needs conversion":
        return f"{head}\n    {entry.why}\n"
    said = ", ".join(entry.measurements) if entry.state in ("queued", "measured") else ""
    joined = " for " if entry.state == "waiting" else ", "
    text = head + "".join(f"{sign}{part}" for sign, part in ((" as ", said), (joined, entry.why)) if part)
    lines = textwrap.wrap(text, WIDTH, subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) + "\n"
