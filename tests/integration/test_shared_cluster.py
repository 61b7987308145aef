"""A service on a cluster of `ray start`, beside actors of other programs."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.checkpoints import raw_config
from support.heads import OPEN_HEAD, Head, a_head
from support.shell import Shell

from ray_probe.service import registry

pytestmark = [pytest.mark.cluster, pytest.mark.own_cluster, pytest.mark.timeout(300)]

TRAINER = """
import json, socket, sys
import ray
from ray_probe.errors import ProbeError
from ray_probe.service.client import ProbeClient
here, port = sys.argv[1], sys.argv[1].rsplit(":", 1)[1]
ray.init(address=f"{sys.argv[2]}:{port}", log_to_driver=False, logging_level="ERROR")
SPELLINGS = [None, "auto", here, f"127.0.0.1:{port}", f"localhost:{port}", f"{socket.gethostname()}:{port}"]
def asked(address):
    try:
        with ProbeClient.connect(address) as client:
            return [client.name, client.kind, client.status().name]
    except ProbeError as error:
        return str(error)
class Trainer:
    def ask(self):
        return asked(None)
facts = {
    "driver": [asked(address) for address in SPELLINGS],
    "task": ray.get(ray.remote(num_cpus=0)(lambda: [asked(address) for address in SPELLINGS]).remote()),
    "actor": ray.get(ray.remote(num_cpus=0)(Trainer).remote().ask.remote()),
    "elsewhere": [asked("127.0.0.1:1"), ray.get(ray.remote(num_cpus=0)(asked).remote("127.0.0.1:1"))],
    "connected": ray.is_initialized(),
}
print(json.dumps(facts))
"""

FOREIGN = """
import sys
import ray
from ray_probe.cluster.actors.own_actors import OwnActor
ray.init(address=sys.argv[1], namespace="ray_probe", log_to_driver=False, logging_level="ERROR")
class Foreign:
    def ready(self):
        return True
names = sys.argv[2:]
class Run(Foreign, OwnActor):
    def kind(self):
        return "run"
run = ray.remote(num_cpus=0)(Run).options(name="mine/controller").remote()
kept = [ray.remote(num_cpus=0)(Foreign).options(name=name).remote() for name in names]
ray.get([one.ready.remote() for one in (run, *kept)])
print("ready", flush=True)
for line in sys.stdin:
    print(*[ray.get(one.ready.remote(), timeout=20) for one in kept], flush=True)
"""


class Cluster:
    """The head, a shell and a home directory with a config."""

    def __init__(self, head: Head, home: Path) -> None:
        self.head, self.home = head, home
        self.port = head.address.rsplit(":", 1)[1]
        self.shell = Shell(home, **head.variables)

    @property
    def state(self) -> Path:
        return self.home / "state" / "ray_probe"

    def python(self, code: str, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", code, self.head.address, *arguments], env=self.shell.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    home = tmp_path_factory.mktemp("home")
    raw = raw_config(home, batch={"rounds": 2000}, cluster={"actors": 1})
    (home / "service.yaml").write_text(yaml.safe_dump(raw))
    with a_head(2, OPEN_HEAD, XDG_STATE_HOME=str(home / "state")) as head:
        yield Cluster(head, home)


@pytest.fixture(scope="module")
def service(cluster: Cluster) -> dict[str, Any]:
    up = cluster.shell.ask("up", "service.yaml", "--name", "demo", "--address", f"127.0.0.1:{cluster.port}")
    assert isinstance(up, dict)
    return up


@pytest.fixture(scope="module")
def foreign(cluster: Cluster) -> Iterator["subprocess.Popen[str]"]:
    """Actors of another program, under names of services, and a run's controller; says whether the first live."""
    process = cluster.python(FOREIGN, "taken/controller", "half/rollout-0", "demo/rollout-999", "demo/trainer")
    assert process.stdin and process.stdout
    assert process.stdout.readline() == "ready\n", process.communicate()
    yield process
    process.communicate(timeout=60)


def live(foreign: "subprocess.Popen[str]") -> str:
    assert foreign.stdin and foreign.stdout
    foreign.stdin.write("\n")
    foreign.stdin.flush()
    return foreign.stdout.readline()


