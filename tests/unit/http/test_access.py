"""No request without the token, to another host, or too large or too frequent, reaches an endpoint."""

from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from support.fake_controller import FakeController

from ray_probe.http.answers import Json
from ray_probe.http.app import create_app
from ray_probe.http.guard import Access, Guard, WriteRate

TOKEN = "a-token"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD")


def page(directory: Path) -> Path:
    (directory / "vendor").mkdir()
    (directory / "index.html").write_text("<!doctype html><title>page</title>")
    (directory / "app.js").write_text("1;")
    (directory / "vendor" / "plot.css").write_text("a {}")
    (directory / ".secret.js").write_text("2;")
    (directory / "secret.py").write_text("3")
    return directory


CONTROLLER = FakeController()


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    hosts = frozenset({"localhost", "127.0.0.1", "probe.example"})
    static = page(tmp_path_factory.mktemp("static"))
    return create_app(CONTROLLER, TOKEN, [], static, access=Access(TOKEN, hosts, writes=1000))


@pytest.fixture
def controller() -> FakeController:
    CONTROLLER.__init__()  # type: ignore[misc]
    return CONTROLLER


@pytest.fixture
def client(app: FastAPI, controller: FakeController) -> TestClient:
    return TestClient(app, base_url="http://localhost:4321")


def paths(app: FastAPI) -> list[str]:
    """Every path that OpenAPI shows, with the file of OpenAPI itself and paths that do not exist."""
    shown = [path.replace("{id}", "m0003").replace("{name}", "grpo") for path in app.openapi()["paths"]]
    assert len(shown) >= 16
    others = ["/v1/openapi.json", "/v1/nothing", "/v1", "/docs", "/metrics", "/static", "/index.html", "/healthz/x"]
    return [*shown, *others]


def test_every_path_but_the_open_ones_wants_the_token(app: FastAPI, client: TestClient, controller: Any) -> None:
    for path in paths(app):
        for method in METHODS:
            missing = client.request(method, path)
            wrong = client.request(method, path, headers={"Authorization": "Bearer a-tokem"})
            assert (missing.status_code, wrong.status_code) == (401, 403), (method, path)
            assert missing.headers["WWW-Authenticate"] == "Bearer"
    assert controller.asked == [], "nothing reached the controller"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (f"bearer {TOKEN}", 200), (f"Bearer  {TOKEN} ", 200), ("Bearer", 401), ("Bearer ", 401), ("", 401),
        (TOKEN, 401), (f"Basic {TOKEN}", 401), (f"Bearer {TOKEN}x", 403), ("Bearer tökén", 403),
    ],
)  # fmt: skip
def test_a_token_is_sent_as_a_bearer(client: TestClient, sent: str, status: int) -> None:
    assert client.get("/v1/status", headers={"Authorization": sent.encode("latin-1")}).status_code == status


def test_refusals_are_constant_and_name_the_remedy(client: TestClient) -> None:
    answers = {client.get(path).text for path in ("/v1/status", "/v1/results/m0003", "/nothing")}
    assert answers == {'{"error":"Authorization: missing; send the header `Authorization: Bearer TOKEN`"}'}
    wrong = {client.get("/v1/status", headers={"Authorization": f"Bearer {one}"}).text for one in ("x", "a-toke")}
    assert wrong == {'{"error":"Authorization: wrong token; `ray-probe serve` prints the right one"}'}


def test_the_page_and_the_health_are_open(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"ok": True}
    assert client.get("/").text.startswith("<!doctype html>")
    assert client.get("/static/app.js").headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert client.get("/static/vendor/plot.css").text == "a {}"


@pytest.mark.parametrize(
    "name",
    ["", "nothing.js", ".secret.js", "secret.py", "vendor", "%2e%2e/x.js", 
     "..%2fapp.js", "/app.js", "vendor//plot.css", "a%00.js", "vendor\\plot.css", "index"],
)  # fmt: skip
def test_nothing_else_is_served_as_a_file(client: TestClient, name: str) -> None:
    assert client.get(f"/static/{name}").status_code in (404, 401)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "LOCALHOST:80", "127.0.0.1:9", "probe.example:1"])
