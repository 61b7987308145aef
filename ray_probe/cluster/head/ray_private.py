"""The private names of Ray that this package uses, one function or constant each.

Each docstring names the public behaviour that would replace the name. `tests/integration/test_ray_private.py` checks
the behaviour, `tests/integration/test_ray_range.py` repeats that with the oldest and the newest supported Ray.
"""

# No import of Ray at the top: the environment variables must be set before Ray is loaded.

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""`0`: a head listens on 127.0.0.1 only, and a driver joins it there.

Without it Ray replaces a loopback address by the machine's own and listens on every interface. Ray documents the
variable for Windows and macOS. Replaced by: a `ray.init` that keeps the address it is given.
"""

UV_HOOK_VARIABLE = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
"""`0`: under `uv run` Ray does not build the project's environment for every worker.

Replaced by: an option of `ray.init`.
"""

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Configuration of a submitted job, with its runtime_env, which `ray.init` of the job's driver reads.

Replaced by: a public way to read the runtime_env of the job that a process runs in.
"""

REQUEST_TIMEOUT_VARIABLE = "RAY_gcs_server_request_timeout_seconds"
"""Seconds after which a request to the head fails. Replaced by: a timeout argument of `ray.init`."""

BREAKPOINT_VARIABLE = "PYTHONBREAKPOINT"
"""`ray.init` sets a hook in this variable. Replaced by: a `ray.shutdown` that restores the variable."""

MATCH_LEVEL_VARIABLE = "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL"
"""`patch` (the default) or `minor`: which part of Python's version `ray.init` compares with the cluster's.

Replaced by: an option of `ray.init`.
"""

TEMP_DIR_OPTION = "_temp_dir"
"""Option of `ray.init`: the directory of a head's files. Replaced by: the option without its underscore."""

DAEMONS = ("gcs_server", "raylet")
"""Names of the processes that a head needs. Replaced by: a call that returns whether a head is healthy."""

HEAD_RESOURCE = "node:__internal_head__"
"""Resource that only the head node has. Replaced by: a flag of `ray.nodes()`."""

ADDRESS_NOTE = "ray_current_cluster"
"""File in Ray's temp dir with the address of the cluster that `ray start` started last.

Replaced by: a call that returns the address behind `address="auto"` without joining the cluster.
"""


@contextlib.contextmanager
def loopback_constant() -> Iterator[None]:
    """Apply `LOOPBACK_VARIABLE=0` to a loaded Ray, which reads the variable at import.

    Replaced by: as `LOOPBACK_VARIABLE`. Does nothing where Ray has no such constant.
    """
    constants: Any = sys.modules.get("ray._private.ray_constants")
    before = getattr(constants, "ENABLE_RAY_CLUSTER", None)
    if before is None:
        yield
        return
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def reload_auth() -> None:
    """Drop the cached values of RAY_AUTH_* in a loaded Ray.

    Replaced by: a `ray.shutdown` that drops mode and token. Without these names a process can join only clusters of
    one token.
    """
    internals: Any = sys.modules.get("ray._raylet")
    with contextlib.suppress(AttributeError):  # in the order of Ray's own tests: the mode, then the token
        internals.Config.initialize("")
        internals.AuthenticationTokenLoader.instance().reset_cache()


def gpus_here() -> float:
    """Returns the number of GPUs that a head on this machine would find.

    Replaced by: a public count before `ray.init`. Returns infinity where Ray has no such names.
    """
    try:
        from ray._private.accelerators import get_accelerator_manager_for_resource

        gpus = get_accelerator_manager_for_resource("GPU")
        visible = gpus.get_current_process_visible_accelerator_ids()
        return gpus.get_current_node_num_accelerators() if visible is None else len(visible)
    except (ImportError, AttributeError):
        return math.inf


def cluster_versions(address: str, timeout_s: float) -> dict[str, str] | None:
    """Asks the head at host:port for the versions of its cluster.

    Replaced by: a `ray.init` that fails within a given time and says why.

    Returns:
        `ray_version` and `python_version`; {} where the head names none, None where Ray has no such names.

    Raises:
        ray.exceptions.AuthenticationError: the head refused the token.
        Exception: the head does not answer.
    """
    try:
        from ray import _raylet

        internals: Any = _raylet
        found = internals.GcsClient(address=address).internal_kv_get(b"CLUSTER_METADATA", b"cluster", timeout=timeout_s)
    except (ImportError, AttributeError, TypeError):
        return None
    versions: dict[str, str] = json.loads(found) if found else {}
    return versions


def job_config(paths: Iterable[str]) -> Any:
    """Returns a job configuration that puts these directories on the workers' path.

    Without it Ray puts the driver's working directory and the directory of its script before all libraries.
    Replaced by: an option of `ray.init`. Has no effect where Ray does not have the name.
    """
    from ray.job_config import JobConfig

    config = JobConfig()
    vars(config)["_py_driver_sys_path"] = _Fixed(paths)
    return config


class _Fixed(list[str]):
    """A list that Ray cannot extend."""

    def extend(self, _: Iterable[str], /) -> None:
        """Ignores the argument."""


def logs_directory() -> str | None:
    """Returns the directory of Ray's logs on this node; None without a connection.

    Replaced by: the State API without a dashboard. Without the name death reports quote no output.
    """
    import ray

    node = getattr(ray._private.worker, "_global_node", None)
    return None if node is None else str(node.get_logs_dir_path())


def submitted_working_dir() -> str | None:
    """Returns the working_dir of this process's job, or None; see `JOB_VARIABLE`."""
    try:
        runtime_env = json.loads(os.environ.get(JOB_VARIABLE, "{}")).get("runtime_env") or {}
    except ValueError:
        return None
    place = runtime_env.get("working_dir")
    return str(place) if place else None
