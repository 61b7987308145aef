"""Holds every private name of Ray that this package uses, one function or constant each.

Each docstring says which public behaviour would replace the name. `tests/integration/test_ray_private.py`
checks that the Ray in use still behaves so. Where a name is missing, the function says what happens instead. No import
of Ray at the top: the environment variables must be set before it is loaded.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""`0` has a Ray that starts listen on 127.0.0.1 alone, and one that joins take 127.0.0.1 as it is.

By itself Ray replaces a loopback address by the machine's own and listens on every interface. The variable is meant for
Windows and macOS. Replaced by: a `ray.init` that keeps to the address it is given.
"""

UV_HOOK_VARIABLE = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
"""`0` keeps Ray from building the project's environment again for every worker under `uv run`.

Replaced by: an option of `ray.init`.
"""

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Holds the configuration of a submitted job, its runtime_env among it, for the `ray.init` of the job's driver.

Replaced by: a public way to read the runtime_env of the job that a process runs in.
"""

REQUEST_TIMEOUT_VARIABLE = "RAY_gcs_server_request_timeout_seconds"
"""Seconds after which a request to the head fails. Replaced by: a timeout argument of `ray.init`."""

BREAKPOINT_VARIABLE = "PYTHONBREAKPOINT"
"""`ray.init` leaves a hook of its own in this variable. Replaced by: a `ray.shutdown` that puts it back."""

TEMP_DIR_OPTION = "_temp_dir"
"""Option of `ray.init`: the directory of a Ray that is started. Replaced by: the same option without its underscore."""

DAEMONS = ("gcs_server", "raylet")
"""Names of the processes without which a head cannot go on. Replaced by: a call that says whether a head is healthy."""

HEAD_RESOURCE = "node:__internal_head__"
"""Resource of the head's node alone. Replaced by: a flag of `ray.nodes()`."""

ADDRESS_NOTE = "ray_current_cluster"
"""File in Ray's temp dir with the address of the cluster that `ray start` has started last.

Replaced by: a call that says what `address="auto"` stands for and joins nothing.
"""


@contextlib.contextmanager
def loopback_constant() -> Iterator[None]:
    """Have a Ray that is loaded already obey `LOOPBACK_VARIABLE`, which it read when it was imported.

    Replaced by: as `LOOPBACK_VARIABLE`. Without the constant nothing is done.
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
    """Have a Ray that is loaded already read RAY_AUTH_* again: it keeps mode and token in the process.

    Used as Ray's own tests do: the mode first, then the token. Replaced by: a `ray.shutdown` that forgets both. Without
    these names a process can join only clusters of one token.
    """
    internals: Any = sys.modules.get("ray._raylet")
    with contextlib.suppress(AttributeError):
        internals.Config.initialize("")
        internals.AuthenticationTokenLoader.instance().reset_cache()


def gpus_here() -> float:
    """GPUs that a Ray started here finds, by its own count.

    Replaced by: a public count before `ray.init`. Without these names any number may be there.
    """
    try:
        from ray._private.accelerators import get_accelerator_manager_for_resource

        gpus = get_accelerator_manager_for_resource("GPU")
        visible = gpus.get_current_process_visible_accelerator_ids()
        return gpus.get_current_node_num_accelerators() if visible is None else len(visible)
    except (ImportError, AttributeError):
        return math.inf


def cluster_versions(address: str, timeout_s: float) -> dict[str, str] | None:
    """Versions of the cluster at host:port, asked of its head; {} where it names none, None without these names.

    The one call that tells a refused token from silence, in 10 ms. Replaced by: a `ray.init` that fails with the reason
    within a given time.

    Raises:
        ray.exceptions.AuthenticationError: the token was refused.
        Exception: no answer.
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
    """A configuration for `ray.init` whose workers have these directories, and no others of the driver, on their path.

    By itself Ray puts the driver's working directory, and the directory of its script, before all libraries there.
    Replaced by: an option of `ray.init`. Without the name Ray's own directories are on the path too.
    """
    from ray.job_config import JobConfig

    config = JobConfig()
    vars(config)["_py_driver_sys_path"] = _Fixed(paths)
    return config


class _Fixed(list[str]):
    """A list to which nothing is added."""

    def extend(self, _: Iterable[str], /) -> None:
        """Leave it as it is."""


def logs_directory() -> str | None:
    """Directory of the logs of Ray's processes on this node, for a process that is connected.

    Replaced by: the State API without a dashboard. Without the name there are no last words of a dead process.
    """
    import ray

    node = getattr(ray._private.worker, "_global_node", None)
    return None if node is None else str(node.get_logs_dir_path())


def submitted_working_dir() -> str | None:
    """The working_dir of the job that this process was submitted as, None without one; see `JOB_VARIABLE`."""
    try:
        runtime_env = json.loads(os.environ.get(JOB_VARIABLE, "{}")).get("runtime_env") or {}
    except ValueError:
        return None
    place = runtime_env.get("working_dir")
    return str(place) if place else None
