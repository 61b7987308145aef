"""What a controller has published: its queue, kept on disk, and what happens; written by one thread, read by any."""

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
    """State of a service or a run; `changed` guards it, and is notified of what happens.

    `actors` is what `scale` asked for last, None when nobody has.

    Args:
        directory: where the queue is kept, and found again after a loss; None keeps none.
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
        self._sequence = time.time_ns() // 1000  # beyond those of an earlier life, whose followers may still ask

    def save(self) -> None:
        """Put the queue on disk."""
        if self.directory is not None:
            state = {"schema_version": SCHEMA_VERSION, "actors": self.actors} | self.queue.to_json()
            path = self.directory / STATE_FILE
            write_atomically(path, sealed(state))
            path.chmod(0o600)

    def submit(self, item: Measurement) -> None:
        """Queue a measurement, on disk too. Raises OutputError, with nothing queued, when it cannot be kept."""
        with self.changed:
            self.queue.submit(item)
            try:
                self.save()
            except OutputError:
                self.queue.withdraw(item.id)
                raise
            self.changed.notify_all()

    def take(self, now: str) -> Measurement | None:
        """The measurement that is next, at work from now on; None when none waits."""
        with self.changed:
            item = next(iter(self.queue.waiting), None)
            if item is None:
                return None
            return self.change(item.id, "loading", state="running", started=item.started or now, cause=None)

    def change(self, identity: str, state: str | None = None, /, **fields: Any) -> Measurement:
        """Change a measurement, and the state of the whole where given; what keeps it from the disk is a problem."""
        with self.changed:
            if state is not None:
                self.state, self.problem = state, None
            item = self.queue.change(identity, **fields)
            try:
                self.save()
            except OutputError as error:  # the work goes on, and the next change tries again
                logger.error(str(error))
                self.problem = str(error)
            self.changed.notify_all()
        return item

    def leave(self, identity: str, /, **fields: Any) -> Measurement:
        """A measurement is no longer at work."""
        with self.changed:
            self.probe = self.progress = None
            return self.change(identity, **fields)

    def event(self, identity: str, progress: Progress) -> None:
        """Something happened to a measurement; of a round only the newest snapshot is kept, and every note."""
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
        """What happened to a measurement after `cursor`, and the cursor to go on from."""
        with self.changed:
            fresh = [(number, event) for number, whose, event in self._events if whose == identity and number > cursor]
        return max((number for number, _ in fresh), default=cursor), tuple(event for _, event in fresh)

    def result(self, item: Measurement) -> Result | None:
        """The result of a measurement's whole rounds so far; None before the first.

        Raises ConfigError when the file is damaged.
        """
        with self.changed:  # it may have ended since, and the next one be at work
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
    }
