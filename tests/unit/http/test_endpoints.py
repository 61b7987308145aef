"""Endpoints give the controller's replies as JSON, and its errors in one line with a status."""

import json
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from support.fake_controller import FIRST, FakeController
from support.replies import a_beta, a_progress, a_status, a_variance, an_info
from support.results import a_result

from ray_probe.controller.replies import BetaReply, Status
from ray_probe.errors import CheckpointError, ClusterError, NoClusterError, OutputError, ProbeError
from ray_probe.http.app import create_app
from ray_probe.http.guard import Access
from ray_probe.run.result import Result

CONTROLLER = FakeController()


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    access = Access(None, frozenset({"localhost"}), writes=1000)
    return create_app(CONTROLLER, None, [], tmp_path_factory.mktemp("static"), access=access)


@pytest.fixture
def controller() -> FakeController:
    CONTROLLER.__init__()  # type: ignore[misc]
    return CONTROLLER


@pytest.fixture
def client(app: FastAPI, controller: FakeController) -> TestClient:
    return TestClient(app, base_url="http://localhost")


def test_queries_give_the_replies_as_json(client: TestClient) -> None:
    expected = {
        "/v1/status": a_status().to_json(),
        "/v1/beta?version=4&measurement=m0003": a_beta().to_json(),
        "/v1/variance": a_variance().to_json(),
        "/v1/results": [an_info().to_json()],
        "/v1/results/m0003": {"info": an_info().to_json(), "result": Result.from_json(a_result()).to_json()},
        "/v1/logs?lines=1": ["two ±"],
    }
    for path, value in expected.items():
        assert client.get(path).json() == value, path
    assert client.get("/v1/results/latest").json() == expected["/v1/results/m0003"]
    assert client.get("/v1/results/m0003/progress?cursor=0").json()["events"] == [vars(a_progress())]
    assert [one["name"] for one in client.get("/v1/series").json()] == ["grpo"]
    assert client.get("/v1/series/grpo").json()["points"][0]["step"] == 5


def test_without_a_token_a_known_host_is_still_wanted(client: TestClient) -> None:
    assert client.get("/v1/status", headers={"Host": "evil.example"}).status_code == 421


def test_replies_read_back_are_equal(client: TestClient) -> None:
    assert Status.from_json(client.get("/v1/status").json()) == a_status()
    assert BetaReply.from_json(client.get("/v1/beta").json()) == a_beta()


@pytest.mark.parametrize(
    ("path", "status", "begins"),
    [
        ("/v1/results/m0009", 404, "ID: got 'm0009'; no such measurement; there are m0003"),
        ("/v1/beta?version=7", 404, "version: got 7; there are versions"),
        ("/v1/series/none", 404, "SERIES: got 'none'; no such series; there are grpo"),
        ("/v1/nothing", 404, "PATH: got 'GET /v1/nothing'; there is no such endpoint; see /v1/openapi.json"),
        ("/v1/scale", 405, "PATH: got 'GET /v1/scale'; "),
        ("/v1/status/", 404, "PATH: "),
        ("/v1/beta?version=x", 422, "version: got 'x'; "),
        ("/v1/beta?version=-1", 422, "version: got '-1'; "),
        ("/v1/beta?verison=1", 422, "query: got 'verison'; there is no such parameter; there are version, measurement"),
        ("/v1/logs?lines=0", 422, "lines: got '0'; "),
        (f"/v1/beta?version={10**30}", 422, "version: got "),
        (f"/v1/results/{'m' * 65}", 422, "id: got 'mmm"),
        ("/v1/events?measurement=m0009", 404, "ID: got 'm0009'"),
    ],
)
def test_a_wrong_question_gets_one_line(client: TestClient, path: str, status: int, begins: str) -> None:
    found = client.get(path)
    assert found.status_code == status
    assert list(found.json()) == ["error"]
    assert found.json()["error"].startswith(begins) and "\n" not in found.json()["error"]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ClusterError("demo: no answer in 20 s"), 503, "demo: no answer in 20 s"),
        (NoClusterError("cluster: its head is gone"), 503, "cluster: its head is gone"),
        (CheckpointError("model.path:\n broken"), 422, "model.path: broken"),
        (OutputError("disk: full"), 507, "disk: full"),
        (ProbeError("odd"), 500, "odd"),
        (RuntimeError("secret\n of the code"), 500, "internal error; see the server's log in Ray's session directory"),
    ],
)
def test_an_error_of_the_controller_has_a_status_and_no_traceback(
    client: TestClient, controller: FakeController, error: Exception, status: int, said: str
) -> None:
    controller.error = error
    for found in (client.get("/v1/status"), client.post("/v1/drain", json={})):
        assert (found.status_code, found.json()) == (status, {"error": said})


