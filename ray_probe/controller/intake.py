"""Records the files of queued measurements.

Pins and stamps are taken at once, fingerprints later: a thread computes those of measurements that wait, preparation
those of a measurement that starts at once.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from ray_probe.config import ProbeConfig
from ray_probe.controller import pins
from ray_probe.controller.measurement import Prepare
from ray_probe.controller.queue import OPEN, Measurement
from ray_probe.controller.sources import Source, check_measured, check_unchanged, sources_of
from ray_probe.controller.state import ControllerState
from ray_probe.run.preparation.prepared import PreparedRun
from ray_probe.system.clock import utc_now

logger = logging.getLogger("ray_probe")
TICK_S = 0.5


@dataclass(frozen=True)
class Taken:
    """The files of a measurement when it is queued.

    Attributes:
        sources: its files, stamped.
        pin: directory of its pin, or None.
    """

    sources: tuple[Source, ...] = ()
    pin: str | None = None


class Intake:
    """Checks that queued measurements read the files of their submission.

    Args:
        state: of the controller.
    """

    def __init__(self, state: ControllerState) -> None:
        self._state = state
        self._changed: set[str] = set()  # ids whose files changed before their fingerprint was known
        self._closing = threading.Event()
        if state.directory is not None:
            kept = {item.pin for item in state.queue.items if item.state in OPEN and item.pin is not None}
            for left in pins.sweep(state.directory, kept):
                logger.info("%s: belongs to no open measurement; removed", left)

    def begin(self) -> None:
        """Starts the thread that computes fingerprints."""
        threading.Thread(target=self._work, name="intake", daemon=True).start()

    def close(self) -> None:
        """Ends the thread after its current file, without waiting."""
        self._closing.set()

    def take(
        self, config: ProbeConfig, directory: Path, adapter: Path | None,
        against: tuple[Path, Path | None] | None = None,
    ) -> Taken:  # fmt: skip
        """Stamps the files of a measurement, and pins them if the configuration says so.

        Args:
            config: of the measurement.
            directory: of its checkpoint.
            adapter: directory of its adapter, or None.
            against: of a comparison, directories of checkpoint A and of its adapter.

        Raises:
            ProbeError: it cannot be pinned; leaves nothing behind.
        """
        sources, how, pin = sources_of(config, directory, adapter, against), config.model.snapshot, None
        if how is not None:
            assert self._state.directory is not None, "a service has a directory"
            own, sources = pins.pin(self._state.directory, sources, how)
            pin = str(own)
            if how == "link" or adapter is not None:
                _log_base(sources)
        return Taken(tuple(source.stamped() for source in sources), pin)

    def forget(self, item: Measurement | Taken) -> None:
        """Removes the pin of a measurement."""
        if item.pin is not None:
            pins.remove(item.pin)

    def preparing(self, item: Measurement, prepare: Prepare) -> Prepare:
        """Returns a `Prepare` that refuses files changed since the submission."""

        def prepare_queued(config: ProbeConfig, created: datetime | None) -> PreparedRun:
            check_unchanged(item.sources, item.submitted, utc_now())
            prepared = prepare(_with_paths(config, item.sources, "pinned"), created)
            check_measured(item.sources, prepared, item.submitted, utc_now())
            named = _with_paths(prepared.config, item.sources, "place")  # a pin is temporary
            return replace(prepared, config=named)

        return prepare_queued if item.sources else prepare

    def _work(self) -> None:
        while not self._closing.wait(TICK_S):
            with self._state.changed:
                waiting = self._state.queue.waiting
            for item in waiting:
                if any(source.fingerprint is None for source in item.sources) and item.id not in self._changed:
                    self._fingerprint(item)
                    break

    def _fingerprint(self, item: Measurement) -> None:
        """Computes a measurement's fingerprints, unless its files have changed."""
        try:
            found = [s if s.fingerprint is not None else s.fingerprinted() for s in item.sources]
            same = [source.stamped() for source in found] == found
        except OSError:
            same = False
        if not same:  # it fails when it starts, with both times
            self._changed.add(item.id)
            return
        with self._state.changed:
            if self._state.queue.get(item.id).state in OPEN:
                self._state.change(item.id, sources=tuple(found))


def _with_paths(config: ProbeConfig, sources: Sequence[Source], which: Literal["pinned", "place"]) -> ProbeConfig:
    """Returns the configuration with the pinned or original paths."""
    sections: dict[str, dict[str, object]] = {"model": {}, "compare": {}}
    for source in sources:
        if source.pinned:
            section, _, key = source.field.partition(".")
            sections[section][key] = getattr(source, which)
    named = {"model": config.model, "compare": config.compare}
    return config.model_copy(
        update={name: section.model_copy(update=sections[name]) for name, section in named.items()}
    )


def _log_base(sources: Sequence[Source]) -> None:
    for source in sources:
        if source.field == "model.path" and source.pinned is None:
            logger.info("%s: cannot be hard-linked; the base of the adapter is read from there", source.place)
