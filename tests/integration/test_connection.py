"""Connecting refuses soon and in one line; a Ray started here leaves nothing.

Ray keeps state in its process, so every test that connects does so in a Python of its own.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from support.heads import Head, a_head

from ray_probe.cluster.connection.addresses import find_address
from ray_probe.cluster.connection.connect import Demand, check_room, connected, shortfall, slots_warning
from ray_probe.cluster.connection.join_check import check_joinable, version_mismatch
from ray_probe.cluster.head.auth_token import require_token
from ray_probe.cluster.head.environment import env_to_join, env_to_start
from ray_probe.errors import ClusterError, ConfigError

TOKEN = "0123456789abcdef" * 4
BUSY = 3
"""Limits in seconds are those of a machine at rest; where other work runs beside the tests, all takes longer."""
ONE = Demand(actors=1, cpus_per_actor=1, gpus_per_actor=0, resources={}, slots=1)
OURS = ("2.60.0", "3.11.7")


def demand(actors: int = 2, cpus: float = 1, gpus: float = 0, slots: int = 2, **resources: float) -> Demand:
    return Demand(actors, cpus, gpus, resources, slots)


@pytest.fixture
def no_ray_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home directory of its own and none of the user's RAY_* variables."""
    for name in [n for n in os.environ if n.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


# Decisions, without a cluster


def test_slots_past_the_cores_are_warned_of() -> None:
    assert slots_warning(demand(slots=4, cpus=0.5), cores=2) is None
    warning = slots_warning(demand(slots=4), cores=2)
    assert warning is not None and "4 slots x 1 CPU" in warning and "2 cores" in warning


def test_a_demand_that_fits_is_no_shortfall() -> None:
    assert shortfall(demand(actors=3), [{"CPU": 2}, {"CPU": 1}]) is None
    assert shortfall(demand(actors=3, cpus=0.1), [{"CPU": 0.3}]) is None
    assert shortfall(demand(actors=0, gpus=1), []) is None


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (demand(gpus=1), "cluster.gpus_per_actor: asked 2 x 1 GPU, the cluster has 0"),
        (demand(actors=5), "cluster.cpus_per_actor: asked 5 x 1 CPU, the cluster has 4"),
        (demand(fast_disk=1), "cluster.resources: asked 2 x 1 fast_disk, the cluster has 0"),
        (demand(cpus=2, actors=1), None),
        (demand(cpus=1.5), None),
        (demand(cpus=3, actors=1), "cluster.actors: asked 1 x (3 CPU), and the 2 node(s) have room for 0"),
    ],
)
def test_a_shortfall_names_what_was_asked_and_what_is_there(asked: Demand, words: str | None) -> None:
    found = shortfall(asked, [{"CPU": 2}, {"CPU": 2}])
    assert found is None if words is None else found is not None and found.startswith(words)


@pytest.mark.parametrize(
    ("theirs", "level", "same"),
    [
        ({"ray_version": "2.60.0", "python_version": "3.11.7"}, "patch", True),
        ({"ray_version": "2.59.1", "python_version": "3.11.7"}, "patch", False),
        ({"ray_version": "2.60.0", "python_version": "3.12.1"}, "patch", False),
        ({"ray_version": "2.60.0", "python_version": "3.11.9"}, "patch", False),
        ({"ray_version": "2.60.0", "python_version": "3.11.9"}, "minor", True),
        ({}, "patch", False),
    ],
)
def test_a_version_mismatch_names_both_sides(theirs: dict[str, str], level: str, same: bool) -> None:
    found = version_mismatch(theirs, OURS, level)
    assert (found is None) == same
    for version in [] if found is None else [*theirs.values(), *OURS]:
        assert version in str(found)


