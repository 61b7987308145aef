"""The endpoints under /v1 that change a service, and its event stream."""

import functools
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from enum import Enum
from typing import Annotated, TypeVar

import anyio
from fastapi import Depends, FastAPI, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent

from ray_probe.controller.api import ControllerApi
from ray_probe.controller.replies import Followed, MeasurementInfo, Scaled
from ray_probe.http.answers import Json
from ray_probe.http.endpoints import LARGEST, Id, only
from ray_probe.http.keys import IdempotencyKeys
from ray_probe.http.models import Draining, DrainRequest, MeasurementRequest, ScaleRequest
from ray_probe.http.streams import Broadcast, measurement_events, service_events

WRITERS = 4
"""Writes at once: a checkpoint's copy may take long, and reads go on meanwhile."""

WRITES: list[str | Enum] = ["writes"]
EVENTS: list[str | Enum] = ["events"]
ResultT = TypeVar("ResultT")
Key = Annotated[
    str | None,
    Header(alias="Idempotency-Key", min_length=1, max_length=200, description="A repetition with it queues nothing."),
]
Measured = Annotated[str | None, Query(max_length=64, description="Id of a measurement to follow to its end.")]
LastId = Annotated[
    int, Header(alias="Last-Event-ID", ge=0, le=LARGEST, description="Of the last event that the client has.")
]


def add_write_routes(app: FastAPI, api: ControllerApi, keys: IdempotencyKeys) -> None:
    """Add routes that queue and cancel measurements, and scale and drain the service."""
    limiter = anyio.CapacityLimiter(WRITERS)

    async def in_turn(write: Callable[[], ResultT]) -> ResultT:
        return await anyio.to_thread.run_sync(write, limiter=limiter)

    @app.post("/v1/measurements", tags=WRITES, status_code=202, response_model=MeasurementInfo)
    async def queue(request: MeasurementRequest, key: Key = None) -> Json:
        """Queue a gradient or, with `against`, a comparison; `Location` is its result."""
        settings = request.by_key()
        identity = await in_turn(lambda: keys.once(key, settings, lambda: api.queue(settings)))
        info, _ = await in_turn(functools.partial(api.measured, identity))
        return Json(info.to_json(), 202, {"Location": f"/v1/results/{identity}"})

    @app.delete("/v1/measurements/{id}", tags=WRITES, response_model=MeasurementInfo)
    async def withdraw(id: Id) -> Json:
        """Withdraw a waiting measurement, or stop the running one after whole rounds."""
        return Json((await in_turn(lambda: api.cancel(id))).to_json())

    @app.post("/v1/measurements/{id}/cancel", tags=WRITES, response_model=MeasurementInfo)
    async def cancel(id: Id) -> Json:
        """Do the same as DELETE, for clients that have no DELETE."""
        return Json((await in_turn(lambda: api.cancel(id))).to_json())

    @app.post("/v1/scale", tags=WRITES, response_model=Scaled)
    async def scale(request: ScaleRequest) -> Json:
        """Ask for this many rollout actors; /v1/status shows when they have started."""
        return Json((await in_turn(lambda: api.scale(request.actors))).to_json())

    @app.post("/v1/drain", tags=WRITES, response_model=Draining)
    async def drain(request: DrainRequest) -> Json:
        """Accept no more measurements and finish the waiting ones, or accept again."""
        await in_turn(lambda: api.drain(request.on))
        return Json(Draining(request.on).to_json())


def add_event_route(app: FastAPI, api: ControllerApi, broadcast: Broadcast) -> None:
    """Add the route of the event stream."""

    def begun(measurement: Measured = None, last_id: LastId = 0) -> Followed | None:
        """Return the first events of a measurement; an error comes before the stream."""
        return None if measurement is None else api.follow(measurement, last_id)

    @app.get("/v1/events", tags=EVENTS, response_class=EventSourceResponse, dependencies=[only("measurement")])
    async def events(
        first: Annotated[Followed | None, Depends(begun)], last_id: LastId = 0
    ) -> AsyncGenerator[ServerSentEvent, None]:
        """Stream events.

        Without `measurement`: `status` about once a second, and `result` when a measurement ends. With it: `progress`
        of that measurement, and `result` at its end. `error` says why there is no news. A client that does not read
        loses its stream, and resumes with `Last-Event-ID`.
        """
        found = service_events(api, broadcast) if first is None else measurement_events(api, broadcast, first, last_id)
        async with aclosing(found) as found:
            async for event in found:
                yield ServerSentEvent(event=event.kind, raw_data=event.data, id=event.id)
