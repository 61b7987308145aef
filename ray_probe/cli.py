"""The command line: parse, build, run. Every refusal is one line on stderr and an exit code (spec section 8)."""

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ray_probe.errors import ProbeError

EXIT_PARTIAL = 3
EXIT_CONFLICT = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

# Newer versions of typer bring a click of their own, older ones use the package: both derive from this class.
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    help="Estimates the gradient of response entropy at a checkpoint, with error bars, on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _group() -> None:
    """Keeps `run` a command by name while it is the only one."""


@app.command()
def run(
    config: Annotated[Path | None, typer.Argument(help="YAML file of the run.", show_default=False)] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the config; repeatable.")
    ] = None,
    actors: Annotated[
        str | None, typer.Option(metavar="N", help="Rollout actors (cluster.actors).", show_default=False)
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join: auto or host:port (cluster.address).", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Parent of the run directory (output.dir).", show_default=False)
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Go on from the last finished round.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print result.json instead of the table.")] = False,
) -> int:
    """Measure a checkpoint: sample, score, fit, differentiate; then print a table of results."""
    from ray_probe.report.display import ProgressDisplay
    from ray_probe.report.table import result_table
    from ray_probe.runner import Request, Run, execute, overrides

    request = Request(config, resume, overrides(set_ or [], actors, address, out))
    state = Run()
    try:
        # Ray prints what befalls its workers to stdout, which belongs to the result.
        with _terminated_as_interrupted(), ProgressDisplay() as display, contextlib.redirect_stdout(sys.stderr):
            result = execute(request, display, state)
    except KeyboardInterrupt:
        return _interrupted(state.directory.path if state.directory else None, state.finished_rounds)
    assert state.directory is not None
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        console = Console(width=None if sys.stdout.isatty() else 100)
        console.print(result_table(result))
        console.print(f"results, plots and log: {state.directory.path}", soft_wrap=True, highlight=False)
    return exit_code(result)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, as schedulers send it, ends a run as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(result: dict[str, Any]) -> int:
    """What a run that came to its end exits with: 1 for conflicts, 3 for a partial result, else 0."""
    if result["conflicts"]:
        return EXIT_CONFLICT
    return EXIT_PARTIAL if result["partial"] else 0


def _interrupted(directory: Path | None, finished_rounds: int) -> int:
    if directory is None:
        print("interrupted before the first round; nothing was written", file=sys.stderr)
    else:
        print(f"interrupted: {finished_rounds} rounds are kept; go on with run --resume {directory}", file=sys.stderr)
    return EXIT_INTERRUPTED


def main() -> None:
    """Entry point of `ray-probe` and `launch.py`."""
    sys.exit(_main())


def _main() -> int:
    try:
        code = app(standalone_mode=False)
    except typer.Exit as exit_:
        return exit_.exit_code
    except _ClickException as error:
        message = error.format_message()
        return _refused(f"{message} See --help.", EXIT_USAGE) if message else EXIT_USAGE
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(None, 0)
    except ProbeError as error:
        return _refused(str(error), error.exit_code)
    return int(code or 0)


def _refused(message: str, code: int) -> int:
    print(" ".join(f"error: {message}".split()), file=sys.stderr)
    return code
