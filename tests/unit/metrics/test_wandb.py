"""The sink of Weights & Biases: how it attaches, and a run offline."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.results import a_result
from support.services import until

from ray_probe.config.reporting import WandbConfig
from ray_probe.metrics import wandb as sink_module
from ray_probe.metrics.sink import SinkRun, figures
from ray_probe.metrics.wandb import Wandb
from ray_probe.run.result import Result

CONFIG = WandbConfig(run="{series}-run", project="rl", entity="team")
RESULT = Result.from_json(a_result())


class FakeRun:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def define_metric(self, *names: Any, **options: Any) -> None:
        self.calls.append(("define_metric", names, options))

    def log(self, *values: Any, **options: Any) -> None:
        self.calls.append(("log", values, options))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A library in the place of wandb; its first attempts to attach fail."""
    run, asked, failures = FakeRun(), [], [RuntimeError("no such run"), RuntimeError("no such run")]

    def init(**options: Any) -> FakeRun:
        asked.append(options)
        if failures:
            raise failures.pop()
        return run

    pauses: list[float] = []
    library = SimpleNamespace(init=init, Settings=lambda **options: options)
    monkeypatch.setitem(__import__("sys").modules, "wandb", library)
    monkeypatch.setattr(sink_module.time, "sleep", pauses.append)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return SimpleNamespace(run=run, asked=asked, pauses=pauses)


def test_it_attaches_as_a_second_writer_once_the_run_is_there_and_never_passes_a_step(
    fake: SimpleNamespace, tmp_path: Path
):
    sink = Wandb(CONFIG)
    for step in (40, 20):
        sink.open(SinkRun("demo", "m0001", "/c", tmp_path, "grpo", step))
        sink.write(step, {"probe/entropy_per_response": 1.5})
    assert len(fake.asked) == 3 and fake.pauses == [2.0, 4.0]
    asked = fake.asked[-1]
    assert (asked["id"], asked["resume"], asked["project"], asked["entity"]) == ("grpo-run", "allow", "rl", "team")
    shared = {"mode": "shared", "x_primary": False, "x_update_finish_state": False, "x_label": "ray_probe"}
    assert asked["settings"].items() >= shared.items()
    assert fake.run.calls == [
        ("define_metric", ("probe/step",), {"hidden": True}),
        ("define_metric", ("probe/*",), {"step_metric": "probe/step"}),
        *(("log", ({"train/global_step": step, "probe/step": step, "probe/entropy_per_response": 1.5},), {})
          for step in (40, 20)),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_offline_the_figures_are_in_a_run_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    sink = Wandb(CONFIG)
    sink.open(SinkRun("demo", "m0001", "/c", tmp_path, "grpo", 40))
    sink.write(40, figures(RESULT))
    (run,) = sink._runs.values()
    run.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    logged = until(lambda: _logged(file))  # W&B's own process writes it
    assert logged["probe/step"] == logged["train/global_step"] == 40
    assert logged.items() >= figures(RESULT).items()


def _logged(file: Path) -> dict[str, Any]:
    """The figures of the history, by name."""
    items = [item for record in _records(file) for item in record.history.item]
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: a log of LevelDB (blocks of 32 KiB) with a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""