def test_a_request_to_a_known_host_is_answered(client: TestClient, host: str) -> None:
    assert client.get("/v1/status", headers=BEARER | {"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "127.0.0.2", "", "[::1]:80", "localhost."])
@pytest.mark.parametrize("path", ["/v1/status", "/", "/healthz", "/static/app.js"])
def test_a_request_to_another_host_is_refused_everywhere(client: TestClient, host: str, path: str) -> None:
    found = client.get(path, headers=BEARER | {"Host": host})
    assert found.status_code == 421 and found.json()["error"].startswith("Host: got ")


@pytest.mark.parametrize("path", ["/", "/healthz", "/static/app.js", "/v1/status", "/v1/nothing", "/v1/results/m9"])
@pytest.mark.parametrize("headers", [BEARER, {}, {"Host": "evil.example"}])
def test_every_answer_has_the_headers_of_security(client: TestClient, path: str, headers: dict[str, str]) -> None:
    found = client.get(path, headers=headers | {"Origin": "http://evil.example"}).headers
    policy = found["Content-Security-Policy"]
    for part in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'",
                 "img-src 'self' data:", "frame-ancestors 'none'"):  # fmt: skip
        assert part in policy.split("; ")
    assert found["X-Content-Type-Options"] == "nosniff" and found["Referrer-Policy"] == "no-referrer"
    assert not [name for name in found if name.lower().startswith("access-control")], "no CORS"
    assert (found.get("Cache-Control") == "no-store") is path.startswith("/v1/")
    assert "server" not in found


def test_a_preflight_of_another_origin_is_refused(client: TestClient) -> None:
    asks = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert client.options("/v1/measurements", headers=asks).status_code == 401
    assert client.options("/v1/measurements", headers=asks | BEARER).status_code == 405


def test_a_giant_body_is_refused_before_it_is_read(client: TestClient, controller: FakeController) -> None:
    sized = client.post("/v1/measurements", headers=BEARER, json={"prompts": ["x" * 1_000_000]})

    def chunks() -> Any:
        for _ in range(100):
            yield b"x" * 100_000

    unsized = client.post("/v1/measurements", headers=BEARER, content=chunks())
    wrong = client.post("/v1/measurements", headers=BEARER | {"Content-Length": "many"}, content=b"{}")
    for found in (sized, unsized, wrong):
        assert found.status_code == 413 and found.json()["error"].startswith("body: larger than 1000000 bytes; ")
    assert controller.asked == []
    assert client.post("/v1/measurements", headers=BEARER, json={"prompts": ["x" * 900_000]}).status_code == 202


def test_writes_are_limited_and_reads_are_not() -> None:
    guard = Guard(Json({}), Access(TOKEN, frozenset({"localhost"})))
    client = TestClient(guard, base_url="http://localhost")
    found = [client.post("/v1/drain", headers=BEARER, json={}).status_code for _ in range(35)]
    assert found[:30] == [200] * 30 and 429 in found
    refused = client.post("/v1/drain", headers=BEARER, json={})
    assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
    assert "more than 2 writes a second; try again in 0." in refused.json()["error"]
    assert client.post("/v1/drain", json={}).status_code == 401, "a request without token is no write"
    assert client.get("/v1/status", headers=BEARER).status_code == 200


def test_a_bucket_of_writes_fills_up_again() -> None:
    now = [0.0]
    rate = WriteRate(2, 0.5, lambda: now[0])
    assert [rate.wait_s() for _ in range(3)] == [0.0, 0.0, 2.0]
    now[0] = 1.0
    assert rate.wait_s() == 1.0
    now[0] = 100.0
    assert [rate.wait_s() for _ in range(3)] == [0.0, 0.0, 2.0]