@pytest.mark.parametrize("address", ["ray://h:1", "http://h:8265", "h", "h:0", "h:70000", "local", ":6379", "a b:1"])
def test_an_address_of_another_kind_is_a_config_error(address: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.address: got"):
        find_address(address)


def test_auto_is_ray_address_or_the_note_of_ray_start_and_nothing_else(
    no_ray_variables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(no_ray_variables))
    with pytest.raises(ClusterError, match="'auto'"):
        find_address("auto")
    (no_ray_variables / "ray").mkdir()
    (no_ray_variables / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379")
    assert find_address("auto") == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert find_address("auto") == "10.0.0.2:6379"
    assert find_address("[::1]:6379") == "[::1]:6379"


def test_what_the_user_said_about_tokens_stands(no_ray_variables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert env_to_start("/tmp/x")["RAY_AUTH_TOKEN_PATH"] == "/tmp/x/token"
    assert env_to_join("auto", None) == {}
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert "RAY_AUTH_TOKEN_PATH" not in env_to_start("/tmp/x")
    assert env_to_join("auto", None) == {"RAY_AUTH_MODE": "token"}
    assert env_to_join("h:1", None) == {}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "RAY_AUTH_MODE" not in env_to_start("/tmp/x")


def test_token_mode_without_a_token_is_refused_before_ray_aborts(
    no_ray_variables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_token("h:1")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ClusterError, match="no readable token"):
        require_token("h:1")


# Nothing there


def test_an_unreachable_port_is_told_within_3_s() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can take it
        address = f"127.0.0.1:{held.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(ClusterError, match="no Ray cluster answers there") as refusal:
            check_joinable(address)
    assert time.monotonic() - start < 3
    assert address in str(refusal.value) and "\n" not in str(refusal.value)


class Silent:
    """Takes what comes in, and says nothing."""

    words = b""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._taken: list[socket.socket] = []
        self._socket.settimeout(30)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._taken.append(self._socket.accept()[0])
                self.answer(self._taken[-1])

    def answer(self, caller: socket.socket) -> None:
        pass

    def close(self) -> None:
        for one in (self._socket, *self._taken):
            one.close()


class ClosesAtOnce(Silent):
    def answer(self, caller: socket.socket) -> None:
        caller.close()


class SpeaksHttp(Silent):
    def answer(self, caller: socket.socket) -> None:
        caller.recv(4096)
        caller.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")


@pytest.mark.parametrize("kind", [Silent, ClosesAtOnce, SpeaksHttp])
def test_a_port_where_something_else_answers_is_told_within_6_s(kind: type[Silent]) -> None:
    other = kind()
    start = time.monotonic()
    try:
        with pytest.raises(ClusterError, match=r"^cluster\.address: got .*no Ray cluster answered in time"):
            check_joinable(other.address)
    finally:
        other.close()
    assert time.monotonic() - start < 6 * BUSY


@pytest.mark.parametrize("asked", [demand(gpus=1), demand(seat=1)])
def test_what_this_machine_can_never_hold_is_refused_before_ray_is_started(asked: Demand) -> None:
    with pytest.raises(ClusterError, match=r"asked 2 x 1 (GPU|seat), the cluster has 0; ask for fewer"):
        check_room(None, asked)
    with (
        pytest.raises(ClusterError, match=r"asked 2 x 1 (GPU|seat), the cluster has 0; ask for fewer"),
        connected(None, "test", asked, log=lambda line: None),
    ):
        pass
    assert not ray.is_initialized()
    check_room(None, demand())


COMMAND_LINE = """
import sys
from ray_probe.cli.main import _main
code = _main()
print("loaded:", *sorted({"torch", "transformers", "matplotlib"} & set(sys.modules)))
sys.exit(code)
"""


@pytest.mark.parametrize(
    "arguments", [("run", "{config}"), ("up", "{config}"), ("status",), ("beta",), ("scale", "2"), ("down", "--run=x")]
)
def test_every_command_tells_an_unreachable_cluster_before_it_loads_what_takes_seconds(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{path: {tmp_path}}}\ndata: {{prompts: [a]}}\noutput: {{dir: {tmp_path}/runs}}\n")
    words = [word.format(config=config) for word in arguments]
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can take it
        address = f"127.0.0.1:{held.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", COMMAND_LINE, *words, "--address", address], capture_output=True, text=True,
            env=os.environ | {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}, timeout=60,
        )  # fmt: skip
    assert done.returncode == 4, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"error: cluster.address: got '{address}'; no Ray cluster answers there (Connection refused)"
    )
    assert done.stdout.strip() == "loaded:"
    assert not (tmp_path / "runs").exists()


# With a cluster

COMMON = """
import json, os, signal, sys, time
from ray_probe.cluster.connection.connect import Demand, check_room, connected
from ray_probe.errors import ClusterError
class Answer:
    def pid(self):
        return os.getpid()
def ask():
    import ray
    return ray.get(ray.remote(num_cpus=1)(Answer).remote().pid.remote(), timeout=20)
def refused(*args, **named):
    start = time.monotonic()
    try:
        with connected(*args, log=logged.append, **named):
            return ["connected", 0]
    except ClusterError as error:
        return [str(error), time.monotonic() - start]
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where this was started in the background
logged, facts = [], {}
one = Demand(actors=1, cpus_per_actor=1, gpus_per_actor=0, resources={}, slots=1)
"""

