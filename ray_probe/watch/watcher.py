"""Watches a directory: finds checkpoints, pins them, and has them measured.

A plain class with a clock and a client that are given to it; `step` is one look at the directory and the service.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ray_probe.checkpoints.files import stamp_of
from ray_probe.system.files import write_remedy
from ray_probe.watch import pins
from ray_probe.watch.candidates import Candidate, checkpoints
from ray_probe.watch.conversion import Converter
from ray_probe.watch.entries import ITS_TURN, Entries, Entry
from ray_probe.watch.found import Found, tree_digest
from ray_probe.watch.inspection import WITHOUT_CHANGE, inspect
from ray_probe.watch.queueing import Queueing, bytes_of
from ray_probe.watch.spool import Request, Spool


@dataclass(frozen=True)
class WatchOptions:
    """Which checkpoints are taken, and how.

    Attributes:
        base: model whose config and tokenizer complete a checkpoint, and the base of adapters; None: none.
        every: take each such checkpoint that is finished, the first one included.
        from_step: leave out checkpoints of earlier steps; 0: take all.
    """

    base: Path | None = None
    every: int = 1
    from_step: int = 0


class Watcher:
    """A watch over the checkpoints of one training run.

    Args:
        root: directory below which the trainer writes.
        directory: of the watch's own files, absolute.
        entries: of the series.
        queueing: has pinned checkpoints measured.
        spool: of the trainer's requests.
        options: which checkpoints are taken.
        clock: seconds, never set back.
        say: receives an entry whose state is new, or whose reason is.
        converter: converts sharded checkpoints; None: the command is shown.
    """

    def __init__(
        self, root: Path, directory: Path, entries: Entries, queueing: Queueing, spool: Spool, options: WatchOptions,
        clock: Callable[[], float], say: Callable[[Entry], None], converter: Converter | None = None,
    ) -> None:  # fmt: skip
        self._root, self._directory, self._entries, self._queueing = root, directory, entries, queueing
        self._spool, self._options, self._clock, self._say, self._converter = spool, options, clock, say, converter
        self._found: dict[str, tuple[Candidate, Found]] = {}  # by the path that was inspected
        self._unconverted: dict[str, str] = {}
        pins.sweep(directory, [entry.pin for entry in entries.items if entry.pin is not None])

    def step(self) -> None:
        """Look once at the directory, the requests and the service.

        Raises:
            ClusterError: the service does not answer.
            OutputError: the state file cannot be written.
        """
        looks = self._candidates()
        for candidate, request in looks:
            self._look(candidate, request)
        keys, paths = {one.key for one, _ in looks}, {str(one.path) for one, _ in looks}
        for path in sorted(self._found.keys() - paths):
            candidate, found = self._found.pop(path)
            if candidate.key not in keys:  # else its trainer has renamed it
                self._gone(candidate, found)
        self._end_conversion()
        self._queueing.step()
        self._entries.save()

    def settled(self) -> bool:
        """Return whether nothing is left to wait for but the trainer."""
        pausing = any(WITHOUT_CHANGE in entry.why for entry in self._entries.others.values())
        return not (self._queueing.open or pausing or (self._converter is not None and self._converter.running))

    def close(self) -> None:
        """End a conversion that runs."""
        if self._converter is not None:
            self._converter.close()

    def _candidates(self) -> list[tuple[Candidate, Request | None]]:
        """Return what there is to look at, by step; a request takes its directory's place."""
        listed = {candidate.key: candidate for candidate in checkpoints(self._root)}
        found: list[tuple[Candidate, Request | None]] = []
        for request in self._spool.requests():
            key = str(request.source.resolve())
            step = listed[key].step if request.step is None and key in listed else request.step
            found.append((Candidate(request.checkpoint, key, step), request))
        requested = {candidate.key for candidate, _ in found}
        found += [(candidate, None) for key, candidate in listed.items() if key not in requested]
        return sorted(found, key=lambda one: (one[0].step is None, one[0].step or 0, one[0].key))

    def _look(self, candidate: Candidate, request: Request | None) -> None:
        """Inspect a checkpoint, unless it is as it was when it was taken."""
        key, options = candidate.key, self._options
        number, before = self._entries.newest(key), self._found.get(str(candidate.path))
        if number is not None and self._entries.items[number].seen == tree_digest(candidate.path):
            self._done(request)
            return
        if number is None and candidate.step is not None and candidate.step < options.from_step:
            early = Found("skipped", "", candidate.step, f"before step {options.from_step} (--from)")
            self._note(candidate, early, chosen=True)
            self._done(request)
            return
        stamp = None if before is None else before[1].stamp
        found = inspect(candidate.path, options.base, stamp, self._clock(), candidate.step)
        self._found[str(candidate.path)] = candidate, found
        if found.state == "needs conversion" and self._converter is not None and number is None:
            self._begin_conversion(self._converter, candidate, found)
        elif found.state == "ready":
            self._take(candidate, found, request)
        elif found.state == "vanished":
            self._gone(candidate, found)
            self._done(request)
        elif number is None or self._entries.items[number].seen == "":
            self._note(candidate, found)

    def _done(self, request: Request | None) -> None:
        if request is not None:
            self._spool.done(request)

    def _note(self, candidate: Candidate, found: Found, chosen: bool = False) -> None:
        """Note the state of a checkpoint that is not taken."""
        assert found.state != "ready", "it is taken"
        entry = Entry(candidate.key, found.state, found.why, found.step, found.layout, chosen=chosen)
        before = self._entries.others.get(candidate.key)
        self._entries.others[candidate.key] = entry
        if before is None or (before.state, before.why) != (entry.state, entry.why):
            self._say(entry)

    def _gone(self, candidate: Candidate, found: Found) -> None:
        """Note that a checkpoint went before it was taken."""
        entry = self._entries.others.get(candidate.key)
        said = entry is not None and entry.state in ("vanished", "skipped")
        if self._entries.newest(candidate.key) is None and not said:
            why = "it was deleted before it was pinned"
            self._note(candidate, replace(found, state="vanished", why=why))

    def _take(self, candidate: Candidate, found: Found, request: Request | None) -> None:
        """Pin a ready checkpoint, unless it is known or an option leaves it out."""
        key = candidate.key
        try:
            digest, stamp = tree_digest(candidate.path), stamp_of(pins.measured_files(found))
            known = self._entries.with_stamp(stamp)
            if known is None and self._is_left_out(candidate, found, digest, stamp):
                self._done(request)
                return
            pin = None if known is not None else pins.pin(self._directory, Path(key).name, found)
            if pin is not None and stamp_of(pins.measured_files(found)) != stamp:
                pins.remove(pin)
                raise pins.MovedError("its files")
        except (pins.MovedError, FileNotFoundError):
            if not candidate.path.is_dir():
                self._gone(candidate, found)
                self._done(request)
            else:
                self._note(candidate, replace(found, state="waiting", why="its files, which are being moved"))
            return
        except OSError as error:
            why = f"room for its pin in {self._directory} ({error.strerror or error}); {write_remedy(error)}"
            self._note(candidate, replace(found, state="waiting", why=why))
            return
        if known is None:
            assert pin is not None
            self._add(candidate, found, request, pin, digest, stamp)
        elif self._entries.items[known].key == key:
            self._entries.change(known, seen=digest)
        elif self._entries.newest(key) is None:
            why = f"it has the files of {self._entries.items[known].name}"
            self._left_out(candidate, found, digest, stamp, why)
        self._done(request)

    def _is_left_out(self, candidate: Candidate, found: Found, digest: str, stamp: str) -> bool:
        """Leave a checkpoint out by --every; returns whether that is so."""
        finished = [entry for entry in self._entries.items if entry.stamp]
        if not len(finished) % self._options.every:
            return False
        self._left_out(candidate, found, digest, stamp, f"--every {self._options.every}")
        return True

    def _left_out(self, candidate: Candidate, found: Found, digest: str, stamp: str, why: str) -> None:
        entry = Entry(candidate.key, "skipped", why, found.step, found.layout, seen=digest, stamp=stamp, chosen=True)
        self._entries.add(entry)
        self._say(entry)

    def _add(
        self, candidate: Candidate, found: Found, request: Request | None, pin: Path, digest: str, stamp: str
    ) -> None:
        """Add a pinned checkpoint, or note that its bytes are known by its name."""
        model = pin if found.adapter is None or found.model is None else found.model.weights
        adapter = None if found.adapter is None else pin
        earlier, bytes_ = self._entries.newest(candidate.key), ""
        if earlier is not None:  # it was written anew, or its times have changed
            bytes_ = bytes_of(str(model), None if adapter is None else str(adapter))
            same = self._entries.with_bytes(bytes_, len(self._entries.items))
            if same is not None and self._entries.items[same].key == candidate.key:
                self._entries.change(same, seen=digest, stamp=stamp)
                pins.remove(pin)
                return
        tags = {} if request is None else request.tags
        entry = Entry(
            candidate.key, "waiting", ITS_TURN, found.step, found.layout, tags, digest, stamp, bytes_, str(pin),
            str(model), None if adapter is None else str(adapter),
        )  # fmt: skip
        self._entries.add(entry)
        self._entries.save()

    def _begin_conversion(self, converter: Converter, candidate: Candidate, found: Found) -> None:
        """Start the conversion of a checkpoint, unless it has failed or another runs."""
        key, running = candidate.key, converter.running
        if key in self._unconverted:
            self._note(candidate, replace(found, why=self._unconverted[key]))
        elif running is not None:
            why = "its conversion" if running.candidate.key == key else "the conversion of another checkpoint"
            self._note(candidate, replace(found, state="waiting", why=why))
        else:
            seen = tree_digest(candidate.path)
            if not self._is_left_out(candidate, found, seen, seen):
                converter.begin(candidate, found, seen)
                self._note(candidate, replace(found, state="waiting", why="its conversion"))

    def _end_conversion(self) -> None:
        """Take the model that a conversion has made."""
        if self._converter is None or (ended := self._converter.ended()) is None:
            return
        conversion, made = ended
        key = conversion.candidate.key
        if made.state != "ready":
            self._unconverted[key] = made.why
            self._note(conversion.candidate, made)
            return
        _, found = self._found.get(str(conversion.candidate.path), (None, made))
        entry = Entry(
            key, "waiting", ITS_TURN, made.step, found.layout, seen=conversion.seen, stamp=conversion.seen,
            pin=str(conversion.to), model=str(conversion.to),
        )  # fmt: skip
        self._entries.add(entry)
        self._entries.save()