def test_a_measurement_is_queued_with_its_place(client: TestClient, controller: FakeController) -> None:
    asked = {
        "checkpoint": "/c/200", "against": "/c/100", "adapter": "/a", "against_adapter": "/b", "prompts": ["x"],
        "snapshot": "link", "settings": {"batch.rounds": 2, "series.name": "grpo", "series.step": 200},
    }  # fmt: skip
    found = client.post("/v1/measurements", json=asked)
    assert (found.status_code, found.headers["Location"]) == (202, "/v1/results/m0004")
    assert found.json()["id"] == "m0004"
    assert controller.asked[0] == ("queue", {
        "model.path": "/c/200", "compare.against": "/c/100", "model.adapter": "/a", "compare.adapter": "/b",
        "data.prompts": ["x"], "model.snapshot": "link", "batch.rounds": 2, "series.name": "grpo", "series.step": 200,
    })  # fmt: skip
    assert client.get(found.headers["Location"]).json()["info"]["checkpoint"] == "/c/200"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"checkpoint": "/nowhere"}, "model.path: got '/nowhere'; there is no such directory; name a checkpoint"),
        ({"chekpoint": "/c"}, "chekpoint: got '/c'; there is no such key; see /v1/openapi.json"),
        ({"checkpoint": 1}, "checkpoint: got 1; "),
        ({"checkpoint": "a\0b"}, "checkpoint: got 'a\\x00b'; text holds a character that no file name can have"),
        ({"settings": {"batch.rounds": "\udc80"}}, "settings: got "),
        ({"settings": {"cluster.actors": 9}}, "settings: got 'cluster.actors'; over HTTP a measurement sets model"),
        ({"settings": {"output.dir": "/"}}, "settings: got 'output.dir'; "),
        ({"settings": {"output.save_gradient": True}}, "settings: got 'output.save_gradient'; "),
        ({"settings": {"notify.command": "x"}}, "settings: got 'notify.command'; "),
        ({"settings": {"metrics.wandb": {}}}, "settings: got 'metrics.wandb'; "),
        ({"settings": {"model.cache_dir": "/x"}}, "settings: got 'model.cache_dir'; "),
        ({"settings": {"model": {"cache_dir": "/x"}}}, "settings: got 'model'; need dotted keys"),
        ({"settings": {"model.path": "/c"}, "checkpoint": "/d"}, "settings.model.path: got '/c'; given as '/d' too"),
        ([], "body: got []; "),
    ],
)
def test_what_cannot_be_measured_is_refused(
    client: TestClient, controller: FakeController, body: Any, said: str
) -> None:
    ascii_only = json.dumps(body).encode()  # with half of a surrogate pair, which has no UTF-8
    found = client.post("/v1/measurements", content=ascii_only, headers={"Content-Type": "application/json"})
    assert found.status_code == 422 and found.json()["error"].startswith(said), found.text
    assert list(controller.items) == [FIRST]


def test_a_body_that_is_no_json_is_refused(client: TestClient) -> None:
    json_type = {"Content-Type": "application/json"}
    broken = client.post("/v1/measurements", content=b'{"a"', headers=json_type)
    assert broken.status_code == 400 and broken.json()["error"].startswith("body: is no JSON (")
    deep = client.post("/v1/measurements", content=b"[" * 200_000, headers=json_type)
    assert deep.status_code in (400, 422)
    plain = client.post("/v1/scale", content=b'{"actors": 2}', headers={"Content-Type": "text/plain"})
    assert plain.status_code == 422 and plain.json()["error"].endswith("header Content-Type: application/json")


def test_a_repeated_request_with_its_key_queues_once(client: TestClient, controller: FakeController) -> None:
    key = {"Idempotency-Key": "one"}
    found = [client.post("/v1/measurements", json={"checkpoint": "/c"}, headers=key) for _ in range(3)]
    assert {(one.status_code, one.headers["Location"]) for one in found} == {(202, "/v1/results/m0004")}
    other = client.post("/v1/measurements", json={"checkpoint": "/d"}, headers=key)
    assert other.status_code == 422 and "take a new key" in other.json()["error"]
    assert client.post("/v1/measurements", json={"checkpoint": "/c"}).headers["Location"] == "/v1/results/m0005"
    assert [call[0] for call in controller.asked].count("queue") == 2


@pytest.mark.parametrize("way", [("DELETE", "/v1/measurements/m0003"), ("POST", "/v1/measurements/m0003/cancel")])
def test_a_measurement_is_cancelled_once(client: TestClient, way: tuple[str, str]) -> None:
    assert client.request(*way).json()["state"] == "cancelled"
    again = client.request(*way)
    assert again.status_code == 409 and "it is cancelled; only what waits or runs" in again.json()["error"]


def test_a_service_is_scaled_and_drained(client: TestClient, controller: FakeController) -> None:
    assert client.post("/v1/scale", json={"actors": 3}).json() == {
        "asked": 3, "alive": 2, "room": 4, "messages": ["requested"],
    }  # fmt: skip
    for actors in (0, 10_000, 1.5, "2", True, None):
        found = client.post("/v1/scale", json={"actors": actors})
        assert found.status_code == 422 and found.json()["error"].startswith(f"actors: got {actors!r}; ")
    assert client.post("/v1/drain", json={"on": True}).json() == {"draining": True}
    assert client.post("/v1/drain", json={"on": False}).json() == {"draining": False}
    assert [call for call in controller.asked if call[0] == "drain"] == [("drain", True), ("drain", False)]


def test_openapi_describes_every_field(client: TestClient) -> None:
    shown = client.get("/v1/openapi.json").json()
    kinds = shown["components"]["schemas"]
    assert {"Status", "MeasurementInfo", "Result", "BetaReply", "Variance", "Series", "Followed"} <= set(kinds)
    missing = [
        (kind, name)
        for kind, schema in kinds.items()
        for name, field in schema.get("properties", {}).items()
        if "description" not in field
    ]
    assert {kind for kind, _ in missing} <= {"BetaReply"}, "its other fields are those of Beta, described there"
    for path, methods in shown["paths"].items():
        for method, found in methods.items():
            assert found["description"] and found["security"] == [{"HTTPBearer": []}], (method, path)
            assert {"401", "403", "404", "503"} <= set(found["responses"]), (method, path)
