"""The commands that measure without a service: run and compare."""

import contextlib
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ray_probe.cli import options, streams
from ray_probe.cli.output import EXIT_INTERRUPTED, Answer, answered, of_result
from ray_probe.errors import ConfigError, bad_value
from ray_probe.system.signals import at_last, ends_in_time

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ray_probe.run.result import Result
    from ray_probe.service.run_request import Run, RunRequest

CONFIG_SUFFIXES = (".yaml", ".yml")


def run(
    config: Annotated[Path | None, typer.Argument(help="YAML file of the run.", show_default=False)] = None,
    set_: options.Settings = None,
    actors: options.Actors = None,
    address: options.ConfigAddress = None,
    out: options.Out = None,
    on_result: options.OnResult = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Continue after the last finished round.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print result.json instead of the table.")] = False,
    verbose: options.Verbose = False,
) -> int:
    """Measure a checkpoint, then print a table of results."""
    from ray_probe.cli.options import overrides
    from ray_probe.service.run_request import RunRequest

    asked = overrides(set_ or [], actors, address, out, on_result)
    return _measured(RunRequest(config, resume, asked), as_json, verbose)


def compare(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C ...] [CONFIG]", help="Checkpoint directories in order, and a YAML file.", show_default=False
        ),
    ],
    adapter_a: Annotated[str | None, typer.Option(help="PEFT adapter on A.", show_default=False)] = None,
    adapter_b: Annotated[str | None, typer.Option(help="PEFT adapter on B.", show_default=False)] = None,
    prompts: Annotated[str | None, typer.Option(help="Other prompts (data.prompts).", show_default=False)] = None,
    set_: options.Settings = None,
    actors: options.Actors = None,
    address: options.ConfigAddress = None,
    out: options.Out = None,
    on_result: options.OnResult = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    verbose: options.Verbose = False,
) -> int:
    """Measure by how much the entropy changed from checkpoint to checkpoint, and why."""
    from ray_probe.cli.options import overrides
    from ray_probe.service.run_request import RunRequest

    *checkpoints, last = places
    config = Path(last) if last.endswith(CONFIG_SUFFIXES) else None
    checkpoints = checkpoints if config is not None else places
    if len(checkpoints) < 2:
        raise ConfigError(bad_value("A B", checkpoints, "give two checkpoint directories or more, then the config"))
    asked = overrides(set_ or [], actors, address, out, on_result)
    asked += () if prompts is None else (_setting("data.prompts", prompts),)
    if len(checkpoints) > 2:
        if adapter_a is not None or adapter_b is not None:
            field = "--adapter-b" if adapter_a is None else "--adapter-a"
            raise ConfigError(bad_value(field, adapter_a or adapter_b, "adapters need two checkpoints, A and B"))
        return _chained(checkpoints, config, asked, as_json)
    a, b = checkpoints
    named = {"model.path": b, "model.adapter": adapter_b, "compare.against": a, "compare.adapter": adapter_a}
    settings = tuple(_setting(key, value) for key, value in named.items())
    return _measured(RunRequest(config, None, (*settings, *asked), "compare"), as_json, verbose)


def _setting(key: str, value: str | None) -> str:
    return f"{key}={'null' if value is None else json.dumps(value)}"


def _chained(checkpoints: Sequence[str], config: Path | None, asked: tuple[str, ...], as_json: bool) -> int:
    """Compare each checkpoint with the next, then print the chain."""
    from ray_probe.service.chain import chain_directory, end_step, step_request, write_chain
    from ray_probe.service.run_request import Run

    directory, code, steps = chain_directory(config, asked), 0, len(checkpoints) - 1
    for number, (a, b) in enumerate(pairwise(checkpoints), start=1):
        streams.tell(f"step {number} of {steps}: {a} to {b}")
        state = Run()
        result = _executed(step_request(directory, number, steps, a, b, config, asked), state)
        if result is None:
            streams.tell(f"the same command with --set output.name={directory.name} goes on with the chain")
            return EXIT_INTERRUPTED
        end_step(directory, number)
        code = max(code, result.exit_code)
    chain = write_chain(directory)
    return answered(of_chain(chain.to_json(), directory, code), as_json)


def of_chain(value: object, directory: Path, code: int = 0) -> Answer:
    """Return the answer of a command that shows a chain of comparisons."""

    def table() -> "RenderableType":
        from ray_probe.report.chain_report import chain_table
        from ray_probe.run.comparison.chain import read_chain

        return chain_table(read_chain(directory))

    lines = (f"chain.json, chain.png, report.html and a run directory for each step: {directory}",)
    return Answer(value, table, code, lines, lines[0])


def _measured(request: "RunRequest", as_json: bool, verbose: bool) -> int:
    """Run a request and print its result."""
    from ray_probe.service.run_request import Run

    state = Run()
    result = _executed(request, state)
    if result is None:
        return EXIT_INTERRUPTED
    assert state.directory is not None
    return answered(of_result(result, state.directory, verbose), as_json)


def _executed(request: "RunRequest", state: "Run") -> "Result | None":
    """Run a request with a progress display; None where it was interrupted."""
    from ray_probe.report.progress_display import ProgressDisplay
    from ray_probe.service.run_once import execute

    with ends_in_time(), at_last(lambda: interrupted(state.directory, state.finished_rounds)):
        try:
            # Ray prints messages of its workers to stdout, which belongs to the result.
            with ProgressDisplay() as display, at_last(display.stop), contextlib.redirect_stdout(sys.stderr):
                return execute(request, display, state)
        except KeyboardInterrupt:
            interrupted(state.directory, state.finished_rounds)
            return None


def interrupted(directory: Path | None, finished_rounds: int) -> int:
    """Tell what is kept of an interrupted run; returns the exit code."""
    if directory is None:
        streams.tell("interrupted before the first round; nothing was written")
    else:
        streams.tell(f"interrupted: {finished_rounds} rounds are kept; go on with run --resume {directory}")
    return EXIT_INTERRUPTED
