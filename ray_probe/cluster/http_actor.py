"""The web server of a service or run as a Ray actor, and its handle.

Ray restarts an actor that died; it comes back on its port, with its token.
"""

import contextlib
import logging
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from ray_probe.cluster.actors import actor_names
from ray_probe.cluster.actors.calls import kill
from ray_probe.cluster.actors.handle import ActorHandle
from ray_probe.cluster.actors.own_actors import OwnActor, is_ours, named_actor
from ray_probe.cluster.connection.nodes import pinned_to
from ray_probe.cluster.controller_handle import ControllerHandle
from ray_probe.cluster.head.head_monitor import LOST_S, OWN_LOST_S, HeadMonitor, end_without
from ray_probe.errors import ClusterError, ProbeError
from ray_probe.http.server import Listen

logger = logging.getLogger("ray_probe")
LOOK_EVERY_S = 2.0
GONE_LOOKS = 5
"""Looks in a row without a controller after which the server ends: Ray restarts a controller within one."""
START_S = 120.0
BIND_EVERY_S = 1.0


@dataclass(frozen=True)
class HttpSpec:
    """The constructor's argument of a web server.

    Attributes:
        name: of the service or run.
        directory: of its files.
        listen: where it listens; port 0: where it did last, else at a free port.
        own_head: ray_probe started the cluster.
    """

    name: str
    directory: str
    listen: Listen
    own_head: bool = False


class HttpActor(OwnActor):
    """Serves HTTP in a thread of its own, and ends with its controller."""

    def __init__(self, spec: HttpSpec) -> None:
        context = ray.get_runtime_context()
        end_without(HeadMonitor(context.gcs_address, OWN_LOST_S if spec.own_head else LOST_S), logger.error)
        self._spec, self._namespace = spec, context.namespace
        self._outcome: Listen | ProbeError | None = None
        self._known = threading.Event()
        restarted = bool(context.was_current_actor_reconstructed)
        threading.Thread(target=self._serve, args=(restarted,), name="serve", daemon=True).start()
        me = context.current_actor
        threading.Thread(target=self._end_with_controller, args=(me,), name="controller", daemon=True).start()

    def where(self) -> Listen:
        """Return where the server listens, once it does.

        Raises:
            ProbeError: why it does not.
        """
        if not self._known.wait(START_S):
            raise ClusterError("http: the server does not start; see its log in Ray's session directory")
        if isinstance(self._outcome, ProbeError):
            raise self._outcome
        assert self._outcome is not None, "it is known"
        return self._outcome

    def _serve(self, restarted: bool) -> None:
        """Start the server; a restarted one waits for its port as long as that takes."""
        while True:
            try:
                self._outcome = self._started(restarted)
            except ProbeError as error:
                self._outcome = error
            except ImportError as error:
                self._outcome = ClusterError(f"http: cannot start on this node ({error}); install the extra there")
            except Exception as error:  # it would end the thread unseen
                self._outcome = ClusterError(f"http: the server does not start ({type(error).__name__}: {error})")
            self._known.set()
            if not restarted or not isinstance(self._outcome, ProbeError):
                return
            logger.error(str(self._outcome))
            time.sleep(BIND_EVERY_S)

    def _started(self, restarted: bool) -> Listen:
        from ray_probe.http.app import create_app
        from ray_probe.http.server import KEYS, HttpServer, open_socket, recorded, token_in, write_record

        directory, listen = Path(self._spec.directory), self._spec.listen
        token, last, sock = token_in(directory), recorded(directory), None
        if last is not None and listen.port == 0 and (restarted or last.host == listen.host):
            try:
                sock = open_socket(replace(listen, port=last.port), token)
            except ProbeError:
                if restarted:  # its clients wait for it there
                    raise
        sock = open_socket(listen, token) if sock is None else sock
        listen = replace(listen, port=sock.getsockname()[1])
        controller = ControllerHandle(self._spec.name, self._controller())
        app = create_app(controller, token, listen.hosts, keys=directory / KEYS)
        write_record(directory, listen)
        HttpServer(app, sock).start()
        return listen

    def _controller(self) -> Any:
        found = named_actor(actor_names.controller(self._spec.name), self._namespace)
        if found is None:
            raise ClusterError(f"http: there is no controller of {self._spec.name!r}; start the service: up CONFIG")
        return found

    def _end_with_controller(self, me: Any) -> None:
        missed = 0
        while missed < GONE_LOOKS:
            time.sleep(LOOK_EVERY_S)
            with contextlib.suppress(Exception):  # without an answer of Ray, the monitor of the head decides
                gone = named_actor(actor_names.controller(self._spec.name), self._namespace) is None
                missed = missed + 1 if gone else 0
        logger.warning("http: the controller of %s is gone; ended", self._spec.name)
        kill(me)


class HttpHandle(ActorHandle[HttpActor]):
    """The handle of a web server."""

    def where(self) -> Listen:
        """Return where the server listens. Raises ProbeError where it does not."""
        return self._call(self.actor.where, deadline_s=START_S)


def start_server(spec: HttpSpec, node_id: str, runtime_env: dict[str, Any]) -> HttpHandle:
    """Start a web server on a node; it outlives this process.

    Args:
        spec: of the server.
        node_id: Ray's id of the node.
        runtime_env: of the service's actors.
    """
    variables = {"OMP_NUM_THREADS": "1"} | dict(runtime_env.get("env_vars", {}))
    options = ray.remote(HttpActor).options(
        name=actor_names.http(spec.name), num_cpus=0, lifetime="detached", max_restarts=-1, max_concurrency=4,
        scheduling_strategy=pinned_to(node_id), runtime_env=runtime_env | {"env_vars": variables},
    )  # fmt: skip
    return HttpHandle(spec.name, options.remote(spec))


def find_server(name: str, namespace: str) -> HttpHandle | None:
    """Return the web server of a service or run, if it has one."""
    handle = named_actor(actor_names.http(name), namespace)
    return HttpHandle(name, handle) if is_ours(handle) else None