OWN = """
def family(temp_dir):
    import psutil
    return [p.pid for p in psutil.Process().children(recursive=True) if p.status() != "zombie"]
before = dict(os.environ)
with connected(None, "test", Demand(1, 1, 0, {}, 4), log=logged.append) as first:
    facts["modes"] = [oct(os.stat(path).st_mode & 0o777) for path in (first.temp_dir, first.token_path)]
    facts["twice"] = refused(None, "test", one)
    facts["first"] = [ask(), first.cpus, first.owned]
facts["dir_left"] = os.path.exists(first.temp_dir)
try:
    with connected(None, "test", one, log=logged.append) as second:
        facts["second"] = ask()
        facts["family"] = len(family(second.temp_dir))
        os.killpg(0, signal.SIGINT)
        time.sleep(10)
except KeyboardInterrupt:
    facts["interrupted"] = True
    facts["processes_left"], facts["dir_left_too"] = family(second.temp_dir), os.path.exists(second.temp_dir)
facts["variables"] = {k: v for k, v in os.environ.items() if before.get(k) != v and k != "RAY_CLIENT_MODE"}
facts["handler"] = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
print(json.dumps({**facts, "logged": logged}))
"""

JOIN = """
address, token_path = sys.argv[1:]
wrong = os.path.join(os.environ["HOME"], "wrong")
open(wrong, "w").write("f" * 64)
facts["wrong"] = refused(address, "test", one, token_path=wrong, loopback=True)
facts["none"] = refused(address, "test", one)
facts["gpus"] = refused(address, "test", Demand(1, 1, 2, {}, 1), token_path=token_path, loopback=True)
start = time.monotonic()
try:
    check_room(address, Demand(5, 1, 0, {}, 5), token_path=token_path, loopback=True)
except ClusterError as error:
    facts["cpus"] = [str(error), time.monotonic() - start]
with connected(address, "test", one, token_path=token_path, loopback=True, log=logged.append) as joined:
    facts["joined"] = [ask(), joined.owned, joined.nodes]
with connected(address, "test", one, token_path=token_path, loopback=True, log=logged.append):
    facts["again"] = ask()
os.remove(wrong)
print(json.dumps({**facts, "logged": logged}))
"""

FAILS_WHILE_JOINED = """
from ray_probe.cluster.connection import connect
from ray_probe.cluster.connection import session
address, token_path, *pids = sys.argv[1:]
session.JOIN_S = 3.0
rehearsed = connect.check_joinable
def then(number):
    def rehearse(address):
        nodes = rehearsed(address)
        for pid in pids:
            os.kill(int(pid), number)
        return nodes
    return rehearse
way = dict(token_path=token_path, loopback=True)
"""

FREEZES = (
    FAILS_WHILE_JOINED
    + """
connect.check_joinable = then(signal.SIGSTOP)
facts["frozen"] = refused(address, "test", None, **way)
for pid in pids:
    os.kill(int(pid), signal.SIGCONT)
connect.check_joinable = rehearsed
deadline = time.monotonic() + 80
while "joined" not in facts:
    try:
        with connected(address, "test", one, log=logged.append, **way):
            facts["joined"] = ask()
    except ClusterError as error:  # the join that nobody waits for any more comes to its end first
        assert "a join that this process gave up" in str(error) and time.monotonic() < deadline, error
        facts["waits"] = facts.get("waits", 0) + 1
print(json.dumps(facts), flush=True)
os._exit(0)
"""
)

DIES = (
    FAILS_WHILE_JOINED
    + """
connect.check_joinable = then(signal.SIGKILL)
facts["killed"] = refused(address, "test", None, **way)
print(json.dumps(facts), flush=True)
os._exit(0)
"""
)


