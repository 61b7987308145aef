"""Connects a command to the service or run that its options name."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ray_probe.cli.output import stdout_for_results

if TYPE_CHECKING:
    from ray_probe.service.client import ProbeClient


@contextlib.contextmanager
def connected(
    name: str | None, address: str | None, namespace: str | None, kind: str | None = None
) -> "Iterator[ProbeClient]":
    """Connect a client to a service or run.

    Args:
        name: `--run`.
        address: `--address`.
        namespace: `--namespace`.
        kind: service or run, of which the command asks the only one that is up without `--run`; None: either.
    """
    from ray_probe.service.client import ProbeClient

    with stdout_for_results(), ProbeClient.connect(address, namespace, name, kind) as client:
        yield client
