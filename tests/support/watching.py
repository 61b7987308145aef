"""A watch on a directory with a service that measures when a test says so."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray_probe.controller.replies import MeasurementInfo, Status
from ray_probe.errors import ConfigError
from ray_probe.watch.conversion import Converter
from ray_probe.watch.entries import Entries, Entry
from ray_probe.watch.queueing import Queueing, SeriesOptions
from ray_probe.watch.spool import Spool
from ray_probe.watch.watcher import Watcher, WatchOptions
from support.trainers import Write, as_json, config, states, tensors, tokenizer


class FakeService:
    """A service's queue, without checkpoints and actors.

    Attributes:
        asked: what was queued, by id: checkpoint, adapter, against, against_adapter and settings.
        refused: names of checkpoints that it refuses, with its message.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.draining = directory, False
        self.asked: dict[str, dict[str, Any]] = {}
        self.refused: dict[str, str] = {}
        self._infos: dict[str, MeasurementInfo] = {}

    def probe(
        self, checkpoint: Any, adapter: Any = None, *, settings: Mapping[str, Any], against: Any = None,
        against_adapter: Any = None,
    ) -> str:  # fmt: skip
        name = Path(str(adapter or checkpoint)).name
        if name in self.refused:
            raise ConfigError(self.refused[name])
        for path in (checkpoint, adapter, against, against_adapter):
            assert path is None or any(Path(path).iterdir()), "the service reads the files when they are queued"
        identity = f"m{len(self.asked) + 1:04d}"
        self.asked[identity] = {
            "checkpoint": name, "adapter": adapter, "path": str(checkpoint), "settings": dict(settings),
            "against": None if against is None else Path(against_adapter or against).name,
        }  # fmt: skip
        self._infos[identity] = MeasurementInfo(
            id=identity, checkpoint=str(checkpoint), adapter=adapter, state="queued",
            directory=str(self.directory / identity), rounds=0, sequences=0, entropy=None, gradient=None,
            beta_version=None, submitted="", started=None, finished=None, cause=None, exit_code=None,
            against=None if against is None else str(against),
        )  # fmt: skip
        return identity

    def results(self) -> tuple[MeasurementInfo, ...]:
        return tuple(self._infos.values())

    def cancel(self, measurement: str) -> MeasurementInfo:
        return self.end(measurement, "cancelled", "cancelled before it began", 130)

    def status(self) -> Status:
        fields: dict[str, Any] = dict.fromkeys(Status.__dataclass_fields__)
        return Status(**(fields | {"draining": self.draining, "directory": str(self.directory)}))

    def begin(self, identity: str) -> None:
        self._infos[identity] = replace(self._infos[identity], state="running")

    def end(self, identity: str, state: str = "done", cause: str | None = None, code: int = 0) -> MeasurementInfo:
        for path in (self._infos[identity].checkpoint, self._infos[identity].against):
            assert state != "done" or path is None or any(Path(path).iterdir()), "its files are held"
        self._infos[identity] = replace(self._infos[identity], state=state, cause=cause, exit_code=code)
        return self._infos[identity]

    def end_all(self) -> None:
        for info in self.results():
            if info.state in ("queued", "running"):
                self.end(info.id)

    def lose(self) -> None:
        """Forget every measurement, as a service in an emptied directory."""
        self._infos.clear()


class Watch:
    """A watch, its service and its clock.

    Args:
        home: holds the watched directory `out`, and the service's.
        service: of an earlier watch, or None.
        converter: makes the converter from the watch's directory, or None.
        options: of `WatchOptions` and `SeriesOptions`.
    """

    def __init__(
        self, home: Path, service: FakeService | None = None, converter: Any = None, spool: Path | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        self.root = home.resolve() / "out"
        self.root.mkdir(exist_ok=True)
        own = home.resolve() / "watch"
        own.mkdir(exist_ok=True)
        self.service = service or FakeService(home / "service")
        self.now, self.said, self.log = 0.0, [], []  # type: ignore[var-annotated]
        series = {key: options.pop(key) for key in ("gradient", "latest", "responses") if key in options}
        self.entries = Entries(own, "demo", str(self.service.directory))
        queueing = Queueing(self.entries, self.service, SeriesOptions("demo", **series), lambda: self.now, self._say)
        made: Converter | None = None if converter is None else converter(own)
        self.spool = Spool(spool or self.root / ".ray_probe", self.log.append)
        self.watcher = Watcher(
            self.root, own, self.entries, queueing, self.spool, WatchOptions(**options), lambda: self.now, self._say,
            made,
        )  # fmt: skip

    def _say(self, entry: Entry) -> None:
        self.said.append((entry.name, entry.state, entry.why))

    def step(self, later_s: float = 1.0) -> dict[str, str]:
        """Look once; returns the states by name."""
        self.now += later_s
        self.watcher.step()
        return self.states

    @property
    def states(self) -> dict[str, str]:
        items = [*self.entries.others.values(), *self.entries.items]
        return {entry.name: entry.state for entry in items}

    def whys(self) -> dict[str, str]:
        return {entry.name: entry.why for entry in [*self.entries.others.values(), *self.entries.items]}

    def asked(self) -> list[tuple[str, str | None]]:
        """Returns the checkpoints that were queued, with those that they are compared with."""
        return [(one["checkpoint"], one["against"]) for one in self.service.asked.values()]

    @property
    def pins(self) -> list[str]:
        return sorted(path.name for path in (self.root.parent / "watch" / "pins").glob("*/*"))


def saved(root: Path, step: int, name: str = "checkpoint-{}") -> Path:
    """Writes a finished checkpoint of transformers' Trainer, with weights that depend on the step."""
    directory = name.format(step)
    state = Write(f"{directory}/trainer_state.json", as_json({"global_step": step}))
    weights = Write(f"{directory}/model.safetensors", tensors(step + 1))
    for write in [*config(directory), weights, *tokenizer(directory), *states(directory), state]:
        for one in write.steps():
            one(root)
    return root / directory