def test_a_service_is_registered_and_found_whatever_its_clusters_address_is_called(
    cluster: Cluster, service: dict[str, Any]
) -> None:
    assert not cluster.head.address.startswith("127."), "Ray knows the head by the node's own address"
    assert service["address"] == cluster.head.address
    assert json.loads((cluster.state / "demo.json").read_text())["address"] == cluster.head.address
    hosts = (cluster.head.address.rsplit(":", 1)[0], "localhost", socket.gethostname())
    for trainer in [cluster.python(TRAINER, host) for host in hosts]:
        out, err = trainer.communicate(timeout=120)
        assert trainer.returncode == 0, err
        facts = json.loads(out.splitlines()[-1])
        assert facts["driver"] == [["demo", "service", "demo"]] * 6
        assert facts["task"] == facts["driver"] and facts["actor"] == facts["driver"][0]
        for said in facts["elsewhere"]:
            assert said.startswith("address: got '127.0.0.1:1'; this process is connected to the Ray cluster at")
            assert service["address"] in said and "shutdown" not in said
            assert "ask from another process, for example with `ray-probe COMMAND --json`" in said
        assert facts["connected"], "the trainer keeps its connection"


def test_actors_of_others_under_our_names_are_no_services_and_are_left_alone(
    cluster: Cluster, service: dict[str, Any], foreign: "subprocess.Popen[str]"
) -> None:
    shell, address = cluster.shell, cluster.head.address
    assert shell.ask("results", "--address", address) == [], "of two controllers, one is a service's"
    assert "choose a service or run that is up; the namespace 'ray_probe' has demo, mine" in shell.run(
        "status", "--address", address, code=2
    )
    assert "got 'taken'; choose a service" in shell.run("results", "--address", address, "--run", "taken", code=2)
    assert "it is a run; end it with Ctrl-C" in shell.run("down", "--address", address, "--run", "mine", code=2)
    for name, actor in (("taken", "taken/controller"), ("half", "half/rollout-0")):
        said = shell.run("up", "service.yaml", "--name", name, "--address", address, code=2)
        assert f"--name: got '{name}'; the namespace 'ray_probe' has an actor '{actor}' of another program" in said
    assert "no service of that name is up there" in shell.run("down", "--address", address, "--run", "taken", code=2)
    assert "True True True True" in live(foreign)


def test_a_follower_of_a_service_that_is_taken_down_learns_so_and_others_keep_their_actors(
    cluster: Cluster, service: dict[str, Any], foreign: "subprocess.Popen[str]"
) -> None:
    shell = cluster.shell
    follower = shell.start("probe", str(cluster.home / "model"), "--wait")
    deadline = time.monotonic() + 60
    while not (cluster.home / "runs" / "demo" / "m0001" / "rounds.jsonl").exists():
        assert follower.poll() is None and time.monotonic() < deadline, follower.communicate()
        time.sleep(0.1)
    wrong = cluster.home / "wrong"
    wrong.write_text("0" * 64)
    stranger = Shell(cluster.home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(wrong))
    said = stranger.run("down", "--run", "demo", code=4)
    assert "the cluster refused the token" in said and "'demo' may be up, and stays listed (in " in said
    assert shell.ask("status")["state"] == "measuring"
    shell.run("down", "--run", "demo", "--address", f"localhost:{cluster.port}")
    _, err = follower.communicate(timeout=20)
    assert follower.returncode == 4
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: service 'demo' ") and last.endswith(
        "taken down; m0001 keeps its whole rounds and goes on after `up CONFIG --name demo`"
    )
    assert not (cluster.state / "demo.json").exists()
    assert "nothing is up" in shell.run("status", code=2)
    assert "True True True True" in live(foreign)


def test_a_service_goes_off_the_list_with_its_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(cluster.home / "state"))
    started = "2026-05-01T12:00:00+00:00"
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: the port of a head that has ended
        address = f"127.0.0.1:{held.getsockname()[1]}"
        registry.register(registry.Entry("gone", "service", address, "ray_probe", None, False, "", started))
        said = cluster.shell.run("down", "--run", "gone", code=4)
    assert "'gone' is gone with its cluster, and no longer listed" in said
    assert registry.all_entries() == []
