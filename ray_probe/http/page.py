"""The files of the live page."""

from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import Response

PAGE = ("page", "static")
INDEX = "index.html"
KINDS = {
    "html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml", "png": "image/png", "txt": "text/plain; charset=utf-8", "json": "application/json",
}  # fmt: skip
"""Media type by the end of a file's name; others are not served."""


def packaged() -> Traversable:
    """Return the directory of the page in the installed package."""
    return files("ray_probe").joinpath(*PAGE)


def add_page_routes(app: FastAPI, static: Traversable) -> None:
    """Add routes of the page: index.html at the root, other files under /static.

    Args:
        app: the application.
        static: directory of the files.
    """

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return _file(static, INDEX)

    @app.get("/static/{name:path}", include_in_schema=False)
    def file(name: str) -> Response:
        return _file(static, name)


def _file(static: Traversable, name: str) -> Response:
    parts, kind = name.split("/"), KINDS.get(name.rpartition(".")[2])
    plain = all(part and not part.startswith(".") and "\\" not in part and "\0" not in part for part in parts)
    found = static.joinpath(*parts) if plain and kind is not None else None
    if found is None or not found.is_file():
        raise HTTPException(404)
    return Response(found.read_bytes(), media_type=kind, headers={"Cache-Control": "no-cache"})
