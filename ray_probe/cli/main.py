"""The command line. Every refusal is one line on stderr and an exit code."""

import sys
from typing import Any

import typer

from ray_probe.cli import doctor, measure, queries, report, serve, service, streams, watch
from ray_probe.cluster.connection.shadows import refuse_shadows
from ray_probe.errors import InputError, OutputError, ProbeError

EXIT_USAGE = InputError.exit_code

# Newer versions of typer bring a click of their own, older ones use the package: both derive from this class.
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    help="Measures the entropy of responses, its gradient and its change between checkpoints, on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


for _command in (
    measure.run, measure.compare, service.up, service.down, service.probe, watch.watch, queries.status, queries.beta,
    queries.variance, queries.results, queries.logs, report.report, service.scale, service.cancel, service.drain,
    serve.serve, doctor.doctor,
):  # fmt: skip
    app.command()(_command)


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
        return measure.interrupted(None, 0)
    except ProbeError as error:
        return _refused(str(error), error.exit_code)
    return int(code or 0)


def _refused(message: str, code: int) -> int:
    streams.tell(" ".join(f"error: {message}".split()))
    return code


if __name__ == "__main__":
    main()
