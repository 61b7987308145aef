"""The HTTP application of a service or run."""

from collections.abc import Iterable
from importlib.resources.abc import Traversable
from pathlib import Path

from fastapi import APIRouter, FastAPI, Security
from fastapi.security import HTTPBearer

from ray_probe import __version__
from ray_probe.controller.api import ControllerApi
from ray_probe.http.answers import REFUSALS, Json, answer_errors
from ray_probe.http.endpoints import result_routes, state_routes
from ray_probe.http.guard import Access, Guard
from ray_probe.http.keys import IdempotencyKeys
from ray_probe.http.page import packaged, page_routes
from ray_probe.http.streams import Broadcast
from ray_probe.http.writes import event_routes, measurement_routes

PREFIX = "/v1"


def create_app(
    api: ControllerApi,
    token: str | None,
    hosts: Iterable[str],
    static: Traversable | None = None,
    keys: Path | None = None,
    access: Access | None = None,
    broadcast: Broadcast | None = None,
) -> FastAPI:
    """Return the application of one service or run.

    Args:
        api: of its controller; every method may be called from any thread.
        token: that requests must bear; None: none.
        hosts: names that a request may address, beside localhost.
        static: directory of the page's files; None: those of the package.
        keys: file that keeps idempotency keys over a restart, or None.
        access: limits, with token and hosts of their own; None: the default limits.
        broadcast: pollers of the event streams; None: with the default interval.
    """
    app = FastAPI(
        title="ray_probe", version=__version__, openapi_url=f"{PREFIX}/openapi.json", docs_url=None, redoc_url=None,
        description="Entropy of a policy's responses, its gradient and its change, with standard errors.",
        redirect_slashes=False,
    )  # fmt: skip
    answer_errors(app)
    if access is None:
        access = Access(token, frozenset({"localhost", *(host.lower() for host in hosts)}))
    app.add_middleware(Guard, access=access)

    bearer = HTTPBearer(auto_error=False, description="The token that `ray-probe serve` prints.")
    guarded = APIRouter(prefix=PREFIX, responses=REFUSALS, dependencies=[Security(bearer)])
    guarded.include_router(state_routes(api))
    guarded.include_router(result_routes(api))
    guarded.include_router(measurement_routes(api, IdempotencyKeys(keys)))
    guarded.include_router(event_routes(api, broadcast or Broadcast()))
    app.include_router(guarded)
    app.include_router(page_routes(packaged() if static is None else static))
    app.include_router(_health())
    return app


def _health() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/healthz")
    async def health() -> Json:
        """Say that the server answers, and nothing else."""
        return Json({"ok": True})

    return router
