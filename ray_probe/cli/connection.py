"""Connects a command to the service or run that its options name."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ray_probe.cli.output import stdout_for_results
from ray_probe.errors import ConfigError, bad_value

if TYPE_CHECKING:
    from ray_probe.service.client import ProbeClient


@contextlib.contextmanager
def connected(
    name: str | None, address: str | None, namespace: str | None, kind: str | None = None, url: str | None = None
) -> "Iterator[ProbeClient]":
    """Connect a client to a service or run.

    Args:
        name: `--run`.
        address: `--address`.
        namespace: `--namespace`.
        kind: service or run, of which the command asks the only one that is up without `--run`; None: either.
        url: `--url`; then no Ray is imported.

    Raises:
        ConfigError: `--url` beside an option that finds a service through Ray.
    """
    from ray_probe.http.client import is_url
    from ray_probe.service.client import ProbeClient

    if url is not None:
        for option, value in (("--run", name), ("--address", address), ("--namespace", namespace)):
            if value is not None:
                raise ConfigError(bad_value(option, value, "--url names one service already; leave one of the two out"))
        if not is_url(url):
            raise ConfigError(bad_value("--url", url.partition("#")[0], "need http://HOST:PORT, as `serve` prints it"))
        with ProbeClient.connect(url) as client:
            yield client
        return
    with stdout_for_results(), ProbeClient.connect(address, namespace, name, kind) as client:
        yield client
