"""The published state of a controller, with its queue on disk.

One thread works with it, any thread may read it.
"""

import logging
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from ray_probe.controller.queue import Measurement, Queue
from ray_probe.errors import ConfigError, OutputError
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.run.directory import RunDirectory
from ray_probe.run.progress import Progress
from ray_probe.run.result import Result
from ray_probe.system.clock import utc_now
from ray_probe.system.digests import sealed, unsealed
from ray_probe.system.files import write_atomically

logger = logging.getLogger("ray_probe")
EVENTS_KEPT = 2000
STATE_FILE = "service.json"
SCHEMA_VERSION = 1


class ControllerState:
    """State of a service or a run.

    Attributes:
        changed: guards the state and is notified of changes.
        actors: number that `scale` set last, or None.
        state: starting, idle, loading, measuring, closing or failed.
        closing: the controller is ending.
        problem: why the service cannot work, or None.
        probe: of the running measurement.
        progress: of the running measurement.

    Args:
        directory: that holds the queue, also after a loss; None: the queue is not written.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.changed = threading.Condition(threading.RLock())
        self.since = utc_now()
        self.actors: int | None = None
        self.queue = self._restored()
        self.state = "starting"
        self.closing = False
        self.problem: str | None = None
        self.probe: OfflineEntropyProbe | None = None
        self.progress: Progress | None = None
        self._events: deque[tuple[int, str, Progress]] = deque(maxlen=EVENTS_KEPT)
        self._sequence = time.time_ns() // 1000  # above those before a restart, as clients of then may still follow

    def save(self) -> None:
        """Writes the queue to disk."""
        if self.directory is not None:
            state = {"schema_version": SCHEMA_VERSION, "actors": self.actors} | self.queue.to_json()
            write_atomically(self.directory / STATE_FILE, sealed(state), private=True)

    def submit(self, item: Measurement) -> None:
        """Queues a measurement. Raises OutputError if it cannot be written."""
        with self.changed:
            self.queue.submit(item)
            try:
                self.save()
            except OutputError:
                self.queue.withdraw(item.id)
                raise
            self.changed.notify_all()

    def take(self, now: str) -> Measurement | None:
        """Marks the next queued measurement as running; returns it, or None."""
        with self.changed:
            item = next(iter(self.queue.waiting), None)
            if item is None:
                return None
            return self.change(item.id, "loading", state="running", started=item.started or now, cause=None)

    def change(self, identity: str, state: str | None = None, /, **fields: Any) -> Measurement:
        """Changes a measurement, and the state if given; a disk error becomes `problem`."""
        with self.changed:
            if state is not None:
                self.state, self.problem = state, None
            item = self.queue.change(identity, **fields)
            try:
                self.save()
            except OutputError as error:  # the work goes on, and the next change writes again
                logger.error(str(error))
                self.problem = str(error)
            self.changed.notify_all()
        return item

    def leave(self, identity: str, /, **fields: Any) -> Measurement:
        """Changes a measurement that stops running."""
        with self.changed:
            self.probe = self.progress = None
            return self.change(identity, **fields)

    def event(self, identity: str, progress: Progress) -> None:
        """Keeps an event: every note, and of each round the newest progress."""
        with self.changed:
            self._sequence += 1
            in_round = progress.rounds != 0
            last = self._events[-1] if in_round and self._events else None
            if last and last[1] == identity and last[2].note is None and last[2].round == progress.round:
                self._events.pop()
            self._events.append((self._sequence, identity, progress))
            if in_round:
                self.progress = progress

    def events(self, identity: str, cursor: int) -> tuple[int, tuple[Progress, ...]]:
        """Returns the next cursor, and the events of a measurement after `cursor`."""
        with self.changed:
            fresh = [(number, event) for number, whose, event in self._events if whose == identity and number > cursor]
        return max((number for number, _ in fresh), default=cursor), tuple(event for _, event in fresh)

    def result(self, item: Measurement) -> Result | None:
        """The result of a measurement's whole rounds so far; None before the first.

        Raises ConfigError when the file is damaged.
        """
        with self.changed:  # it may have ended since, and the next one begun
            item, probe = self.queue.get(item.id), self.probe
        if item.state == "running":
            return None if probe is None else probe.result()
        return None if item.finished is None else RunDirectory(Path(item.directory)).result()

    def _restored(self) -> Queue:
        path = None if self.directory is None else self.directory / STATE_FILE
        if path is None or not path.exists():
            return Queue()
        try:
            raw = unsealed(path.read_bytes())
            if raw["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema_version {raw['schema_version']}, need {SCHEMA_VERSION}")
            self.actors = raw.get("actors")
            return Queue.from_json(raw)
        except (OSError, ValueError, KeyError, TypeError) as error:
            remedy = "restore it, or move it away to begin with an empty queue"
            raise ConfigError(f"{path}: cannot be read ({type(error).__name__}: {error}); {remedy}") from None


def summary(result: Result | None) -> dict[str, Any]:
    """Return what a list of measurements shows of a result, in plain JSON types."""
    return {
        "rounds": 0 if result is None else result.counts.rounds,
        "sequences": 0 if result is None else result.counts.sequences,
        "entropy": None if result is None else result.entropy.to_json(),
        "gradient": None if result is None else result.gradient.to_json(),
        "beta_version": None if result is None else result.beta.version,
        "change": None if result is None or result.change is None else result.change.total.to_json(),
    }
