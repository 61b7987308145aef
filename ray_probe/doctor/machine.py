"""What is looked at on this machine: packages, torch, token, room for a Ray that is started here, the self-test."""

import ipaddress
import os
import shutil
import socket
import stat
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

import ray_probe
from ray_probe.checkpoints.memory_forecast import size
from ray_probe.cluster.connection.demand import MIN_STORE_BYTES
from ray_probe.cluster.head.auth_token import require_token, token_mode, token_place
from ray_probe.cluster.head.environment import MAX_TMP_CHARS, env_to_join, environment
from ray_probe.doctor.checks import Case, Finding
from ray_probe.errors import ClusterError, ProbeError, bad_value

SHOWN = ("torch", "transformers", "ray", "numpy")
SPILL_BYTES = 2**30
NO_TOKEN = "no token is sent, as RAY_AUTH_MODE is not token"


def versions(case: Case) -> Finding:
    """Python and the packages, against the ranges that we ask for and the versions that we are tested with."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    python, dependencies = _ranges()
    here = {"python": ".".join(map(str, sys.version_info[:3]))}
    wrong = [] if here["python"] in SpecifierSet(python) else [f"python {here['python']} (need {python})"]
    for needed in map(Requirement, dependencies):
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            here[needed.name] = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"no {needed.name} (need {needed.specifier})")
            continue
        if not needed.specifier.contains(here[needed.name], prereleases=True):
            wrong.append(f"{needed.name} {here[needed.name]} (need {needed.specifier})")
    if wrong:
        raise ProbeError(f"there is {', '.join(wrong)}; install what pyproject.toml asks for")
    pins = _pins()
    other = [f"{name} {pin}" for name, pin in pins.items() if name in here and Version(here[name]).public != pin]
    shown = ", ".join(f"{name} {here[name]}" for name in ("python", *SHOWN))
    tested = f", tested with {', '.join(other)}" if other else ", all as tested" if pins else ""
    return Finding(f"ray-probe {ray_probe.__version__}, {shown}{tested}")


def _checkout(name: str) -> Path:
    return Path(ray_probe.__file__).parents[1] / name


def _ranges() -> tuple[str, list[str]]:
    """Ranges of Python and of the dependencies: the working copy's, else those of the installed package."""
    if _checkout("pyproject.toml").is_file():
        project = tomllib.loads(_checkout("pyproject.toml").read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == "ray-probe":
            return project["requires-python"], project["dependencies"]
    return metadata.metadata("ray-probe")["Requires-Python"], metadata.requires("ray-probe") or []


def _pins() -> dict[str, str]:
    """The versions that a working copy is tested with; none where it is installed without."""
    path = _checkout("constraints.txt")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))


def torch_build(case: Case) -> Finding:
    """What torch was built for, and whether it sees a device where this machine's Ray is asked for one."""
    import torch

    built = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cluster = case.cluster
    if cluster.address is None and cluster.gpus_per_actor > 0 and not devices:
        remedy = f"torch {torch.__version__} ({built} build) sees no device here, use 0, or a CUDA build and a driver"
        raise ClusterError(bad_value("cluster.gpus_per_actor", cluster.gpus_per_actor, remedy))
    return Finding(f"{torch.__version__}, {built} build, {devices} devices, {os.cpu_count()} cores")


def token(case: Case) -> Finding:
    """Whether Ray sends and asks for a token, and where that comes from; never the token."""
    address = case.cluster.address
    if address is None:
        return _token_to_start()
    with environment(env_to_join(address, case.token_path)):
        require_token(address)
        if token_mode():
            return _kept_safely(f"sent to {address}", token_place())
    host = address.rpartition(":")[0]
    if host and not _is_loopback(host):
        return Finding(f"{NO_TOKEN}: whoever reaches {host} can run code there", "turn Ray's token authentication on")
    return Finding(NO_TOKEN)


def _token_to_start() -> Finding:
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        off = "off for a Ray started here, as RAY_AUTH_MODE says: whoever reaches its ports can run code"
        return Finding(off, "unset RAY_AUTH_MODE")
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        with environment({"RAY_AUTH_MODE": "token"}):
            require_token(None)
            return _kept_safely("asked for by a Ray started here", token_place())
    return Finding("a Ray started here asks for a token of its own, in a file that is ours alone")


def _kept_safely(use: str, place: str | None) -> Finding:
    """The token's source, with a warning where others can read its file."""
    detail = f"{use}, from {place}"
    path = Path(place or "")
    if not path.is_absolute():
        return Finding(detail)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return Finding(f"{detail}, which others than its owner can use (mode {mode:04o})", f"chmod 600 {path}")
    return Finding(f"{detail} (mode {mode:04o})")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def room_for_ray(case: Case) -> Finding:
    """Whether this machine has what a Ray needs that is started here: temp dir, shared memory, a port."""
    parent = tempfile.gettempdir()
    temp = Path(parent if len(parent) <= MAX_TMP_CHARS else "/tmp")
    if not os.access(temp, os.W_OK | os.X_OK):
        raise ClusterError(bad_value("TMPDIR", str(temp), "Ray cannot write there, set it to a directory of yours"))
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", 0))
        except OSError as error:
            raise ClusterError(f"no port can be opened on 127.0.0.1 ({error.strerror}); allow it") from None
    disk = shutil.disk_usage(temp)
    memory = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    detail = f"{temp} has {size(disk.free)} free, /dev/shm {size(memory)}"
    if memory < MIN_STORE_BYTES:
        return Finding(
            f"{detail}: too little, so Ray's objects go to the disk", "start the container with --shm-size 1g"
        )
    if disk.free < max(SPILL_BYTES, disk.total // 20):
        return Finding(f"{detail}: Ray stores nothing on a disk that is 95 % full", f"make room in {temp}")
    return Finding(detail)


def self_tested(case: Case) -> Finding:
    """The estimator against exact enumeration, as it is installed here."""
    from ray_probe.doctor.self_test import self_test

    result = self_test(case.self_test_s)
    errors = ", ".join(f"{name} {error:.1e}" for name, error in result.errors.items())
    found = f"relative errors against enumeration: {errors or 'none yet'} ({result.seconds:.1f} s)"
    if result.failed:
        raise ProbeError(
            f"{found}: {', '.join(result.failed)} past {result.tolerance:g}, so no result can be trusted; install the "
            "versions of constraints.txt"
        )
    if result.unfinished:
        raise ProbeError(f"{found}: no time for {', '.join(result.unfinished)}; try again on a less busy machine")
    return Finding(found)
