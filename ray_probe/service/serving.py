"""Starts and ends the web server of a service or a run in progress."""

import contextlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ray_probe.config.loading import load_config
from ray_probe.errors import ConfigError, ProbeError, bad_value
from ray_probe.http.server import TOKEN, Listen, forget_files, is_loopback
from ray_probe.service import registry
from ray_probe.service.discovery import Found, find

NEEDS = ("fastapi", "uvicorn")


@dataclass(frozen=True)
class Asked:
    """Where a server is asked to listen.

    Attributes:
        host: address of the interface; None: 127.0.0.1, or where the server listens already.
        port: of the server; None: its last one, else a free one.
        names: host names of requests, beside localhost and the address.
    """

    host: str | None = None
    port: int | None = None
    names: tuple[str, ...] = ()

    @property
    def listen(self) -> Listen:
        """Where a new server listens."""
        return Listen(self.host or Listen.host, self.port or 0, self.names)

    def check(self) -> None:
        """Raise ConfigError for a missing extra and for addresses without a meaning."""
        if missing := [name for name in NEEDS if find_spec(name) is None]:
            raise ConfigError(f"http: {' and '.join(missing)} missing; pip install 'ray-probe[http]'")
        self.listen.check()

    def is_met_by(self, found: Listen) -> bool:
        """Return whether a server that listens there is what is asked for."""
        same_host, same_port = self.host in (None, found.host), self.port in (None, 0, found.port)
        return same_host and same_port and set(self.names) <= set(found.names)


@dataclass(frozen=True)
class Served:
    """A web server that answers.

    Attributes:
        name: of the service or run.
        listen: where it listens.
        token: of the bearer; None where its file cannot be read from here.
        token_file: that holds it.
    """

    name: str
    listen: Listen
    token: str | None
    token_file: str

    @property
    def url(self) -> str:
        """The address for a browser, with the token."""
        return self.listen.url + (f"#token={self.token}" if self.token else "")

    def lines(self) -> list[str]:
        """Return what `serve` prints."""
        shown = [self.url]
        if self.token is None:
            shown.append(f"token: in {self.token_file} on the head; add #token=TOKEN to the URL")
        if is_loopback(self.listen.host):
            port = self.listen.port
            shown.append(f"from another machine: ssh -L {port}:127.0.0.1:{port} HEAD, then the same URL there")
        else:
            shown.append("the token travels unencrypted: use it in a private network, or behind a proxy with TLS")
        return shown


def serve(asked: Asked, name: str | None, address: str | None = None, namespace: str | None = None) -> Served:
    """Start the web server of a service or run, or find the one that it has.

    Args:
        asked: where it listens.
        name: of the service or run; None: the only one.
        address: of its cluster; None: from the registry.
        namespace: Ray namespace; None: the registry's, or `ray_probe`.

    Raises:
        ConfigError: it cannot listen there, it listens elsewhere already, or a run has not begun.
        ClusterError: the cluster or the server does not answer.
    """
    asked.check()
    with contextlib.ExitStack() as stack:
        found = find(stack, address, namespace, name, None)
        name = found.controller.name
        directory = Path(found.controller.status().directory)
        if not directory.is_absolute() or not directory.is_dir():
            remedy = "its directory is not there yet; wait for its first round"
            raise ConfigError(bad_value("--run", name, remedy))
        listen = _listening(found, asked, directory)
    registry.set_url(name, listen.url)
    token_file = directory / TOKEN
    try:
        token = token_file.read_text(encoding="ascii").strip() or None
    except OSError:
        token = None
    return Served(name, listen, token, str(token_file))


def _listening(found: Found, asked: Asked, directory: Path) -> Listen:
    """Return where the server listens, after starting it where that is needed."""
    from ray_probe.cluster.connection.nodes import head_node, this_node
    from ray_probe.cluster.http_actor import HttpSpec, find_server, start_server

    name = found.controller.name
    if (there := find_server(name, found.namespace)) is not None:
        listen = there.where()
        if not asked.is_met_by(listen):
            remedy = f"it is served at {listen.url} already; end that first: serve --run {name} --stop"
            raise ConfigError(bad_value("--run", name, remedy))
        return listen
    entry = registry.read(name)
    spec = HttpSpec(name, str(directory), asked.listen, own_head=entry is not None and entry.loopback)
    # The directory of a run need not be seen from the head.
    node = head_node() if found.kind == "service" else this_node()
    server = start_server(spec, node, _runtime_env(directory))
    try:
        return server.where()
    except BaseException:
        server.kill()
        raise


def _runtime_env(directory: Path) -> dict[str, Any]:
    """Return the runtime environment of a service's or run's actors."""
    from ray_probe.cluster.controller_actor import SERVICE_CONFIG

    for name in (SERVICE_CONFIG, "config.yaml"):
        if (directory / name).exists():
            return dict(load_config(directory / name).cluster.runtime_env)
    return {}


def stop(name: str | None, address: str | None = None, namespace: str | None = None) -> tuple[str, bool]:
    """End the web server of a service or run; returns its name and whether it had one.

    The next server has another token.
    """
    from ray_probe.cluster.actors.own_actors import end_server

    with contextlib.ExitStack() as stack:
        found = find(stack, address, namespace, name, None)
        name = found.controller.name
        ended = end_server(name, found.namespace)
        with contextlib.suppress(ProbeError, OSError):  # a token that cannot be removed opens nothing any more
            forget_files(Path(found.controller.status().directory))
    registry.set_url(name, None)
    return name, ended
