"""What a command answers, and how it is printed: results on stdout, for people or for machines; words on stderr."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 100
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Answer:
    """What a command says.

    Attributes:
        value: for machines, plain JSON types.
        text: makes what people see: a string, or something that rich prints.
        code: what the command exits with.
        last_line: printed after the text, for people alone.
    """

    value: Any
    text: "Callable[[], RenderableType]"
    code: int = 0
    last_line: str | None = None


def answered(answer: Answer, as_json: bool) -> int:
    """Print an answer; returns its exit code."""
    if as_json:
        print_json(answer.value)
        return answer.code
    said = answer.text()
    if isinstance(said, str):
        print(said)
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else WIDTH).print(said)
    if answer.last_line is not None:
        print(answer.last_line)
    return answer.code


def print_json(value: Any) -> None:
    """For machines."""
    print(json.dumps(value, indent=1))


def tell(text: str) -> None:
    """Say what happens meanwhile."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stdout_for_results() -> Iterator[None]:
    """Ray prints what befalls it to stdout, which belongs to the answer."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def of_result(result: dict[str, Any], directory: str | Path) -> Answer:
    """A measurement's result, as a table or as it is, with the exit code that it stands for."""

    def table() -> "RenderableType":
        from ray_probe.report.table import result_table

        return result_table(result)

    return Answer(result, table, exit_code(result), f"results, plots and log: {directory}")


def exit_code(result: dict[str, Any]) -> int:
    """What a run that came to its end exits with: 1 for conflicts, 3 for a partial result, else 0."""
    if result["conflicts"]:
        return 1
    return 3 if result["partial"] else 0
