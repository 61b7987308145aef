"""The command line. Every refusal is one line on stderr and an exit code."""

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_probe.cli import doctor, options, queries, service, streams
from ray_probe.cli.output import EXIT_INTERRUPTED, answered, of_result
from ray_probe.cluster.connection.shadows import refuse_shadows
from ray_probe.errors import InputError, OutputError, ProbeError
from ray_probe.system.signals import at_last, ends_in_time

if TYPE_CHECKING:
    from ray_probe.service.run_request import RunRequest

EXIT_USAGE = InputError.exit_code

# Newer versions of typer bring a click of their own, older ones use the package: both derive from this class.
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    help="Estimates the gradient of response entropy at a checkpoint, with error bars, on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def run(
    config: Annotated[Path | None, typer.Argument(help="YAML file of the run.", show_default=False)] = None,
    set_: options.Settings = None,
    actors: options.Actors = None,
    address: options.ConfigAddress = None,
    out: options.Out = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Continue after the last finished round.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print result.json instead of the table.")] = False,
    verbose: options.Verbose = False,
) -> int:
    """Measure a checkpoint, then print a table of results."""
    from ray_probe.cli.options import overrides
    from ray_probe.service.run_request import RunRequest

    return _measured(RunRequest(config, resume, overrides(set_ or [], actors, address, out)), as_json, verbose)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Directory of the earlier checkpoint.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="Directory of the later checkpoint.", show_default=False)],
    config: Annotated[Path | None, typer.Argument(help="YAML file of the run.", show_default=False)] = None,
    adapter_a: Annotated[str | None, typer.Option(help="PEFT adapter on A.", show_default=False)] = None,
    adapter_b: Annotated[str | None, typer.Option(help="PEFT adapter on B.", show_default=False)] = None,
    prompts: Annotated[str | None, typer.Option(help="Other prompts (data.prompts).", show_default=False)] = None,
    set_: options.Settings = None,
    actors: options.Actors = None,
    address: options.ConfigAddress = None,
    out: options.Out = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print result.json instead of the table.")] = False,
    verbose: options.Verbose = False,
) -> int:
    """Measure by how much the entropy changed from checkpoint A to checkpoint B, and why."""
    from ray_probe.cli.options import overrides
    from ray_probe.service.run_request import RunRequest

    named = {"model.path": b, "model.adapter": adapter_b, "compare.against": a, "compare.adapter": adapter_a}
    named |= {} if prompts is None else {"data.prompts": prompts}
    asked = tuple(f"{key}={'null' if value is None else json.dumps(value)}" for key, value in named.items())
    request = RunRequest(config, None, (*asked, *overrides(set_ or [], actors, address, out)), "compare")
    return _measured(request, as_json, verbose)


def _measured(request: "RunRequest", as_json: bool, verbose: bool) -> int:
    """Run a request and print its result."""
    from ray_probe.report.progress_display import ProgressDisplay
    from ray_probe.service.run_once import execute
    from ray_probe.service.run_request import Run

    state = Run()
    with ends_in_time(), at_last(lambda: _interrupted(state.directory, state.finished_rounds)):
        try:
            # Ray prints messages of its workers to stdout, which belongs to the result.
            with ProgressDisplay() as display, at_last(display.stop), contextlib.redirect_stdout(sys.stderr):
                result = execute(request, display, state)
            assert state.directory is not None
            return answered(of_result(result, state.directory, verbose), as_json)
        except KeyboardInterrupt:
            return _interrupted(state.directory, state.finished_rounds)


for _command in (
    service.up, service.down, service.probe, queries.status, queries.beta, queries.variance, queries.results,
    queries.logs, service.scale, service.cancel, service.drain, doctor.doctor,
):  # fmt: skip
    app.command()(_command)


def _interrupted(directory: Path | None, finished_rounds: int) -> int:
    if directory is None:
        streams.tell("interrupted before the first round; nothing was written")
    else:
        streams.tell(f"interrupted: {finished_rounds} rounds are kept; go on with run --resume {directory}")
    return EXIT_INTERRUPTED


def main() -> None:
    """Entry point of `ray-probe` and `launch.py`."""
    streams.prepare()
    try:
        code = _main()
    except OSError as error:
        if streams.takes_output(sys.stdout):
            raise
        code = _refused(f"stdout: cannot be written ({error.strerror})", OutputError.exit_code)  # a help text, say
    for stream in (sys.stdout, sys.stderr):
        streams.takes_output(stream)
    sys.exit(code)


def _main() -> int:
    try:
        refuse_shadows({})
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
    streams.tell(" ".join(f"error: {message}".split()))
    return code


if __name__ == "__main__":
    main()
