"""Runs the user's command that converts a sharded checkpoint, one at a time."""

import contextlib
import secrets
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ray_probe.errors import ConfigError, bad_value
from ray_probe.watch import pins
from ray_probe.watch.candidates import Candidate
from ray_probe.watch.found import Found, Stamp, tree_digest
from ray_probe.watch.inspection import inspect
from ray_probe.watch.layouts import DESTINATION


class Running(Protocol):
    """A command that runs."""

    def poll(self) -> int | None:
        """Return its exit code; None while it runs."""

    def last_line(self) -> str:
        """Return the last line that it wrote."""

    def end(self) -> None:
        """End it, where it still runs."""


Start = Callable[[Sequence[str], Path], Running]


@dataclass(frozen=True)
class Conversion:
    """A conversion that runs.

    Attributes:
        candidate: the checkpoint.
        seen: digest of the checkpoint's directory when it began.
        to: directory that the command writes, a pin of the watch.
        source: pinned tree that it reads, to be removed; None: it reads the trainer's own.
        command: the running command.
    """

    candidate: Candidate
    seen: str
    to: Path
    source: Path | None
    command: Running


class Converter:
    """Runs `--convert`, for one checkpoint at a time.

    Args:
        directory: of the watch's files.
        template: the command, with {src} and {dst}.
        base: model that completes what the command writes, or None.
        start: starts a command whose output goes to a file.
    """

    def __init__(self, directory: Path, template: str, base: Path | None, start: Start) -> None:
        self._directory, self._template, self._base, self._start = directory, template, base, start
        self.running: Conversion | None = None

    def begin(self, candidate: Candidate, found: Found, seen: str) -> None:
        """Start the conversion of a checkpoint whose shards are finished."""
        assert self.running is None and found.source is not None
        source = None
        with contextlib.suppress(OSError):  # where links are impossible the trainer's own shards are read
            source = pins.pin_tree(self._directory, found.source)
        to = self._directory / pins.PINS / secrets.token_hex(6) / f"{Path(candidate.key).name}{DESTINATION}"
        to.parent.mkdir(parents=True)
        command = self._start(words_of(self._template, source or found.source, to), self._directory / "convert.log")
        self.running = Conversion(candidate, seen, to, source, command)

    def ended(self) -> tuple[Conversion, Found] | None:
        """Return a conversion that has ended, with what it made; None: none has."""
        running = self.running
        if running is None or (code := running.command.poll()) is None:
            return None
        self.running = None
        if running.source is not None:
            pins.remove(running.source)
        name, step = Path(running.candidate.key).name, running.candidate.step
        if code == 0 and running.to.is_dir():
            made = inspect(running.to, self._base, Stamp(tree_digest(running.to), float("-inf")), step=step)
            if made.state == "ready":
                own = [path for path in pins.measured_files(made) if path.parent != running.to]
                pins.link_or_copy(own, running.to)
                return running, made
            problem = f"{self._template} left no whole model: {made.why}"
        else:
            problem = f"{self._template} ended with {code}: {running.command.last_line()}"
        pins.remove(running.to)
        return running, Found("needs conversion", "", step, f"{name}: {problem}")

    def close(self) -> None:
        """End the command that runs, and remove what it has written."""
        if self.running is not None:
            self.running.command.end()
            pins.remove(self.running.to)
            if self.running.source is not None:
                pins.remove(self.running.source)
            self.running = None


class Process:
    """A command of the shell's words, without a shell, whose output goes to a file.

    Args:
        words: of the command.
        log: receives its output.
    """

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as stream:
            try:
                self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
                )
            except OSError as error:
                self._process = None
                stream.write(f"{words[0]}: {error.strerror}".encode())

    def poll(self) -> int | None:
        """Return its exit code; None while it runs."""
        return 127 if self._process is None else self._process.poll()

    def last_line(self) -> str:
        """Return the last line that it wrote."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def end(self) -> None:
        """End it, where it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(5.0)


def words_of(template: str, source: Path, to: Path) -> list[str]:
    """Return the words of a command, with the places for {src} and {dst} filled in."""
    return [word.replace("{src}", str(source)).replace("{dst}", str(to)) for word in split(template)]


def split(template: str) -> list[str]:
    """Return the words of `--convert`.

    Raises ConfigError where it is no command with {src} and {dst}.
    """
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise ConfigError(bad_value("--convert", template, f"its quotes do not match ({error})")) from None
    if not all(any(place in word for word in words) for place in ("{src}", "{dst}")):
        raise ConfigError(bad_value("--convert", template, "need a command with {src} and {dst}"))
    return words
