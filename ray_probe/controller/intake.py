"""The intake of a service's queue: pins and stamps at once, fingerprints in a thread of its own. No torch.

A measurement that is taken up at once is fingerprinted by its own preparation; one that waits, by the thread.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from ray_probe.config import ProbeConfig
from ray_probe.controller import pins
from ray_probe.controller.measurement import Prepare
from ray_probe.controller.queue import OPEN, Measurement
from ray_probe.controller.sources import Source, check_measured, check_unchanged, sources_of
from ray_probe.controller.state import ControllerState
from ray_probe.run.prepared import PreparedRun
from ray_probe.system.clock import utc_now

logger = logging.getLogger("ray_probe")
TICK_S = 0.5


@dataclass(frozen=True)
class Taken:
    """What is kept of a measurement's files when it is queued.

    Attributes:
        sources: its files, stamped.
        pin: directory of its pin, or None.
    """

    sources: tuple[Source, ...] = ()
    pin: str | None = None


class Intake:
    """Keeps what queued measurements are about.

    Args:
        board: of the service, with its directory.
    """

    def __init__(self, board: ControllerState) -> None:
        self._board = board
        self._changed: set[str] = set()  # measurements whose files changed before their fingerprint was there
        self._closing = threading.Event()
        if board.directory is not None:
            kept = {item.pin for item in board.queue.items if item.state in OPEN and item.pin is not None}
            for left in pins.sweep(board.directory, kept):
                logger.info("%s: belongs to no measurement that waits; removed", left)

    def begin(self) -> None:
        """Start the thread that takes fingerprints."""
        threading.Thread(target=self._work, name="intake", daemon=True).start()

    def close(self) -> None:
        """End the thread after the file that it reads; nobody waits for it."""
        self._closing.set()

    def take(self, config: ProbeConfig, directory: Path, adapter: Path | None) -> Taken:
        """Stamp what a measurement reads, and pin it where the configuration says so.

        Args:
            config: of the measurement.
            directory: where its checkpoint lies.
            adapter: where the adapter on it lies, or None.

        Raises:
            ProbeError: it cannot be pinned; nothing of it is left then.
        """
        sources, how, pin = sources_of(config, directory, adapter), config.model.snapshot, None
        if how is not None:
            assert self._board.directory is not None, "a service has a directory"
            own, sources = pins.pin(self._board.directory, sources, how)
            pin = str(own)
            if how == "link" or adapter is not None:
                _log_base(sources)
        return Taken(tuple(source.stamped() for source in sources), pin)

    def forget(self, item: Measurement | Taken) -> None:
        """Remove the pin of a measurement that has ended, or was never queued."""
        if item.pin is not None:
            pins.remove(item.pin)

    def preparing(self, item: Measurement, prepare: Prepare) -> Prepare:
        """What prepares a measurement from what was queued, or refuses it where that has changed since."""

        def prepare_queued(config: ProbeConfig, created: datetime | None) -> PreparedRun:
            check_unchanged(item.sources, item.submitted, utc_now())
            prepared = prepare(_read_from(config, item.sources), created)
            check_measured(item.sources, prepared, item.submitted, utc_now())
            return _named_after(prepared, item.sources)

        return prepare_queued if item.sources else prepare

    def _work(self) -> None:
        while not self._closing.wait(TICK_S):
            with self._board.changed:
                waiting = self._board.queue.waiting
            for item in waiting:
                if any(source.fingerprint is None for source in item.sources) and item.id not in self._changed:
                    self._fingerprint(item)
                    break

    def _fingerprint(self, item: Measurement) -> None:
        """Take the fingerprints of a measurement; without effect where its files are not those of its stamps."""
        try:
            found = [s if s.fingerprint is not None else s.fingerprinted() for s in item.sources]
            same = [source.stamped() for source in found] == found
        except OSError:
            same = False
        if not same:  # it fails when it is taken up, with both times
            self._changed.add(item.id)
            return
        with self._board.changed:
            if self._board.queue.get(item.id).state in OPEN:
                self._board.change(item.id, sources=tuple(found))


def _read_from(config: ProbeConfig, sources: Sequence[Source]) -> ProbeConfig:
    """The configuration with the pins in the places of what they were made from."""
    pinned = {source.field: source.pinned for source in sources if source.pinned is not None}
    return _with_paths(config, pinned.get("model.path"), pinned.get("model.adapter"))


def _named_after(prepared: PreparedRun, sources: Sequence[Source]) -> PreparedRun:
    """The same, with the names that the checkpoint has outside of the service: a pin is gone in the end."""
    named = {source.field: source.place for source in sources if source.pinned is not None}
    config = _with_paths(prepared.config, named.get("model.path"), named.get("model.adapter"))
    return replace(prepared, config=config)


def _with_paths(config: ProbeConfig, path: str | None, adapter: str | None) -> ProbeConfig:
    paths = {name: value for name, value in (("path", path), ("adapter", adapter)) if value is not None}
    return config.model_copy(update={"model": config.model.model_copy(update=paths)})


def _log_base(sources: Sequence[Source]) -> None:
    for source in sources:
        if source.field == "model.path" and source.pinned is None:
            logger.info("%s: cannot be hard-linked, and stays where it is as the base of an adapter", source.place)
