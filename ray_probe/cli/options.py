"""Arguments and options that several commands have."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(help="YAML file.", show_default=False)]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the config; repeatable.")
]
Actors = Annotated[str | None, typer.Option(metavar="N", help="Rollout actors (cluster.actors).", show_default=False)]
ConfigAddress = Annotated[
    str | None, typer.Option(help="Ray cluster to join: auto or host:port (cluster.address).", show_default=False)
]
OnResult = Annotated[
    str | None,
    typer.Option(metavar="CMD", help="Call CMD with the result at the end (notify.command).", show_default=False),
]
Out = Annotated[Path | None, typer.Option(help="Parent of the run directory (output.dir).", show_default=False)]
Name = Annotated[
    str | None, typer.Option("--run", metavar="NAME", help="Which service or run; needed if there are several.")
]
Address = Annotated[
    str | None, typer.Option(help="Its Ray cluster, auto or host:port; by itself found by name.", show_default=False)
]
Namespace = Annotated[str | None, typer.Option(help="Its Ray namespace.", show_default=False)]
Url = Annotated[
    str | None,
    typer.Option(help="Ask over HTTP, at the URL that `serve` prints; the token may be in RAY_PROBE_TOKEN.",
                 show_default=False),
]
Port = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Of the server; by itself its last one, else a free one.",
                             show_default=False)
]
Host = Annotated[str | None, typer.Option(help="Interface to listen on; by itself 127.0.0.1.", show_default=False)]
HostNames = Annotated[
    list[str] | None, typer.Option("--host-name", help="Name that browsers call this machine; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="All figures: baselines, beta, checks, times.")]
Identity = Annotated[str | None, typer.Argument(metavar="ID", help="A measurement, m0001.", show_default=False)]
"""A measurement; None: the newest, or all."""
OneIdentity = Annotated[str, typer.Argument(metavar="ID", help="A measurement, m0001.", show_default=False)]


def overrides(
    settings: Sequence[str], actors: str | None, address: str | None, out: Path | None, on_result: str | None = None
) -> tuple[str, ...]:
    """Return the settings of a command line: `--set` first, then named options."""
    command = None if on_result is None else json.dumps(on_result)
    named = {"cluster.actors": actors, "cluster.address": address, "output.dir": out, "notify.command": command}
    return (*settings, *(f"{key}={value}" for key, value in named.items() if value is not None))
