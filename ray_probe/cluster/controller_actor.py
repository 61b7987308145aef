"""The controller as a Ray actor: found by name, asked by many at once, and made again from disk when it dies.

Whoever asks it by name imports this module: what only the controller itself needs is imported by its constructor.
"""

import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from ray_probe.cluster.actors import actor_names
from ray_probe.cluster.actors.own_actors import OwnActor, end_children, refuse_taken_name
from ray_probe.cluster.connection.nodes import pinned_to
from ray_probe.cluster.head.head_monitor import LOST_S, OWN_LOST_S, HeadMonitor, end_without
from ray_probe.controller.replies import BetaReply, Followed, MeasurementInfo, Scaled, Status, Variance
from ray_probe.errors import ConfigError, ProbeError
from ray_probe.run.result import Result
from ray_probe.system.failpoints import fail_at

if TYPE_CHECKING:
    from datetime import datetime

    from ray_probe.config import ProbeConfig
    from ray_probe.controller.measurement import Job
    from ray_probe.run.prepared import PreparedRun

logger = logging.getLogger("ray_probe")
SERVICE_CONFIG = "service.yaml"
CONTROLLER_LOCK = "controller.lock"
ASKED_AT_ONCE = 32


@dataclass(frozen=True)
class ControllerSpec:
    """What a controller is made of, again after it died: small, as Ray keeps only small arguments by itself.

    Attributes:
        name: of the service or run.
        config: resolved configuration of a run, plain JSON types; None: it lies in the service's directory.
        directory: of the service; None for a run.
        own_head: ray_probe started the cluster.
    """

    name: str
    config: Mapping[str, Any] | None
    directory: str | None
    own_head: bool = False

    @property
    def kind(self) -> str:
        """Service or run."""
        return "run" if self.directory is None else "service"


class ControllerActor(OwnActor):
    """Runs a `Controller`; every method but `close` answers at once."""

    def __init__(self, spec: ControllerSpec) -> None:
        from ray_probe.cluster.controller_backend import RayControllerBackend
        from ray_probe.config.loading import config_from_dict, load_config
        from ray_probe.controller.controller import Controller
        from ray_probe.controller.run_log import logged_to
        from ray_probe.system.digests import check_recorded
        from ray_probe.system.files import held

        lost_s = OWN_LOST_S if spec.own_head else LOST_S
        end_without(HeadMonitor(ray.get_runtime_context().gcs_address, lost_s), logger.error)
        end_children(spec.name, ray.get_runtime_context().namespace)
        self._kind = spec.kind
        self._held = contextlib.ExitStack()
        if spec.directory is None:
            assert spec.config is not None, "a run's configuration comes with it"
            directory, own = None, None
            config = config_from_dict(spec.config)
        else:
            directory = Path(spec.directory)
            self._held.enter_context(held(directory / CONTROLLER_LOCK))
            self._held.enter_context(logged_to(directory / "service.log"))
            path = directory / SERVICE_CONFIG
            check_recorded(directory, SERVICE_CONFIG, path.read_bytes(), "`down`, then `up CONFIG`, writes it again")
            own = config = load_config(path)
        self._config = config
        workers = RayControllerBackend(
            config, logger.warning, spec.name, detached=directory is not None, state=directory
        )
        self._controller = Controller(spec.name, spec.kind, directory, workers, _prepare, own)
        self._controller.begin()

    def pid(self) -> int:
        """Of this process."""
        return os.getpid()

    def kind(self) -> str:
        """Service or run."""
        return self._kind

    def submit(self, config: Mapping[str, Any], job: "Job") -> str:
        """Queue a run that has been checked; returns its id."""
        return self._controller.submit(config, job).id

    def probe(self, settings: Mapping[str, Any]) -> str:
        """Queue a measurement of the service's configuration with these settings; returns its id.

        Raises an InputError for what is wrong with checkpoint or settings, or an OutputError where it cannot be pinned;
        nothing is queued then.
        """
        if self._kind == "run":
            raise ConfigError("--run: a run measures one checkpoint; start a service for more: up CONFIG")
        from ray_probe.controller.measurement_config import measurement_config

        return self._controller.probe(measurement_config(self._config, settings)).id

    def cancel(self, identity: str) -> MeasurementInfo:
        """Take a measurement back, or stop it."""
        return self._controller.cancel(identity)

    def drain(self, on: bool) -> None:
        """Take nothing new, or take on again."""
        self._controller.drain(on)

    def scale(self, actors: int) -> Scaled:
        """Ask for so many rollout actors."""
        return self._controller.scale(actors)

    def status(self) -> Status:
        """How things are."""
        return self._controller.answers.status()

    def results(self) -> tuple[MeasurementInfo, ...]:
        """All measurements."""
        return self._controller.answers.results()

    def result(self, identity: str | None) -> tuple[MeasurementInfo, Result | None]:
        """A measurement and its result so far."""
        return self._controller.answers.result(identity)

    def follow(self, identity: str, cursor: int) -> Followed:
        """What happened to a measurement since."""
        return self._controller.answers.follow(identity, cursor)

    def start_error(self) -> ProbeError | None:
        """What kept a service from starting."""
        return self._controller.start_error

    def beta(self, version: int | None, identity: str | None) -> BetaReply:
        """A version of a measurement's fit."""
        return self._controller.answers.beta(version, identity)

    def variance(self, identity: str | None) -> Variance:
        """Advantage statistics of a measurement."""
        return self._controller.answers.variance(identity)

    def logs(self, identity: str | None, lines: int) -> tuple[str, ...]:
        """The last lines of a log."""
        return self._controller.answers.logs(identity, lines)

    def close(self, deadline_s: float) -> bool:
        """Stop the work, with whole rounds kept, and end the actors; returns whether that was in time."""
        fail_at("end_before_close")
        in_time = self._controller.close(deadline_s)
        self._held.close()
        return in_time


def create(spec: ControllerSpec, node_id: str) -> Any:
    """Start a controller on a node; a service's outlives this process, and Ray restarts it when it dies.

    Raises ConfigError when another has its name, or an actor of another program a name of its own actors.
    """
    field = "--name" if spec.kind == "service" else "output.name"
    refuse_taken_name(field, spec.name, ray.get_runtime_context().namespace)
    lasting: dict[str, Any] = {"lifetime": "detached", "max_restarts": -1} if spec.kind == "service" else {}
    options = ray.remote(ControllerActor).options(
        name=actor_names.controller(spec.name), num_cpus=0, max_concurrency=ASKED_AT_ONCE,
        scheduling_strategy=pinned_to(node_id),
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}}, **lasting,
    )  # fmt: skip
    return options.remote(spec)


def spec_of_run(name: str, config: "ProbeConfig", own_head: bool) -> ControllerSpec:
    """The controller of one run."""
    from ray_probe.config.loading import to_dict

    return ControllerSpec(name, to_dict(config), None, own_head)


def _prepare(config: "ProbeConfig", created: "datetime | None") -> "PreparedRun":
    from ray_probe.run.prepare import prepare  # brings transformers along; only what a service is given needs it here

    return prepare(config, created)