def run_python(code: str, home: Path, *args: str, seconds: float = 60) -> dict:
    """The JSON that a script printed; the script leads its own process group, and so gets Ctrl-C alone."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", COMMON + code, *args], env=clean, capture_output=True, text=True, timeout=seconds,
        start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.cluster
@pytest.mark.own_cluster
def test_a_ray_started_here_works_twice_and_leaves_nothing_behind_even_on_ctrl_c(tmp_path: Path) -> None:
    facts = run_python(OWN, tmp_path)
    assert facts["modes"] == ["0o700", "0o600"]
    assert facts["twice"][0].startswith("cluster.address: got None; this process is connected")
    assert facts["first"][1:] == [4, True] and facts["second"] and facts["family"] >= 5
    assert facts["interrupted"] and facts["processes_left"] == []
    assert not facts["dir_left"] and not facts["dir_left_too"]
    assert facts["variables"] == {} and facts["handler"]
    assert list(tmp_path.iterdir()) == []
    if (os.cpu_count() or 1) < 4:
        assert "4 slots" in facts["logged"][0]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with a_head() as started:
        yield started


@pytest.mark.cluster
@pytest.mark.own_cluster
def test_joining_tells_a_wrong_token_and_a_small_cluster_and_leaves_the_cluster_up(head: Head, tmp_path: Path) -> None:
    facts = run_python(JOIN, tmp_path, head.address, head.token_path)
    message, seconds = facts["wrong"]
    assert "the cluster refused the token" in message and "wrong" in message and seconds < 5 * BUSY
    message, seconds = facts["none"]
    assert "refused the token (sent: none" in message and seconds < 5 * BUSY
    message, seconds = facts["gpus"]
    assert message.startswith("cluster.gpus_per_actor: asked 1 x 2 GPU, the cluster has 0") and seconds < 10
    message, seconds = facts["cpus"]
    assert message.startswith("cluster.cpus_per_actor: asked 5 x 1 CPU, the cluster has 1") and seconds < 10
    assert facts["joined"][1:] == [False, 1] and facts["again"]
    assert list(tmp_path.iterdir()) == []


ANOTHER_USER = """
try:
    check_room(sys.argv[1], one)
except ClusterError as error:
    facts["said"] = str(error)
print(json.dumps(facts))
"""
NOBODY = 65534


@contextlib.contextmanager
def another_user(head: Head) -> Iterator[list[str]]:
    """The words before a command that run it as another Linux user; where only root may, logs are closed instead."""
    if os.geteuid() == 0:
        words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        reading = [*words, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]  # our Python, under /root
        yield reading if subprocess.run([*reading, "true"], capture_output=True).returncode == 0 else words
        return
    events = Path(head.temp_dir, "r", "session_latest", "logs", "events")
    events.chmod(0o500)
    try:
        yield []
    finally:
        events.chmod(0o700)


@pytest.mark.cluster
@pytest.mark.own_cluster
def test_another_linux_user_with_the_right_token_is_told_whose_cluster_it_is(head: Head, tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path)}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": Path(head.token_path).read_text()}
    with another_user(head) as words:
        done = subprocess.run(
            [*words, sys.executable, "-c", COMMON + ANOTHER_USER, head.address], env=clean | token, text=True,
            capture_output=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)["said"]
    assert said.startswith(f"cluster.address: got '{head.address}'; Ray could not join the cluster: Failed opening")
    assert "/logs/events/" in said and "for writing: Permission denied" in said
    assert said.endswith("; its files belong to the user root: run ray_probe as root, or start Ray as this user") == (
        os.geteuid() == 0
    )


def failing_while_joined(code: str, head: Head, tmp_path: Path) -> dict:
    """The facts of a script that freezes or kills this head."""
    return run_python(code, tmp_path, head.address, head.token_path, str(head.gcs), str(head.raylet), seconds=110)


@pytest.mark.cluster
@pytest.mark.own_cluster
def test_a_head_that_dies_while_it_is_joined_is_told_within_seconds(head: Head, tmp_path: Path) -> None:
    facts = failing_while_joined(DIES, head, tmp_path)  # the last test of this head
    message, seconds = facts["killed"]
    assert message.startswith(f"cluster: ray.init at {head.address} failed: ") and seconds < 10 * BUSY


@pytest.mark.slow  # a join that was given up ends by Ray's own deadlines, 20 s after its head is back
@pytest.mark.cluster
@pytest.mark.own_cluster
def test_a_head_that_freezes_while_it_is_joined_is_told_and_can_be_joined_once_it_is_back(tmp_path: Path) -> None:
    with a_head() as own:
        facts = failing_while_joined(FREEZES, own, tmp_path)
    message, seconds = facts["frozen"]
    assert message.startswith(f"cluster: ray.init at {own.address} failed: no answer in 3 s") and seconds < 10 * BUSY
    assert facts["joined"], "a join that was given up does not stand in the way of the next"
