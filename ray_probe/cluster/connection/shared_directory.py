"""Whether a directory is the same one on every node: a file is written here and read from there (spec section 7)."""

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ray_probe.config.schema import ProbeConfig
from ray_probe.errors import OutputError

if TYPE_CHECKING:
    from ray_probe.cluster.connection.nodes import Node

VISIBLE_S = 5.0  # network file systems may show a new file a moment late
ASK_S = 30.0


def check_shared(directory: Path, nodes: Sequence["Node"], seconds: float = ASK_S) -> list["Node"]:
    """The nodes that cannot read what is written to the directory here; those that do not answer are among them.

    A directory that is not there yet is made for the while; nothing is left behind.

    Args:
        directory: absolute path.
        nodes: of the cluster that this process is connected to.
        seconds: how long to wait for their answers.

    Raises:
        OutputError: the directory cannot be written here.
    """
    from ray_probe.cluster.connection.nodes import ask_nodes

    with _note(directory) as (path, text):
        answers = ask_nodes(nodes, can_read, str(path), text, seconds=seconds)
    return [answer.node for answer in answers if answer.value is not True]


def can_read(path: str, text: str, seconds: float = VISIBLE_S) -> bool:
    """Whether the file at `path` is there, or comes within so many seconds, and holds exactly this text."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if Path(path).read_text(encoding="ascii") == text:
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)


@contextlib.contextmanager
def _note(directory: Path) -> Iterator[tuple[Path, str]]:
    """A file with a text that nobody can guess, for the block, and its directory where that has to be made."""
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
            with contextlib.suppress(OSError):  # somebody else's file is in it by now
                place.rmdir()


def warn_unless_shared(config: ProbeConfig, tell: Callable[[str], None]) -> None:
    """On several nodes: say which do not see the run directory. Only its own node writes there, so a run goes on."""
    from ray_probe.cluster.connection.nodes import alive_nodes
    from ray_probe.cluster.connection.shared_directory import check_shared

    nodes = alive_nodes()
    blind = check_shared(Path(config.output.dir), nodes) if len(nodes) > 1 else []
    if blind:
        names = ", ".join(node.name for node in blind)
        tell(f"warning: output.dir {config.output.dir} is not seen on {names}: the run is lost with this node")
