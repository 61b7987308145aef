"""A service on its own head, used from the shell and from Python."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from safetensors.numpy import load_file
from support.adapters import write_adapter
from support.answers import most_actors
from support.checkpoints import raw_config, write_checkpoint, write_shadows
from support.shell import Shell

from ray_probe.config.loading import config_from_dict
from ray_probe.controller.local_backend import LocalBackend
from ray_probe.errors import InputError
from ray_probe.fitter.ledger import read_ledger
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.rollout.builder import build_rollout
from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation.prepare import prepare
from ray_probe.run.preparation.prepared import baseline_rule
from ray_probe.service import registry
from ray_probe.service.client import ProbeClient

pytestmark = [pytest.mark.cluster, pytest.mark.own_cluster, pytest.mark.timeout(240)]
BUSY = 3
"""Limits in seconds are those of a machine at rest; where other work runs beside the tests, all takes longer."""

LONG = 2000  # rounds of a measurement that a test ends itself


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def raw(shell: Shell) -> dict[str, Any]:
    raw = raw_config(shell.home, batch={"rounds": 3}, cluster={"actors": 1, "max_actors": 3})
    (shell.home / "service.yaml").write_text(yaml.safe_dump(raw))
    write_shadows(shell.home)
    return raw


@pytest.fixture(scope="module")
def service(shell: Shell, raw: dict[str, Any]) -> Iterator[dict[str, Any]]:
    up = shell.ask("up", "service.yaml", "--name", "demo")
    try:
        yield up
    finally:
        shell.run("down", "--run", "demo")


@pytest.fixture
def client(shell: Shell, service: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[ProbeClient]:
    monkeypatch.setenv("XDG_STATE_HOME", str(shell.home / "state"))
    with ProbeClient.connect() as client:
        yield client


def until(found: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not come to that in time")


def reference(raw: dict[str, Any], directory: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """The result of the same measurement in this process, without Ray."""
    config = config_from_dict({**raw, **{name: {**raw.get(name, {}), **values} for name, values in sections.items()}})
    prepared = prepare(config)
    run = RunDirectory.create(directory, "reference")
    rollout = build_rollout(prepared.config, prepared.checkpoint.directory, prepared.policy_id)
    backend = LocalBackend([rollout], baseline_rule(prepared.config), prepared.policy_id, run)
    return OfflineEntropyProbe(prepared.config, prepared.plan, backend, run).run().to_json()


def assert_same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    """The answer of the same measurement undisturbed: beta to the bit, the gradient to rounding."""
    assert result["beta"] == expected["beta"]
    uncounted = {"actors": 1, "shards_retried": 0}
    assert result["counts"] | uncounted == expected["counts"] | uncounted
    assert result["entropy"] == expected["entropy"]
    assert result["gradient"]["norm_raw"] == pytest.approx(expected["gradient"]["norm_raw"], rel=1e-5)
    assert result["partial"] is False and result["conflicts"] == []


@pytest.mark.timeout(300)  # some twenty commands, a process each
def test_the_life_of_a_service_as_the_readme_shows_it(
    shell: Shell, service: dict[str, Any], raw: dict[str, Any], tmp_path: Path
) -> None:
    assert service["name"] == "demo" and service["address"].startswith("127.0.0.1:")
    result = shell.ask("probe", raw["model"]["path"], "--wait")
    expected = reference(raw, tmp_path)
    assert result["beta"] == expected["beta"], "a service in the place of a run gives the same bits"
    assert result["gradient"]["norm_raw"] == pytest.approx(expected["gradient"]["norm_raw"], rel=1e-5)
    status = shell.ask("status")
    assert (status["state"], status["actors_asked"], status["actors_alive"], status["ended"]) == ("idle", 1, 1, 1)
    before = status["actors"][0]["pid"]
    assert shell.ask("scale", 2)["alive"] == 2
    assert shell.ask("beta")["values"] == result["beta"]["values"]
    assert [shell.ask("beta", "--version", version)["version"] for version in (1, 3)] == [1, 3]
    assert shell.ask("variance")["advantage_mean_square"] == result["advantage_mean_square"]
    assert shell.ask("scale", 1)["alive"] == 1
    second = write_checkpoint(shell.home / "second", seed=3)
    other = shell.ask("probe", second, "--wait")
    assert other["config"]["model"]["path"] == str(second) and other["beta"] != result["beta"]
    assert shell.ask("status")["actors"][0]["pid"] == before, "the checkpoint was swapped into the live actor"
    listed = shell.ask("results")
    assert [(item["id"], item["state"], item["rounds"]) for item in listed] == [
        ("m0001", "done", 3),
        ("m0002", "done", 3),
    ]
    assert shell.ask("results", "m0001") == result
    for command in (["status"], ["beta"], ["variance"], ["results"], ["results", "m0001"], ["logs", "m0001"], ["logs"]):
        assert len(shell.run(*command).splitlines()) >= 3, command
    assert "a service of that name is up" in shell.run("up", "service.yaml", "--name", "demo", code=2)
    assert "there is demo (service)" in shell.run("status", "--run", "dmeo", code=2)
    assert "there are m0001, m0002" in shell.run("results", "m0009", code=2)
    broken = write_checkpoint(shell.home / "broken", seed=4)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-64])
    assert "model.safetensors is truncated" in shell.run("probe", broken, code=2)


def test_scaling_in_mid_measurement_leaves_the_same_bits(
    client: ProbeClient, raw: dict[str, Any], tmp_path: Path
) -> None:
    identity = client.probe(raw["model"]["path"], settings={"batch.rounds": LONG})
    until(lambda: client.status().measurement)
    run = RunDirectory(Path(client.result(identity)[0].directory))
    for actors in (2, 1):
        assert client.scale(actors).asked == actors
        until(lambda wanted=actors: client.status().actors_alive == wanted)  # type: ignore[misc]
        until(lambda: most_actors(run) == 2)
    assert client.cancel(identity).state == "running", "it was scaled in mid-measurement"
    until(lambda: client.result(identity)[0].finished)
    _, result = client.result(identity)
    assert result is not None
    expected = reference(raw, tmp_path, batch={"rounds": result["counts"]["rounds"]})
    assert result["beta"] == expected["beta"]
    assert result["counts"] | {"actors": 1} == expected["counts"] | {"actors": 1}
    assert result["gradient"]["norm_raw"] == pytest.approx(expected["gradient"]["norm_raw"], rel=1e-5)


def test_an_actor_that_dies_during_a_probe_costs_a_retry(
    client: ProbeClient, raw: dict[str, Any], tmp_path: Path
) -> None:
    identity = client.probe(raw["model"]["path"], settings={"batch.rounds": 6})
    until(lambda: client.result(identity)[0].rounds >= 1)
    (actor,) = client.status().actors
    assert actor.pid is not None
    os.kill(actor.pid, signal.SIGKILL)
    result = client.wait(identity)
    assert result["beta"] == reference(raw, tmp_path, batch={"rounds": 6})["beta"]
    after = client.status()
    assert after.last_failure is not None and after.actors[0].pid != actor.pid
    assert f"process {actor.pid} on node {actor.node}" in after.last_failure
    assert "memory" in after.last_failure and "words" in after.last_failure


def test_an_adapter_is_measured_by_its_own_parameters(
    client: ProbeClient, shell: Shell, raw: dict[str, Any], tmp_path: Path
) -> None:
    adapter = write_adapter(shell.home / "adapter", Path(raw["model"]["path"]))
    settings = {"model.trainable": "adapter", "output.save_gradient": True}
    identity = client.probe(raw["model"]["path"], adapter=adapter, settings=settings)
    result = client.wait(identity)
    info, _ = client.result(identity)
    assert info.adapter == str(adapter)
    gradient = load_file(Path(info.directory) / "gradient.safetensors")
    assert gradient and all("lora_" in name for name in gradient)
    model = {"adapter": str(adapter), "trainable": "adapter"}
    expected = reference(raw, tmp_path, model=model, output={"save_gradient": True})
    assert result["beta"] == expected["beta"]
    alone = load_file(tmp_path / "reference" / "gradient.safetensors")
    assert all(np.allclose(gradient[name], alone[name], rtol=1e-5, atol=1e-7) for name in alone)


def test_a_snapshot_is_measured_when_its_directory_is_gone_and_what_was_overwritten_is_not(
    client: ProbeClient, shell: Shell, raw: dict[str, Any], tmp_path: Path
) -> None:
    running = client.probe(raw["model"]["path"], settings={"batch.rounds": LONG})
    until(lambda: client.result(running)[0].rounds >= 1)
    latest = write_checkpoint(shell.home / "latest", seed=30)
    unpinned = client.probe(latest)
    linked = shell.ask("probe", latest, "--snapshot")["id"]
    shutil.rmtree(latest)
    write_checkpoint(latest, seed=31)
    copied = shell.ask("probe", latest, "--snapshot-copy")["id"]
    shutil.rmtree(latest)
    client.cancel(running)
    with pytest.raises(InputError, match=r"model\.path: got .*have changed since it was queued at .*--snapshot$"):
        client.wait(unpinned)
    for identity, seed in ((linked, 30), (copied, 31)):
        step = write_checkpoint(tmp_path / f"step-{seed}", seed=seed)
        (tmp_path / str(seed)).mkdir()
        assert_same(client.wait(identity), reference(raw, tmp_path / str(seed), model={"path": str(step)}))
    directory = Path(client.status().directory)
    until(lambda: not list((directory / "pins").iterdir()))

    (actor,) = client.status().actors
    assert actor.pid is not None
    os.kill(actor.pid, signal.SIGKILL)
    until(lambda: [a.state for a in client.status().actors if a.number != actor.number] == ["no checkpoint"])
    assert (client.status().state, client.status().problem) == ("idle", None), "what was measured last is gone"
    assert client.wait(client.probe(raw["model"]["path"]))["counts"]["rounds"] == 3


def test_scaling_past_the_means_of_the_cluster_says_what_will_happen(client: ProbeClient) -> None:
    scaled = client.scale(9)
    try:
        assert scaled.asked == 9 and scaled.room == 3
        assert any("9" in line and "3" in line for line in scaled.messages)
        until(lambda: client.status().actors_alive == 3)
        status = client.status()
        assert (status.actors_asked, status.actors_alive) == (9, 3) and status.problem is None
    finally:
        client.scale(1)
    until(lambda: client.status().actors_alive == 1)


def test_a_connected_client_is_answered_at_once_and_under_load(client: ProbeClient, raw: dict[str, Any]) -> None:
    def seconds(ask: Callable[[], Any]) -> float:
        started = time.monotonic()
        ask()
        return time.monotonic() - started

    identity = client.probe(raw["model"]["path"], settings={"batch.rounds": LONG})
    until(lambda: client.result(identity)[0].rounds >= 1)
    slowest = max(seconds(ask) for ask in (client.status, client.beta, client.variance) for _ in range(5))
    assert slowest <= 5.0
    beta, variance = client.beta(), client.variance()
    assert beta.version >= 1 and set(variance.in_sample) == {"none", "constant", "residual_mu", "regression"}
    assert client.cancel(identity).state == "running"
    assert until(lambda: client.result(identity)[0].finished and client.result(identity)[0].state) == "cancelled"


def test_everything_of_ours_listens_on_loopback_and_wants_the_token(
    shell: Shell, service: dict[str, Any], tmp_path: Path
) -> None:
    entry = json.loads((shell.home / "state" / "ray_probe" / "demo.json").read_text())
    ours = {entry["pid"], *(child.pid for child in psutil.Process(entry["pid"]).children(recursive=True))}
    listening = [c.laddr for c in psutil.net_connections("inet") if c.status == "LISTEN" and c.pid in ours]
    assert len(listening) >= 4
    assert {address.ip for address in listening} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    for token in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(wrong)}):
        stranger = Shell(tmp_path)
        stranger.environment |= token
        started = time.monotonic()
        said = stranger.run("status", "--address", entry["address"], code=4)
        assert "refused the token" in said and time.monotonic() - started < 5 * BUSY
    secret = Path(entry["token_path"]).read_text()
    assert len(secret) >= 32
    for path in (Path(entry["token_path"]), shell.home / "state" / "ray_probe" / "demo.json"):
        assert path.stat().st_mode & 0o777 == 0o600
    for path in (shell.home / "state" / "ray_probe", Path(service["directory"]), Path(entry["token_path"]).parent):
        assert path.stat().st_mode & 0o777 == 0o700
    assert not any(secret in text for text in shell.said)
    for process in psutil.process_iter(["cmdline"]):
        assert not any(secret in word for word in process.info["cmdline"] or ())
    logs = [*Path(service["directory"]).rglob("*.log"), *Path(service["directory"]).rglob("*.txt")]
    logs += [path for path in Path(entry["token_path"]).parent.rglob("*") if path.is_file() and "log" in str(path)]
    assert logs and not any(secret in path.read_text(errors="replace") for path in logs)


def test_a_killed_controller_comes_back_from_disk_and_finishes(
    client: ProbeClient, raw: dict[str, Any], tmp_path: Path
) -> None:
    identity = client.probe(raw["model"]["path"], settings={"batch.rounds": 10})
    until(lambda: client.result(identity)[0].rounds >= 2)
    pid = client.pid()
    os.kill(pid, signal.SIGKILL)

    def finished() -> Any:
        try:
            return client.result(identity)[0].finished
        except Exception:
            return None

    until(finished, 90)
    info, result = client.result(identity)
    assert result is not None and result["counts"]["rounds"] == 10
    assert client.pid() != pid
    assert_same(result, reference(raw, tmp_path, batch={"rounds": 10}))
    records = read_ledger(RunDirectory.open(Path(info.directory)).ledger).records
    assert sorted(records) == [(number, shard) for number in range(10) for shard in range(6)]


def test_twenty_checkpoints_one_after_another_in_the_same_actor_and_memory(client: ProbeClient, shell: Shell) -> None:
    def seen() -> tuple[tuple[int, int | None], ...]:
        return tuple((actor.number, actor.pid) for actor in client.status().actors)

    actors, resident = seen(), []
    pids = [pid for _, pid in actors if pid is not None]
    for step in range(20):
        checkpoint = write_checkpoint(shell.home / "steps", seed=100 + step)  # as a trainer that keeps one directory
        identity = client.probe(checkpoint, settings={"batch.rounds": 1})
        assert client.wait(identity)["counts"]["rounds"] == 1
        resident.append(sum(psutil.Process(pid).memory_info().rss for pid in pids))
    assert seen() == actors, "no actor was started anew"
    assert max(resident[4:]) <= 1.05 * resident[4]
    policies = {client.beta(measurement=item.id).policy_id for item in client.results()[-20:]}
    assert len(policies) == 20


def heads_of(shell: Shell) -> set[int]:
    """The processes of heads that its commands have started; other tests start theirs meanwhile."""
    return {
        process.pid
        for process in psutil.process_iter(["cmdline", "environ"])
        if (process.info["environ"] or {}).get("HOME") == str(shell.home)
        and any("ray_probe.cluster.head" in word for word in process.info["cmdline"] or ())
    }


def test_an_actor_that_cannot_start_ends_up_with_its_cause_and_leaves_nothing(
    shell: Shell, service: dict[str, Any]
) -> None:
    before = heads_of(shell)
    assert before, "that of the service"
    too_much = ("--set", "generation.tf_batch_size=2000000000", "--set", "generation.tf_batch_tokens=2000000000")
    said = shell.run("up", "service.yaml", "--name", "large", *too_much, code=4)
    assert "memory: an actor needs" in said and "model.trainable: adapter" in said
    assert "nothing of that name is up" in shell.run("status", "--run", "large", code=2)
    assert heads_of(shell) == before


@pytest.mark.slow  # another `up`; tests/unit/controller holds what the controller does with what it finds
def test_a_lost_head_is_followed_by_an_up_that_goes_on_to_the_same_bits(
    shell: Shell, service: dict[str, Any], raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(shell.home / "state"))
    with ProbeClient.connect() as client:
        ended = client.status().ended
        identity = client.probe(raw["model"]["path"], settings={"batch.rounds": LONG})
        until(lambda: client.result(identity)[0].rounds >= 1)
    (entry,) = registry.entries()
    assert entry.pid is not None
    children = psutil.Process(entry.pid).children(recursive=True)
    os.kill(entry.pid, signal.SIGKILL)
    psutil.wait_procs(children, 30)
    assert "'demo' has lost its head" in shell.run("status", code=2)
    before = len(RunDirectory.open(Path(service["directory"]) / identity).finished_rounds())
    assert shell.ask("up", "service.yaml", "--name", "demo")["going_on"] == 1
    with ProbeClient.connect() as client:
        until(lambda: client.result(identity)[0].rounds > before)
        assert client.status().ended == ended
        client.cancel(identity)
        until(lambda: client.result(identity)[0].finished)
        _, result = client.result(identity)
        assert result is not None and result["counts"]["rounds"] > before >= 1
        assert_same(result, reference(raw, tmp_path, batch={"rounds": result["counts"]["rounds"]}))
        assert client.probe(raw["model"]["path"]) == f"m{ended + 2:04d}", "ids count on"
