"""Check this machine: torch, room for a Ray started here, and the self-test."""

import os
import shutil
import socket
import tempfile
from pathlib import Path

from ray_probe.checkpoints.memory_forecast import size
from ray_probe.cluster.connection.demand import MIN_STORE_BYTES
from ray_probe.cluster.head.environment import MAX_TMP_CHARS
from ray_probe.doctor.checks import Case, Finding
from ray_probe.errors import ClusterError, ProbeError, bad_value

SPILL_BYTES = 2**30


def torch_build(case: Case) -> Finding:
    """Name torch's build and devices; fails if a Ray started here needs more."""
    import torch

    toolkits = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    built = next((f"{name} {version}" for name, version in toolkits.items() if version), "CPU")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cluster = case.cluster
    if cluster.address is None and cluster.gpus_per_actor > 0 and not devices:
        remedy = f"torch {torch.__version__} ({built} build) sees no device here, use 0, or a CUDA build and a driver"
        raise ClusterError(bad_value("cluster.gpus_per_actor", cluster.gpus_per_actor, remedy))
    return Finding(f"{torch.__version__}, {built} build, {devices} devices, {os.cpu_count()} cores")


def room_for_ray(case: Case) -> Finding:
    """Check that a Ray can start here: temporary directory, shared memory and a port."""
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
    """Check the installed estimator against exact enumeration."""
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
