"""Queues measurements of pinned checkpoints on a service, and follows them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ray_probe.checkpoints.fingerprint import adapter_fingerprint, fingerprint
from ray_probe.controller.replies import MeasurementInfo, Status
from ray_probe.errors import InputError
from ray_probe.watch import pins
from ray_probe.watch.entries import Entries, Entry

BEHIND = "a newer checkpoint is there (--latest)"
READ_S = 5.0
"""Checkpoints are read, for their fingerprints, for so long between two looks at the directory."""
_OPEN = ("queued", "running")


class ServiceClient(Protocol):
    """What a watch asks of a service."""

    def probe(
        self, checkpoint: str | Path, adapter: str | Path | None = None, *, settings: Mapping[str, Any],
        against: str | Path | None = None, against_adapter: str | Path | None = None,
    ) -> str:  # fmt: skip
        """Queue a measurement of a checkpoint; returns its id."""

    def results(self) -> tuple[MeasurementInfo, ...]:
        """Return all measurements, oldest first."""

    def cancel(self, measurement: str) -> MeasurementInfo:
        """Withdraw a waiting measurement, or stop the running one."""

    def status(self) -> Status:
        """Return the status of the service."""


@dataclass(frozen=True)
class SeriesOptions:
    """What is measured of a series.

    Attributes:
        series: its name.
        gradient: also take the gradient at each checkpoint.
        latest: leave out a checkpoint when a newer one is there.
        responses: a checkpoint's responses a prompt, `batch.responses_per_prompt` of the service; a comparison has as
            many of both. None: not known, and each measurement samples its own.
        settings: of each measurement, by dotted key.
    """

    series: str
    gradient: bool = True
    latest: bool = False
    responses: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def bytes_of(model: str, adapter: str | None) -> str:
    """Return the sha256 over the pinned files of a checkpoint, or of its adapter."""
    return fingerprint(Path(model)) if adapter is None else adapter_fingerprint(Path(adapter))


class Queueing:
    """Queues pinned checkpoints oldest first, each compared with the one before.

    Args:
        entries: of the series.
        client: of the service.
        options: what is measured.
        clock: seconds, never set back.
        say: receives an entry whose state has changed.
    """

    def __init__(
        self, entries: Entries, client: ServiceClient, options: SeriesOptions, clock: Callable[[], float],
        say: Callable[[Entry], None],
    ) -> None:  # fmt: skip
        self._entries, self._client, self._options, self._clock, self._say = entries, client, options, clock, say

    def step(self) -> None:
        """Queue what waits and note what has ended. Raises ClusterError without an answer."""
        waiting = self._waiting()
        if self._options.latest and waiting:
            self._drop(waiting[:-1])
            self._withdraw()
            waiting = waiting[-1:]
        started = self._clock()
        for number in waiting:
            if self._clock() - started > READ_S:  # the next checkpoint may be rotated away meanwhile
                break
            if not self._is_known(number):
                if self._client.status().draining:
                    self._change(number, why="the service, which drains")
                    break
                self._queue(number)
        self._follow()
        self._release()

    @property
    def open(self) -> int:
        """Number of checkpoints that wait for the service or are measured there."""
        queued = [entry for entry in self._entries.items if entry.state == "queued" and entry.measurements]
        return len(self._waiting()) + len(queued)

    def _waiting(self) -> list[int]:
        """Return the numbers of the pinned entries that are not queued, by step."""
        items = self._entries.items
        found = [n for n, entry in enumerate(items) if entry.state == "waiting" and entry.pin is not None]
        return sorted(found, key=lambda n: (items[n].step is None, items[n].step or 0, n))

    def _change(self, number: int, **fields: Any) -> Entry:
        """Replace fields of an entry, on disk too, and say a new state or reason."""
        before = self._entries.items[number]
        changed = self._entries.change(number, **fields)
        self._entries.save()
        if (before.state, before.why) != (changed.state, changed.why):
            self._say(changed)
        return changed

    def _is_known(self, number: int) -> bool:
        """Compute a fingerprint; leaves an entry out where another has its bytes."""
        entry = self._entries.items[number]
        assert entry.model is not None, "it is pinned"
        if not entry.fingerprint:
            entry = self._change(number, fingerprint=bytes_of(entry.model, entry.adapter))
        same = self._entries.with_bytes(entry.fingerprint, number)
        if same is not None:
            self._leave_out(number, f"it has the files of {self._entries.items[same].name}")
        return same is not None

    def _leave_out(self, number: int, why: str, chosen: bool = True, **fields: Any) -> None:
        entry = self._entries.items[number]
        self._change(number, state="skipped", why=why, chosen=chosen, pin=None, **fields)
        if entry.pin is not None:
            pins.remove(entry.pin)

    def _drop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._leave_out(number, BEHIND)

    def _withdraw(self) -> None:
        """Take back the newest checkpoints whose measurements have not begun."""
        states = {info.id: info.state for info in self._client.results()}
        while (number := self._entries.last) is not None:
            entry = self._entries.items[number]
            begun = any(states.get(one) != "queued" for one in entry.measurements)
            if entry.state != "queued" or begun or not entry.measurements:
                return
            for identity in entry.measurements:
                self._client.cancel(identity)
            self._leave_out(number, BEHIND, place=None)

    def _queue(self, number: int) -> None:
        """Queue the measurements of an entry."""
        before, entry = self._entries.last, self._entries.items[number]
        earlier = None if before is None else self._entries.items[before]
        late = earlier is not None and None not in (entry.step, earlier.step) and entry.step < earlier.step  # type: ignore[operator]
        place = None if late else 0 if earlier is None or earlier.place is None else earlier.place + 1
        refused = f"step {earlier.step} was there first" if late and earlier is not None else ""
        fields: dict[str, Any] = {"place": place}
        if earlier is not None and not late:
            try:
                fields |= {"before": before} | self._compared(entry, earlier)
            except InputError as error:
                refused = str(error)
        if self._options.gradient:
            try:
                fields["gradient"] = self._probe(entry, self._of_gradient(place, fields.get("run")))
            except InputError as error:
                refused = str(error)
            else:
                if place is not None and self._options.responses is not None:
                    fields["run"] = self._directory(fields["gradient"])
        if "comparison" in fields or "gradient" in fields:
            self._change(number, state="queued", why=f"not compared: {refused}" if refused else "", **fields)
        elif refused:
            self._leave_out(number, refused, chosen=late)
        else:
            self._change(number, state="queued", why="to be compared with the next", **fields)

    def _compared(self, entry: Entry, earlier: Entry) -> dict[str, Any]:
        """Queue the comparison with an earlier entry; returns the fields about it."""
        assert earlier.place is not None and earlier.model is not None
        settings: dict[str, Any] = {
            "compare.side": earlier.place % 2, "compare.keep_responses": True, "output.save_gradient": False,
            "compare.responses_from": earlier.run,
        }  # fmt: skip
        if self._options.responses is not None:
            settings["batch.responses_per_prompt"] = 2 * self._options.responses
        identity = self._probe(entry, settings, earlier)
        return {"comparison": identity, "run": self._directory(identity)}

    def _of_gradient(self, place: int | None, run: str | None) -> dict[str, Any]:
        """Return the settings of a gradient that shares the responses of comparisons."""
        if self._options.responses is None:
            return {}
        own = {"batch.responses_per_prompt": self._options.responses}
        if place is None:
            return own
        # The service drops the responses of the comparison when they were used, so they are kept again for the next.
        return own | {"compare.side": place % 2, "compare.responses_from": run, "compare.keep_responses": True}

    def _probe(self, entry: Entry, settings: Mapping[str, Any], earlier: Entry | None = None) -> str:
        own = {"series.name": self._options.series, "series.step": entry.step, "series.tags": dict(entry.tags)}
        asked = {**self._options.settings, **settings, **own}
        assert entry.model is not None, "it is pinned"
        against = (None, None) if earlier is None else (earlier.model, earlier.adapter)
        for info in self._client.results():  # it was queued by a watch that died before it noted that
            same = (info.checkpoint, info.adapter, info.against) == (entry.model, entry.adapter, against[0])
            if same and info.state != "cancelled":
                return info.id
        return self._client.probe(
            entry.model, entry.adapter, settings=asked, against=against[0], against_adapter=against[1]
        )

    def _directory(self, identity: str) -> str | None:
        return next((info.directory for info in self._client.results() if info.id == identity), None)

    def _follow(self) -> None:
        """Note which queued entries have ended."""
        items = self._entries.items
        if not any(entry.state == "queued" for entry in items):
            return
        infos = {info.id: info for info in self._client.results()}
        for number, entry in enumerate(items):
            found = [infos[one] for one in entry.measurements if one in infos]
            if entry.state != "queued" or any(info.state in _OPEN for info in found):
                continue
            if len(found) < len(entry.measurements):
                lost = sorted(set(entry.measurements) - infos.keys())
                self._leave_out(number, f"the service has lost {lost[0]}", chosen=False)
            elif found:
                self._ended(number, found)
            else:
                self._compared_later(number)

    def _compared_later(self, number: int) -> None:
        """Note the end of an entry that only the comparison with the next one measures."""
        after = [entry for entry in self._entries.items if entry.before == number]
        if any(entry.state == "measured" for entry in after):
            self._change(number, state="measured", why="")
        elif number != self._entries.last and all(entry.state != "queued" for entry in after):
            self._change(number, state="skipped", why="no comparison with it succeeded")

    def _ended(self, number: int, found: Sequence[MeasurementInfo]) -> None:
        failed = [info for info in found if info.state != "done"]
        code = max(info.exit_code or 0 for info in found)
        if failed:
            why = f"{failed[0].id} {failed[0].state}: {failed[0].cause}"
            self._change(number, state="skipped", why=why, code=code)
        else:
            self._change(number, state="measured", code=code)

    def _release(self) -> None:
        """Remove the pins that no open measurement reads and no next one will."""
        items, last = self._entries.items, self._entries.last
        read = {number for number, entry in enumerate(items) if entry.state in ("queued", "waiting")}
        read |= {entry.before for number, entry in enumerate(items) if number in read and entry.before is not None}
        for number, entry in enumerate(items):
            if entry.pin is not None and number not in read and number != last:
                pins.remove(entry.pin)
                self._entries.change(number, pin=None)
        self._entries.save()
