"""Failpoints do nothing until a test asks for it, fail as often as asked in all, and are for tests alone."""

import ast
import signal
import subprocess
import sys
import timeit
from pathlib import Path

import pytest
from support.failpoints import arm, disarm, failpoints_in, fired

import ray_probe
from ray_probe.system import failpoints
from ray_probe.system.failpoints import VARIABLE, fail_at

PACKAGE = Path(ray_probe.__file__).parent
MAY_FAIL = {
    "fitter/ledger_writer.py", "gradient/store.py", "cluster/actors/rollout.py",
    "rollout/rollout.py", "cluster/head/head_process.py", "controller/measurement.py", "cluster/controller_actor.py",
}  # fmt: skip
CODE = "import sys; from ray_probe.system.failpoints import fail_at; fail_at('here', *sys.argv[1:]); print('went on')"


@pytest.fixture
def points(tmp_path: Path):
    with failpoints_in(tmp_path) as directory:
        yield directory


def run(*detail: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CODE, *detail], capture_output=True, text=True, check=False)


def test_nothing_happens_without_the_variable_or_without_the_file(points: Path, monkeypatch: pytest.MonkeyPatch):
    fail_at("here")
    arm(points, "here", "raise")
    fail_at("there")
    monkeypatch.delenv(VARIABLE)
    fail_at("here")
    assert fired(points, "here") == 0


def test_a_kill_ends_the_process_once_and_the_next_one_goes_on(points: Path):
    arm(points, "here")
    assert run().returncode == -signal.SIGKILL
    again = run()
    assert (again.returncode, again.stdout) == (0, "went on\n")
    assert fired(points, "here") == 1


def test_it_fails_as_often_as_asked_and_for_its_detail_alone(points: Path):
    arm(points, "here", "raise", times=2, only="1/2")
    for expected in (True, True, False):
        fail_at("here", "1/1")
        if expected:
            with pytest.raises(RuntimeError, match=r"^failpoint here 1/2$"):
                fail_at("here", "1/2")
        else:
            fail_at("here", "1/2")
    assert fired(points, "here") == 2
    arm(points, "here", "raise")
    with pytest.raises(RuntimeError, match=r"^failpoint here$"):
        fail_at("here")
    disarm(points, "here")
    fail_at("here")


def test_of_many_processes_so_many_fail_as_asked(points: Path):
    arm(points, "here", times=2)
    running = [subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.DEVNULL) for _ in range(5)]
    assert sorted(process.wait() for process in running) == [-signal.SIGKILL] * 2 + [0] * 3


def test_what_is_asked_for_first_is_done_just_before(points: Path):
    done: list[str] = []
    fail_at("here", "", lambda: done.append("unarmed"))
    arm(points, "here", "raise")
    with pytest.raises(RuntimeError):
        fail_at("here", "", lambda: done.append("first"))
    assert done == ["first"]


def test_a_sleep_stands_still_and_goes_on(points: Path, monkeypatch: pytest.MonkeyPatch):
    slept: list[float] = []
    monkeypatch.setattr(failpoints.time, "sleep", slept.append)
    arm(points, "here", "sleep", seconds=2.5)
    fail_at("here")
    assert slept == [2.5]


def test_unarmed_it_costs_next_to_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)  # a cluster of the fault tests may still stand in this process
    assert min(timeit.repeat(lambda: fail_at("here", "0/1"), number=1000, repeat=5)) / 1000 < 20e-6


def names_of(path: Path) -> set[str]:
    """Every name, attribute, module and text in a source file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def test_no_setting_no_argument_and_no_message_reaches_them():
    sources = {str(path.relative_to(PACKAGE)): names_of(path) for path in PACKAGE.rglob("*.py")}
    outside = {"config/schema.py", "cli/main.py", "cli/service.py", "service/run_once.py", "controller/work_loop.py"}
    assert outside <= set(sources)
    assert {name for name, names in sources.items() if "ray_probe.system.failpoints" in names} <= MAY_FAIL
    mention = {name for name, names in sources.items() if any(VARIABLE in text for text in names)}
    assert mention == {"system/failpoints.py"}, "nobody else reads or sets the variable"
    told = ("config/schema.py", "cli/main.py")
    assert not any("failpoint" in text.lower() for name in told for text in sources[name])
