"""A service without Ray: a controller with its parts."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_probe.config.loading import to_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.controller.controller import Controller
from ray_probe.controller.measurement_config import measurement_config
from ray_probe.run.preparation.prepare import prepare
from support.workers import InProcessWorkers


class Service:
    """A controller with its parts."""

    def __init__(self, directory: Path, config: ProbeConfig) -> None:
        directory.mkdir(exist_ok=True)
        self.config, self.directory = config, directory
        self.workers = InProcessWorkers()
        self.controller = Controller("demo", "service", directory, self.workers, prepare, config)
        self.answers = self.controller.answers

    def begin(self) -> "Service":
        self.controller.begin()
        return self

    def probe(self, **settings: Any) -> str:
        dotted = {key.replace("__", "."): value for key, value in settings.items()}
        return self.controller.submit(to_dict(measurement_config(self.config, dotted))).id

    def take(self, **settings: Any) -> str:
        """Checks, stamps and pins as `probe` of the command line does."""
        dotted = {key.replace("__", "."): value for key, value in settings.items()}
        return self.controller.probe(measurement_config(self.config, dotted)).id

    def ended(self, identity: str) -> Any:
        return until(lambda: (info := self.answers.result(identity)[0]).finished and info)


def until(found: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.01)
    raise AssertionError("it did not come to that in time")
