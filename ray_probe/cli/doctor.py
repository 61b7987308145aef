"""The command that checks what a run needs."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from ray_probe.cli.options import AsJson, ConfigAddress, Settings
from ray_probe.cli.output import as_json_text, stdout_for_results
from ray_probe.cli.streams import write
from ray_probe.errors import ConfigError, bad_value


def doctor(
    config: Annotated[Path | None, typer.Argument(help="YAML file of a run.", show_default=False)] = None,
    set_: Settings = None,
    address: ConfigAddress = None,
    load: Annotated[
        bool, typer.Option("--load", help="Load the model here too, and put a few short responses through it.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Check what a run needs, one line each; exit 0 only if every check passes."""
    from ray_probe.cli.options import overrides
    from ray_probe.cli.tables.doctor_table import shown
    from ray_probe.config import load_config
    from ray_probe.doctor.checks import exit_code, to_json
    from ray_probe.doctor.diagnosis import diagnose

    if config is None and set_:
        raise ConfigError(bad_value("--set", set_[0], "give CONFIG too"))
    if config is None and load:
        raise ConfigError("--load: there is no model to load; give CONFIG too")
    loaded = None if config is None else load_config(config, overrides(set_ or [], None, address, None))
    stdout = sys.stdout  # it is redirected below for Ray
    checks, done = diagnose(loaded, address=address if loaded is None else None, load=load), []
    with stdout_for_results(), contextlib.closing(checks):  # it holds a Ray connection
        for check in checks:
            done.append(check)
            if not as_json:
                write(shown(check, stdout), stdout)
    if as_json:
        write(as_json_text(to_json(done)), stdout)
    return exit_code(done)
