"""Checks that a directory is the same on every node, by a file written here."""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ray_probe.config.schema import ProbeConfig
from ray_probe.errors import OutputError
from ray_probe.system.clock import wait_until

if TYPE_CHECKING:
    from ray_probe.cluster.connection.nodes import Node

VISIBLE_S = 5.0  # network file systems may show a new file late
LOOK_EVERY_S = 0.2
ASK_S = 30.0


def check_shared(directory: Path, nodes: Sequence["Node"], seconds: float = ASK_S) -> list["Node"]:
    """Returns the nodes that do not see a file written here, or do not answer.

    Leaves nothing behind.

    Args:
        directory: absolute path; it need not exist.
        nodes: of the connected cluster.
        seconds: timeout of their answers.

    Raises:
        OutputError: the directory cannot be written here.
    """
    from ray_probe.cluster.connection.nodes import ask_nodes

    with _note(directory) as (path, text):
        answers = ask_nodes(nodes, can_read, str(path), text, seconds=seconds)
    return [answer.node for answer in answers if answer.value is not True]


def can_read(path: str, text: str, seconds: float = VISIBLE_S) -> bool:
    """Returns whether the file at `path` holds exactly this text within the timeout."""

    def is_there() -> bool:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return Path(path).read_text(encoding="ascii") == text
        return False

    return wait_until(is_there, seconds, LOOK_EVERY_S)


@contextlib.contextmanager
def _note(directory: Path) -> Iterator[tuple[Path, str]]:
    """Writes a file of random text for the block; yields its path and text."""
    path, text = directory / f".shared-{secrets.token_hex(8)}", secrets.token_hex(16)
    made = [place for place in (directory, *directory.parents) if not place.exists()]
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"output.dir: {directory} cannot be written ({error.strerror}); choose another"
            ) from error
        yield path, text
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        for place in made:
            with contextlib.suppress(OSError):  # another program has put a file into it
                place.rmdir()


def warn_unless_shared(config: ProbeConfig, tell: Callable[[str], None]) -> None:
    """Warns of the nodes that do not see the run directory."""
    from ray_probe.cluster.connection.nodes import alive_nodes

    # Only this node writes there, so a run can continue without the others.
    nodes = alive_nodes()
    blind = check_shared(Path(config.output.dir), nodes) if len(nodes) > 1 else []
    if blind:
        names = ", ".join(node.name for node in blind)
        tell(f"warning: output.dir {config.output.dir} is not seen on {names}: the run is lost with this node")
