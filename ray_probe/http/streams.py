"""Event streams: one poller feeds all streams of the same subject.

A stream has a bounded queue. A client that does not read loses its stream, and nothing else waits for it.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, replace

import anyio

from ray_probe.controller.api import ControllerApi
from ray_probe.controller.replies import Followed
from ray_probe.errors import MissingError, ProbeError
from ray_probe.http.answers import Json, internal_error

QUEUED = 64
"""Batches that a stream may be behind."""
POLL_S = 1.0
POLLERS = 8
"""Polls at once; each takes a thread while the controller answers."""


@dataclass(frozen=True)
class Event:
    """An event as it is sent.

    Attributes:
        kind: `status`, `progress`, `result` or `error`.
        data: JSON text, made once for all streams.
        id: for `Last-Event-ID`; None: not to be resumed from.
    """

    kind: str
    data: str
    id: str | None = None


@dataclass(frozen=True)
class Batch:
    """The events of one poll.

    Attributes:
        events: in order.
        since: cursor before them.
        until: cursor after them.
        last: no others follow.
    """

    events: tuple[Event, ...]
    since: int = 0
    until: int = 0
    last: bool = False


Poll = Callable[[], Batch]
"""Returns the events since its last call, in one thread at a time."""


class ServiceEvents:
    """The status about once a second, and a line for each measurement that ends.

    Args:
        api: of the controller.
    """

    def __init__(self, api: ControllerApi) -> None:
        self._api = api
        self._ended: set[str] | None = None
        self._count = -1

    def poll(self) -> Batch:
        """Return the status, and measurements that have ended since the last call."""
        status = self._api.status()
        return Batch((*self._results(status.ended), Event("status", text(status.to_json()))))

    def _results(self, count: int) -> Iterable[Event]:
        if count == self._count:
            return ()
        ended = {item.id: item for item in self._api.results() if item.finished is not None}
        before, self._ended, self._count = self._ended, set(ended), count
        fresh = [] if before is None else [item for item in ended.values() if item.id not in before]
        return [Event("result", text({"id": item.id, "state": item.state})) for item in fresh]


class MeasurementEvents:
    """The progress of one measurement from a cursor to its end.

    Args:
        api: of the controller.
        measurement: id.
        cursor: of the last event that is known.
    """

    def __init__(self, api: ControllerApi, measurement: str, cursor: int) -> None:
        self._api, self._measurement, self._cursor = api, measurement, cursor

    def poll(self) -> Batch:
        """Return progress and notes since the last call; `result` is the last event."""
        found = self._api.follow(self._measurement, self._cursor)
        batch = batch_of(found, self._cursor)
        self._cursor = found.cursor
        return batch


def batch_of(found: Followed, since: int) -> Batch:
    """Return the events of a measurement after a cursor.

    The last of them has the cursor as its id: a client resumes after a batch that it has whole.
    """
    events = [Event("progress", text(vars(one))) for one in found.events]
    if ended := found.info.finished is not None:
        events.append(Event("result", text({"id": found.info.id, "state": found.info.state})))
    if events:
        events[-1] = replace(events[-1], id=str(found.cursor))
    return Batch(tuple(events), since, found.cursor, last=ended)


class Stream:
    """The batches that one client has not received.

    Attributes:
        batches: in order; they end where the client fell behind.
    """

    def __init__(self) -> None:
        self._queue, self.batches = anyio.create_memory_object_stream[Batch](QUEUED)

    def offer(self, batch: Batch) -> bool:
        """Queue a batch; returns false, and closes the stream, where there is no room."""
        try:
            self._queue.send_nowait(batch)
        except (anyio.WouldBlock, anyio.BrokenResourceError):
            self._queue.close()
            return False
        return True

    def close(self) -> None:
        """Release the queue."""
        self._queue.close()
        self.batches.close()


class Broadcast:
    """The pollers, by subject.

    Args:
        poll_s: seconds between two polls.
    """

    def __init__(self, poll_s: float = POLL_S) -> None:
        self._poll_s = poll_s
        self._streams: dict[str, set[Stream]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._limiter = anyio.CapacityLimiter(POLLERS)

    async def follow(self, key: str, poll: Callable[[], Poll]) -> AsyncGenerator[Batch, None]:
        """Yield the batches of a subject; the first client starts its poller.

        Args:
            key: of the subject.
            poll: makes the poll of a new poller.
        """
        stream = Stream()
        if key in self._streams:
            self._streams[key].add(stream)
        else:
            self._streams[key] = {stream}
            task = asyncio.create_task(self._work(key, poll()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            async for batch in stream.batches:
                yield batch
                if batch.last:
                    return
        finally:
            self._streams.get(key, set()).discard(stream)
            stream.close()

    async def once(self, poll: Poll) -> Batch:
        """Return the answer of a poll; an error becomes an event."""
        try:
            return await anyio.to_thread.run_sync(poll, limiter=self._limiter)
        except ProbeError as error:  # the controller may come back
            missing = isinstance(error, MissingError)
            return Batch((Event("error", text({"error": str(error)})),), last=missing)
        except Exception as error:
            return Batch((Event("error", bytes(internal_error(error).body).decode()),), last=True)

    async def _work(self, key: str, poll: Poll) -> None:
        """Poll for the streams of a subject while there are any."""
        streams = self._streams[key]
        try:
            while streams:
                batch = await self.once(poll)
                for stream in [stream for stream in streams if not stream.offer(batch)]:
                    streams.discard(stream)
                if batch.last:
                    return
                await asyncio.sleep(self._poll_s)
        finally:
            del self._streams[key]


async def service_events(api: ControllerApi, broadcast: Broadcast) -> AsyncGenerator[Event, None]:
    """Yield the events of a service."""
    async with aclosing(broadcast.follow("", lambda: ServiceEvents(api).poll)) as batches:
        async for batch in batches:
            for event in batch.events:
                yield event


async def measurement_events(
    api: ControllerApi, broadcast: Broadcast, found: Followed, since: int
) -> AsyncGenerator[Event, None]:
    """Yield the events of a measurement, to its end.

    Args:
        api: of the controller.
        broadcast: with the poller that all streams of the measurement share.
        found: its events after `since`.
        since: cursor of the last event that the client has.
    """
    identity, batch = found.info.id, batch_of(found, since)
    have = batch.until
    for event in batch.events:
        yield event
    if batch.last:
        return
    begun = have
    async with aclosing(
        broadcast.follow(identity, lambda: MeasurementEvents(api, identity, begun).poll)
    ) as batches:
        async for batch in batches:
            if batch.since < have < batch.until or have < batch.since:  # the poller is behind this stream, or before it
                batch = await broadcast.once(MeasurementEvents(api, identity, have).poll)
            for event in batch.events:
                if event.kind != "progress" or batch.until > have:
                    yield event
            if batch.last:
                return
            have = max(have, batch.until)


def text(value: object) -> str:
    """Return the JSON text of a value of plain types."""
    return bytes(Json(value).body).decode("ascii")
