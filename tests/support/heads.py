"""Ray heads in processes of their own, which a test may freeze, kill and replace."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

END_S = 20.0
HEAD = """
import sys
import psutil
from ray_probe.cluster.connection.connect import Demand, connected
with connected(None, "head", Demand(1, 1, 0, {}, int(sys.argv[1])), log=lambda line: None) as info:
    here = {process.name().split("_")[0]: process.pid for process in psutil.Process().children(recursive=True)}
    print(info.address, info.token_path, info.temp_dir, here["gcs"], here["raylet"], flush=True)
    sys.stdin.read()
"""
OPEN_HEAD = """
import os, sys
import psutil, ray
from ray_probe.cluster.head.environment import env_to_start, environment, private_dir
with private_dir() as directory, environment(env_to_start(directory)):
    ray.init(
        address="local", num_cpus=int(sys.argv[1]), include_dashboard=False, log_to_driver=False,
        object_store_memory=100_000_000, _temp_dir=os.path.join(directory, "r"),
    )
    here = {process.name().split("_")[0]: process.pid for process in psutil.Process().children()}
    address = ray.get_runtime_context().gcs_address
    print(address, os.environ["RAY_AUTH_TOKEN_PATH"], directory, here["gcs"], here["raylet"], flush=True)
    sys.stdin.read()
    ray.shutdown()
"""
"""As `ray start --head` makes it: known by the node's own address, not by loopback."""


@dataclass(frozen=True)
class Head:
    """A private Ray: its address, token file, temporary directory and processes."""

    address: str
    token_path: str
    temp_dir: str
    gcs: int
    raylet: int
    process: "subprocess.Popen[str]"

    @property
    def variables(self) -> dict[str, str]:
        """With which another process joins it."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": self.token_path}

    def lives(self) -> bool:
        """Whether its GCS was not killed."""
        try:
            return psutil.Process(self.gcs).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def family(self) -> list[psutil.Process]:
        """The processes that its own has started, workers too."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        """End all of its processes at once, workers too."""
        family = self.family()
        for one in (self.process, *family):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(family, END_S)


@contextlib.contextmanager
def a_head(cpus: int = 1, script: str = HEAD, **variables: str) -> Iterator[Head]:
    """Start a cluster with a token and `cpus` CPUs; its workers get these variables."""
    with tempfile.TemporaryDirectory(prefix="rp-", dir="/tmp") as home:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": home} | variables
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(cpus)], env=clean, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert process.stdin and process.stdout
        address, token_path, temp_dir, gcs, raylet = process.stdout.readline().split()
        head = Head(address, token_path, temp_dir, int(gcs), int(raylet), process)
        try:
            yield head
        finally:
            process.stdin.close()
            try:
                process.wait(END_S if head.lives() else 0)  # without its GCS it would not end by itself
            except subprocess.TimeoutExpired:
                head.kill()
            shutil.rmtree(temp_dir, ignore_errors=True)
