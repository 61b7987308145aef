"""The HTTP application of a service or run."""

from collections.abc import Iterable
from importlib.resources.abc import Traversable
from pathlib import Path

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer

from ray_probe import __version__
from ray_probe.controller.api import ControllerApi
from ray_probe.http.answers import REFUSALS, Json, answer_errors
from ray_probe.http.endpoints import add_result_routes, add_state_routes
from ray_probe.http.guard import Access, Guard
from ray_probe.http.keys import IdempotencyKeys
from ray_probe.http.page import add_page_routes, packaged
from ray_probe.http.streams import Broadcast
from ray_probe.http.writes import add_event_route, add_write_routes


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
    bearer = HTTPBearer(auto_error=False, description="The token that `ray-probe serve` prints.")
    app = FastAPI(
        title="ray_probe", version=__version__, openapi_url="/v1/openapi.json", docs_url=None, redoc_url=None,
        description="Entropy of a policy's responses, its gradient and its change, with standard errors.",
        redirect_slashes=False, responses=REFUSALS, dependencies=[Security(bearer)],
    )  # fmt: skip
    answer_errors(app)
    if access is None:
        access = Access(token, frozenset({"localhost", *(host.lower() for host in hosts)}))
    app.add_middleware(Guard, access=access)
    # Added to the application itself, as FastAPI builds the routes of a router twice: half a second.
    add_state_routes(app, api)
    add_result_routes(app, api)
    add_write_routes(app, api, IdempotencyKeys(keys))
    add_event_route(app, api, broadcast or Broadcast())
    add_page_routes(app, packaged() if static is None else static)

    @app.get("/healthz", include_in_schema=False)
    async def health() -> Json:
        """Say that the server answers, and nothing else."""
        return Json({"ok": True})

    return app
