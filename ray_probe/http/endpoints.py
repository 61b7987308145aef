"""The endpoints under /v1 that read."""

from enum import Enum
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Query, Request

from ray_probe.controller.api import ControllerApi
from ray_probe.controller.replies import BetaReply, Followed, MeasurementInfo, Status, Variance
from ray_probe.errors import ConfigError, MissingError, bad_value
from ray_probe.http.answers import Json
from ray_probe.http.models import ResultReply
from ray_probe.run.series import Series

LARGEST = 2**53 - 1
STATE: list[str | Enum] = ["state"]
RESULTS: list[str | Enum] = ["results"]
Id = Annotated[str, Path(max_length=64, description="Id of a measurement, such as m0001.")]
Measurement = Annotated[
    str | None, Query(max_length=64, description="Id; by default the running one, else the newest that was started.")
]
Version = Annotated[int | None, Query(ge=0, le=LARGEST, description="Of the fit; by default the newest.")]
Lines = Annotated[int, Query(ge=1, le=10_000, description="How many of the last.")]
Cursor = Annotated[int, Query(ge=0, le=LARGEST, description="`cursor` of the last answer; 0: all that are kept.")]


def only(*names: str) -> Any:
    """Return a dependency that refuses query parameters of other names, such as typos."""

    async def check(request: Request) -> None:
        for name in request.query_params:
            if name not in names:
                raise ConfigError(bad_value("query", name, f"there is no such parameter; there are {', '.join(names)}"))

    return Depends(check)


def add_state_routes(app: FastAPI, api: ControllerApi) -> None:
    """Add routes that read the state of a service and its fits."""

    @app.get("/v1/status", tags=STATE, response_model=Status)
    def status() -> Json:
        """Return the state of the service or run."""
        return Json(api.status().to_json())

    @app.get("/v1/beta", tags=STATE, response_model=BetaReply, dependencies=[only("version", "measurement")])
    def beta(version: Version = None, measurement: Measurement = None) -> Json:
        """Return a version of the fitted baseline."""
        return Json(api.beta(version, measurement).to_json())

    @app.get("/v1/variance", tags=STATE, response_model=Variance, dependencies=[only("measurement")])
    def variance(measurement: Measurement = None) -> Json:
        """Return variances over whole rounds."""
        return Json(api.variance(measurement).to_json())

    @app.get("/v1/logs", tags=STATE, response_model=list[str], dependencies=[only("measurement", "lines")])
    def logs(measurement: Measurement = None, lines: Lines = 100) -> Json:
        """Return the last lines of a measurement's log, by default the service's own."""
        return Json(list(api.logs(measurement, lines)))


def add_result_routes(app: FastAPI, api: ControllerApi) -> None:
    """Add routes that read measurements and series."""

    @app.get("/v1/results", tags=RESULTS, response_model=list[MeasurementInfo])
    def results() -> Json:
        """Return all measurements, oldest first."""
        return Json([item.to_json() for item in api.results()])

    @app.get("/v1/results/latest", tags=RESULTS, response_model=ResultReply)
    def latest() -> Json:
        """Return the running measurement, else the newest that was started."""
        return Json(ResultReply(*api.measured()).to_json())

    @app.get("/v1/results/{id}", tags=RESULTS, response_model=ResultReply)
    def result(id: Id) -> Json:
        """Return a measurement and its result so far."""
        return Json(ResultReply(*api.measured(id)).to_json())

    @app.get("/v1/results/{id}/progress", tags=RESULTS, response_model=Followed, dependencies=[only("cursor")])
    def progress(id: Id, cursor: Cursor = 0) -> Json:
        """Return a measurement's progress and notes after a cursor, without waiting."""
        return Json(api.follow(id, cursor).to_json())

    @app.get("/v1/series", tags=RESULTS, response_model=list[Series])
    def all_series() -> Json:
        """Return the series of the service's measurements, by name."""
        return Json([one.to_json() for one in api.series()])

    @app.get("/v1/series/{name}", tags=RESULTS, response_model=Series)
    def series(name: Annotated[str, Path(max_length=200, description="Name of a series.")]) -> Json:
        """Return one series."""
        there = {one.name: one for one in api.series()}
        if name not in there:
            raise MissingError(bad_value("SERIES", name, f"no such series; there are {', '.join(there) or 'none yet'}"))
        return Json(there[name].to_json())
