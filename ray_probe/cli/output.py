"""What a command answers, and how it is printed: results on stdout, for people or for machines; words on stderr."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_probe.cli.streams import write

if TYPE_CHECKING:
    from rich.console import RenderableType

EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Answer:
    """What a command says.

    Attributes:
        value: for machines, plain JSON types.
        text: makes what people see: a string, or something that rich prints.
        code: what the command exits with.
        last_lines: printed after the text, for people alone.
        kept: what holds also where none of this can be printed, for the error; None: a text of one line itself.
    """

    value: Any
    text: "Callable[[], RenderableType]"
    code: int = 0
    last_lines: tuple[str, ...] = ()
    kept: str | None = None


def answered(answer: Answer, as_json: bool) -> int:
    """Print an answer; returns its exit code. Raises OutputError where stdout does not take it."""
    text = as_json_text(answer.value) if as_json else _for_people(answer)
    kept = text.strip() if answer.kept is None and text.count("\n") == 1 else answer.kept
    write(text, sys.stdout, kept, answer.code)
    return answer.code


def as_json_text(value: Any) -> str:
    """Write a value for machines."""
    return json.dumps(value, indent=1) + "\n"


def _for_people(answer: Answer) -> str:
    from ray_probe.report.table_parts import rendered

    said = answer.text()
    text = f"{said}\n" if isinstance(said, str) else rendered(said, sys.stdout)
    return text + "".join(f"{line}\n" for line in answer.last_lines)


@contextlib.contextmanager
def stdout_for_results() -> Iterator[None]:
    """Ray prints what befalls it to stdout, which belongs to the answer."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def of_result(result: dict[str, Any], directory: str | Path, verbose: bool = False) -> Answer:
    """A measurement's result, as a table or as it is, with the exit code that it stands for."""

    def table() -> "RenderableType":
        from ray_probe.report.result_table import result_table

        return result_table(result, verbose)

    lines = [f"results, plots and log: {directory}", f"all figures: ray-probe results {directory} --verbose"]
    return Answer(result, table, exit_code(result), tuple(lines[: 1 if verbose else 2]), lines[0])


def exit_code(result: dict[str, Any]) -> int:
    """What a run that came to its end exits with: 1 for conflicts, 3 for a partial result, else 0."""
    if result["conflicts"]:
        return 1
    return 3 if result["partial"] else 0
