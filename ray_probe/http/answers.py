"""JSON answers, and errors as one line of JSON with an HTTP status."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ray_probe.errors import (
    ClusterError,
    InputError,
    MissingError,
    OutputError,
    ProbeError,
    StateError,
    bad_value,
)
from ray_probe.http.models import ErrorReply

logger = logging.getLogger("ray_probe")
STATUSES: tuple[tuple[type[ProbeError], int], ...] = (
    (MissingError, 404), (StateError, 409), (InputError, 422), (ClusterError, 503), (OutputError, 507),
)  # fmt: skip
"""Status of an error by its type, first match."""
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": text}
    for status, text in {
        400: "The body is no JSON.", 401: "The token is missing.", 403: "The token is wrong.",
        404: "There is no such endpoint, measurement, version or series.",
        409: "The service or the measurement is not in a state that allows this.",
        413: "The body is too large.", 421: "The server does not answer to this host name.",
        422: "A value is wrong.", 429: "Too many writes; see Retry-After.",
        503: "The controller does not answer.",
    }.items()
}  # fmt: skip
"""What OpenAPI says of errors."""
LOG = "internal error; see the server's log in Ray's session directory"


class Json(Response):
    """A JSON document in ASCII, so that any text of a user can be sent."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the bytes of a value of plain JSON types."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_answer(status: int, text: str, headers: Mapping[str, str] | None = None) -> Json:
    """Return the one shape that errors have."""
    return Json({"error": " ".join(text.split())}, status, dict(headers or {}))


def status_of(error: ProbeError) -> int:
    """Return the HTTP status of an error."""
    return next((status for kind, status in STATUSES if isinstance(error, kind)), 500)


def answer_errors(app: FastAPI) -> None:
    """Have an application answer errors in one line."""

    async def of_probe(request: Request, error: Exception) -> Response:
        assert isinstance(error, ProbeError)
        return error_answer(status_of(error), str(error))

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = str(error.detail)
        if error.status_code in (404, 405):
            asked = f"{request.method} {request.scope['path']}"
            text = bad_value("PATH", asked, "there is no such endpoint; see /v1/openapi.json")
        return error_answer(error.status_code, text, error.headers)

    async def of_body(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
        if first["type"] == "json_invalid":
            return error_answer(400, f"body: is no JSON ({first.get('ctx', {}).get('error', first['msg'])}); send JSON")
        field, said = ".".join(place) or str(first["loc"][0]), str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            said = "there is no such key; see /v1/openapi.json"
        if isinstance(first.get("input"), bytes):
            said = "need JSON with the header Content-Type: application/json"
        return error_answer(422, bad_value(field, first.get("input"), said))

    app.add_exception_handler(ProbeError, of_probe)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_body)


def internal_error(error: BaseException) -> Json:
    """Log an error that no code foresaw in one line; returns the client's answer."""
    logger.error("http: %s: %s", type(error).__name__, " ".join(str(error).split()))
    return error_answer(500, LOG)
