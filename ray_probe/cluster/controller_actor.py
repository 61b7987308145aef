"""The controller as a Ray actor that many clients call at once.

Every client imports this module, so the constructor imports what only the controller needs.
"""

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from ray_probe.cluster.actors.own_actors import OwnActor, end_children
from ray_probe.cluster.head.head_monitor import LOST_S, OWN_LOST_S, HeadMonitor, end_without
from ray_probe.controller.replies import BetaReply, Followed, MeasurementInfo, Scaled, Status, Variance
from ray_probe.errors import ProbeError, StateError
from ray_probe.run.result import Result
from ray_probe.run.series import Series
from ray_probe.system.failpoints import fail_at

if TYPE_CHECKING:
    from datetime import datetime

    from ray_probe.config import ProbeConfig
    from ray_probe.controller.measurement import Job
    from ray_probe.run.preparation.prepared import PreparedRun

logger = logging.getLogger("ray_probe")
SERVICE_CONFIG = "service.yaml"
CONTROLLER_LOCK = "controller.lock"


@dataclass(frozen=True)
class ControllerSpec:
    """The constructor's argument of a controller.

    It is small, because Ray keeps only small arguments for a restart.

    Attributes:
        name: of the service or run.
        config: resolved configuration of a run, plain JSON types; None: it is in the service's directory.
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
        from ray_probe.cluster.prometheus import PrometheusMetrics
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
            assert spec.config is not None, "the spec of a run holds its configuration"
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
        backend = RayControllerBackend(
            config, logger.warning, spec.name, detached=directory is not None, state=directory
        )
        self._controller = Controller(spec.name, spec.kind, directory, backend, _prepare, own)
        self._controller.begin()
        self._metrics = None if own is None else PrometheusMetrics(spec.name, self._controller.answers)
        if self._metrics is not None:
            self._metrics.begin()

    def kind(self) -> str:
        """Return "service" or "run"."""
        return self._kind

    def submit(self, config: Mapping[str, Any], job: "Job") -> str:
        """Queue a run that has been checked; returns its id."""
        return self._controller.submit(config, job).id

    def probe(self, settings: Mapping[str, Any]) -> str:
        """Queue a measurement with these settings; returns its id."""
        if self._kind == "run":
            raise StateError("--run: a run measures one checkpoint; start a service for more: up CONFIG")
        from ray_probe.controller.measurement_config import measurement_config

        return self._controller.probe(measurement_config(self._config, settings)).id

    def cancel(self, identity: str) -> MeasurementInfo:
        """Withdraw or stop a measurement."""
        return self._controller.cancel(identity)

    def drain(self, on: bool) -> None:
        """Accept no more measurements, or accept them again."""
        self._controller.drain(on)

    def scale(self, actors: int) -> Scaled:
        """Ask for this many rollout actors."""
        return self._controller.scale(actors)

    def status(self) -> Status:
        """Return the status."""
        return self._controller.answers.status()

    def results(self) -> tuple[MeasurementInfo, ...]:
        """Return all measurements."""
        return self._controller.answers.results()

    def result(self, identity: str | None) -> tuple[MeasurementInfo, Result | None]:
        """Return a measurement and its result so far."""
        return self._controller.answers.result(identity)

    def follow(self, identity: str, cursor: int) -> Followed:
        """Return a measurement's events since `cursor`."""
        return self._controller.answers.follow(identity, cursor)

    def start_error(self) -> ProbeError | None:
        """Return the error that kept a service from starting."""
        return self._controller.start_error

    def beta(self, version: int | None, identity: str | None) -> BetaReply:
        """Return a version of a measurement's fit."""
        return self._controller.answers.beta(version, identity)

    def variance(self, identity: str | None) -> Variance:
        """Return advantage statistics of a measurement."""
        return self._controller.answers.variance(identity)

    def logs(self, identity: str | None, lines: int) -> tuple[str, ...]:
        """Return the last lines of a log."""
        return self._controller.answers.logs(identity, lines)

    def series(self) -> tuple[Series, ...]:
        """Return the series of the measurements."""
        return self._controller.answers.series()

    def close(self, deadline_s: float) -> bool:
        """Stop the work and end the actors; returns whether that was in time."""
        fail_at("end_before_close")
        if self._metrics is not None:
            self._metrics.close()
        in_time = self._controller.close(deadline_s)
        self._held.close()
        return in_time


def _prepare(config: "ProbeConfig", created: "datetime | None") -> "PreparedRun":
    from ray_probe.run.preparation.prepare import (
        prepare,  # imports transformers, which only a service's new measurement needs
    )

    return prepare(config, created)
