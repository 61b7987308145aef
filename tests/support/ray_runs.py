"""Whole runs on a backend of actors that are there, and in this process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_probe.cluster.backend import RayBackend
from ray_probe.controller.local_backend import LocalBackend
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation.prepared import PreparedRun, baseline_rule
from ray_probe.run.progress import Listener
from support.answers import Answer

Listen = Callable[[RayBackend], Listener]


def quiet(backend: RayBackend) -> Listener:
    return lambda progress: None


def noted(notes: list[str]) -> Listen:
    """Keeps what is told."""
    return lambda backend: lambda progress: notes.append(progress.note) if progress.note is not None else None


def run_on(
    backend: RayBackend, prepared: PreparedRun, name: str, listen: Listen = quiet, held_positions: int = 0
) -> Answer:
    """A run on as many actors of the backend as its configuration asks for."""
    actors = prepared.config.cluster.actors
    directory = RunDirectory.create(Path(prepared.config.output.dir), name)
    backend.pool.scale(actors)
    backend.load(prepared, wait_for=actors)
    backend.open(directory, held_positions=held_positions)
    probe = OfflineEntropyProbe(prepared.config, prepared.plan, backend, directory, listen(backend))
    return Answer(probe.run(), directory)


@contextmanager
def own(prepared: PreparedRun, actor_class: type, **options: Any) -> Iterator[RayBackend]:
    """A backend of its own for the block."""
    backend = RayBackend(prepared.config, actor_class=actor_class, **options)
    try:
        yield backend
    finally:
        backend.close()


def run_here(prepared: PreparedRun, name: str, rollouts: Sequence[Any]) -> Answer:
    """The same run in this process."""
    directory = RunDirectory.create(Path(prepared.config.output.dir), name)
    backend = LocalBackend(rollouts, baseline_rule(prepared.config), prepared.policy_id, directory)
    return Answer(OfflineEntropyProbe(prepared.config, prepared.plan, backend, directory).run(), directory)
