"""Prints the answers of commands on stdout, for people or for machines."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_probe.cli.streams import write
from ray_probe.errors import CancelledError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ray_probe.run.result import Result

EXIT_INTERRUPTED = CancelledError.exit_code


@dataclass(frozen=True)
class Answer:
    """The answer of a command.

    Attributes:
        value: for machines, plain JSON types.
        text: makes the answer for people: a string, or something that rich prints.
        code: exit code of the command.
        last_lines: printed after the text, for people alone.
        kept: what the command achieved, for the error where stdout cannot be written; None: a text of one line.
    """

    value: Any
    text: "Callable[[], RenderableType]"
    code: int = 0
    last_lines: tuple[str, ...] = ()
    kept: str | None = None


def answered(answer: Answer, as_json: bool) -> int:
    """Print an answer; returns its exit code.

    Raises OutputError where stdout cannot be written.
    """
    text = as_json_text(answer.value) if as_json else _for_people(answer)
    kept = text.strip() if answer.kept is None and text.count("\n") == 1 else answer.kept
    write(text, sys.stdout, kept, answer.code)
    return answer.code


def as_json_text(value: Any) -> str:
    """Return a value as the text of a JSON document."""
    return json.dumps(value, indent=1) + "\n"


def _for_people(answer: Answer) -> str:
    from ray_probe.report.table_parts import rendered

    said = answer.text()
    text = f"{said}\n" if isinstance(said, str) else rendered(said, sys.stdout)
    return text + "".join(f"{line}\n" for line in answer.last_lines)


@contextlib.contextmanager
def stdout_for_results() -> Iterator[None]:
    """Send to stderr what Ray prints to stdout, which belongs to the answer."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def of_result(result: "Result", directory: str | Path, verbose: bool = False) -> Answer:
    """Return the answer of a command that gives a result, as a table or as JSON."""

    def table() -> "RenderableType":
        from ray_probe.report.result_table import result_table

        return result_table(result, verbose)

    lines = [f"results, plots and log: {directory}", f"all figures: ray-probe results {directory} --verbose"]
    return Answer(result.to_json(), table, result.exit_code, tuple(lines[: 1 if verbose else 2]), lines[0])
