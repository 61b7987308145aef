"""The Ray in use has every private name of `ray_private`, with its behaviour.

Ray keeps state in its process, so what a session shows is seen by one Python of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.heads import Head, a_head

from ray_probe.cluster.head import ray_private
from ray_probe.cluster.head.package_path import package_path

pytestmark = [pytest.mark.cluster, pytest.mark.own_cluster]

SEEN = """
import json, os, sys
from pathlib import Path
from ray_probe.cluster.head import ray_private
from ray_probe.cluster.connection.connect import connected
from ray_probe.cluster.head.environment import environment, on_loopback
address, token_path, temp_dir = sys.argv[1:]
wrong = Path(os.environ["HOME"], "wrong")
wrong.write_text("f" * 64)
seen = {"logs before": ray_private.logs_directory()}
import ray
def versions(path):
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    with on_loopback(), environment(token):
        try:
            return ray_private.cluster_versions(address, 5)
        except ray.exceptions.AuthenticationError as error:
            return type(error).__name__
seen["versions"] = [versions(path) for path in (wrong, token_path, wrong, token_path)]
before = os.environ.get(ray_private.BREAKPOINT_VARIABLE)
with connected(address, "contract", None, token_path=token_path, loopback=True, log=lambda line: None):
    seen["nodes"] = ray.nodes()
    seen["logs"] = ray_private.logs_directory()
    seen["breakpoint"] = os.environ[ray_private.BREAKPOINT_VARIABLE]
    @ray.remote(num_cpus=0)
    def path():
        import importlib.util, sys
        return sys.path, importlib.util.find_spec("filelock").origin
    seen["path"], seen["filelock"] = ray.get(path.remote(), timeout=60)
seen["breakpoint after"] = os.environ.get(ray_private.BREAKPOINT_VARIABLE) == before
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with a_head() as started:
        yield started


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    """The working directory of a driver: a file in it has a library's name."""
    with tempfile.TemporaryDirectory() as name:
        Path(name, "filelock.py").write_text("raise ImportError('the wrong one')")
        yield Path(name)


@pytest.fixture(scope="module")
def seen(head: Head, work: Path) -> dict[str, Any]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, "-P", "-c", SEEN, head.address, head.token_path, head.temp_dir], cwd=work, timeout=90,
            env=clean | {"HOME": home}, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_cluster_versions_tells_a_refused_token_and_reload_auth_takes_the_next_one(seen: dict[str, Any]) -> None:
    """`environment` calls `ray_private.reload_auth`."""
    first, right, again, right_again = seen["versions"]
    assert first == again == "AuthenticationError"
    assert right == right_again and right["ray_version"] and right["python_version"]


def test_workers_have_this_package_and_not_the_working_directory_on_their_path(
    seen: dict[str, Any], work: Path
) -> None:
    """The driver joins with `ray_private.job_config`."""
    assert str(work) not in seen["path"] and os.path.realpath(work) not in seen["path"]
    assert set(package_path()) <= set(seen["path"])
    assert not seen["filelock"].startswith(str(work))


def test_the_head_is_marked_by_its_resource(seen: dict[str, Any]) -> None:
    assert [ray_private.HEAD_RESOURCE in node["Resources"] for node in seen["nodes"]] == [True]


def test_logs_lie_in_the_directory_that_the_head_was_given(seen: dict[str, Any], head: Head) -> None:
    """The head passes it as `ray_private.TEMP_DIR_OPTION`."""
    assert seen["logs before"] is None
    assert seen["logs"].startswith(f"{head.temp_dir}/r/session_")


def test_ray_leaves_a_breakpoint_hook_that_is_taken_back(seen: dict[str, Any]) -> None:
    assert seen["breakpoint"].startswith("ray.") and seen["breakpoint after"]


def test_a_head_listens_on_loopback_alone_and_has_the_daemons(head: Head) -> None:
    family = head.family()
    assert {process.name() for process in family} >= set(ray_private.DAEMONS)
    listening = [c.laddr.ip for process in family for c in process.net_connections("inet") if c.status == "LISTEN"]
    assert len(listening) >= 4
    assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}


def test_gpus_are_counted_as_a_head_counts_them(seen: dict[str, Any]) -> None:
    assert ray_private.gpus_here() == sum(node["Resources"].get("GPU", 0.0) for node in seen["nodes"])


def test_ray_reads_a_jobs_configuration_from_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    assert RAY_JOB_CONFIG_JSON_ENV_VAR == ray_private.JOB_VARIABLE
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, '{"runtime_env": {"working_dir": "gcs://a.zip"}}')
    assert ray_private.submitted_working_dir() == "gcs://a.zip"


def test_ray_compares_as_much_of_pythons_version_as_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.utils import check_version_info, compute_version_info

    ray_version, python_version = compute_version_info()[:2]
    minor = ".".join(python_version.split(".")[:2])
    theirs = {"ray_version": ray_version, "python_version": f"{minor}.99"}
    monkeypatch.delenv(ray_private.MATCH_LEVEL_VARIABLE, raising=False)
    with pytest.raises(RuntimeError, match="mismatch"):
        check_version_info(theirs, "here")
    monkeypatch.setenv(ray_private.MATCH_LEVEL_VARIABLE, "minor")
    check_version_info(theirs, "here")


def test_ray_start_notes_the_address_in_this_file() -> None:
    from ray._common.utils import get_ray_address_file

    assert Path(get_ray_address_file("/tmp/ray")).name == ray_private.ADDRESS_NOTE


def test_ray_knows_the_request_timeout() -> None:
    from ray import _raylet

    name = ray_private.REQUEST_TIMEOUT_VARIABLE.removeprefix("RAY_")
    assert name.encode() in Path(_raylet.__file__).read_bytes()


def test_the_variables_turn_off_other_addresses_and_the_hook_of_uv() -> None:
    code = "from ray._private import ray_constants as c; print(c.ENABLE_RAY_CLUSTER, c.RAY_ENABLE_UV_RUN_RUNTIME_ENV)"
    off = {ray_private.LOOPBACK_VARIABLE: "0", ray_private.UV_HOOK_VARIABLE: "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | off, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False", "False"]


def test_a_loaded_ray_obeys_the_loopback_constant_for_the_block() -> None:
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    with ray_private.loopback_constant():
        assert ray_constants.ENABLE_RAY_CLUSTER is False
    assert ray_constants.ENABLE_RAY_CLUSTER is before
