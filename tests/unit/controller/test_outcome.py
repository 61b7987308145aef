"""What follows from an ended measurement: its series, dropped responses, sinks and notifications."""

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from support.light import light_config, light_prepared
from support.light_workers import LightWorkers
from support.services import Service, until

from ray_probe.config.loading import to_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.controller.controller import Controller
from ray_probe.controller.measurement_config import measurement_config
from ray_probe.controller.outcome import series_cache
from ray_probe.controller.outcome.kept_responses import drop_used_responses
from ray_probe.controller.queue import Measurement
from ray_probe.errors import CheckpointError, ConfigError
from ray_probe.report import plots
from ray_probe.run.comparison.chain import responses_of
from ray_probe.run.comparison.measured import Measured
from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation.prepared import PreparedRun

SAVES = "import os, sys; open(sys.argv[1], 'a').write(os.environ['RAY_PROBE_STATE'] + sys.stdin.read() + '\\n')"


def light_prepare(config: ProbeConfig, created: datetime | None) -> PreparedRun:
    """Takes any checkpoint but one that is gone."""
    if config.model.path == "gone":
        raise CheckpointError("model.path: got 'gone'; no such directory")
    return light_prepared(config)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A service without a model that draws no plots."""
    monkeypatch.setattr(plots, "write_plots", lambda result, rounds, directory: [])
    command = shlex.join([sys.executable, "-c", SAVES, str(tmp_path / "notified")])
    made = Service(tmp_path / "demo", light_config(tmp_path, batch={"rounds": 1}, notify={"command": command}))
    made.workers = LightWorkers()
    made.controller = Controller("demo", "service", made.directory, made.workers, light_prepare, made.config)
    made.answers = made.controller.answers
    yield made
    made.workers.gate.set()
    made.controller.close(30.0)


def test_the_series_of_a_service_reads_each_ended_measurement_once(
    service: Service, monkeypatch: pytest.MonkeyPatch
):
    read: list[str] = []
    original = series_cache.read_measured

    def counted(directory: RunDirectory, name: str, place: Mapping[str, Any]) -> Measured:
        read.append(name)
        return original(directory, name, place)

    monkeypatch.setattr(series_cache, "read_measured", counted)
    service.begin()
    tags = {"series__name": "grpo", "series__tags": {"lr": "1e-5"}}
    late = service.probe(model__path="50", series__step=50, **tags)
    early, without = service.probe(model__path="0", series__step=0, **tags), service.probe()
    failed = service.probe(series__name="grpo", model__path="gone")
    for identity in (late, early, without, failed):
        service.ended(identity)
    (series,) = service.answers.series()
    assert [(one.step, one.measurements, one.tags) for one in series.points] == [
        (0, (early,), {"lr": "1e-5"}), (50, (late,), {"lr": "1e-5"}),
    ]  # fmt: skip
    assert (series.open, series.failed, sorted(read)) == (0, 1, [late, early])
    own = RunDirectory(service.directory / late).result()
    assert series.points[1].entropy.value == own.entropy.per_sequence
    service.workers.gate.clear()
    running = service.probe(series__name="grpo", model__path="100", series__step=100)
    assert service.answers.series()[0].open == 1 and len(read) == 2
    service.workers.gate.set()
    service.ended(running)
    assert [one.step for one in service.answers.series()[0].points] == [0, 50, 100]
    assert sorted(read) == [late, early, running]
    assert service.answers.series()[0] is service.answers.series()[0], "it is not built again"


def test_a_measurement_whose_files_are_damaged_is_left_out_and_counted(service: Service):
    service.begin()
    identities = [service.probe(series__name="grpo", model__path=str(n), series__step=n) for n in (0, 50)]
    for identity in identities:
        service.ended(identity)
    (service.directory / identities[0] / "manifest.json").write_text("{}")
    (series,) = service.answers.series()
    assert [one.step for one in series.points] == [50] and series.failed == 1


def test_the_end_of_each_measurement_is_recorded_and_notified(service: Service, tmp_path: Path):
    service.begin()
    done, failed = service.probe(series__step=7), service.probe(model__path="gone")
    service.ended(failed)
    lines = until(lambda: (found := _lines(tmp_path / "notified")) and len(found) == 2 and found)
    assert json.loads(lines[0].removeprefix("done")) == RunDirectory(service.directory / done).result().to_json()
    assert lines[1] == "failednull"
    for directory in (service.directory, service.directory / done):
        (line,) = [json.loads(text) for text in until(lambda: _lines(directory / "metrics.jsonl"))]  # noqa: B023
        assert (line["measurement"], line["step"]) == (done, 7) and line["probe/entropy_per_response"] > 0


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_a_measurement_that_waited_is_notified_of_when_it_is_cancelled(service: Service, tmp_path: Path):
    identity = service.probe()
    service.controller.cancel(identity)
    assert until(lambda: _lines(tmp_path / "notified")) == ["cancellednull"]


def test_a_client_sets_neither_sinks_nor_notifications_and_no_result_holds_them(service: Service):
    for key, value in (("notify.command", "rm -r /"), ("notify.webhook", "http://x"), ("metrics.tensorboard", "x")):
        with pytest.raises(ConfigError, match="it belongs to the service"):
            measurement_config(service.config, {key: value})
    found = to_dict(measurement_config(service.config, {}))
    assert found["notify"] == {"command": None, "webhook": None}
    service.begin()
    identity = service.probe()
    service.ended(identity)
    for path in (service.directory / identity).glob("*.*"):
        assert b"RAY_PROBE_STATE" not in path.read_bytes(), path
    assert "notify" not in RunDirectory(service.directory / identity).result().config


def a_measurement(directory: Path, identity: str, state: str, source: object = None) -> Measurement:
    """One that keeps responses, and takes those of a run directory."""
    run = directory / identity
    responses_of(run).mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"model": {"path": "m", "adapter": None}}
    config["compare"] = {"responses_from": None if source is None else str(source)}
    return Measurement(identity, config, str(run), "now", state=state)  # type: ignore[arg-type]


@pytest.mark.parametrize("state", ["done", "failed", "cancelled"])
def test_a_comparison_that_is_done_drops_the_responses_that_it_has_used(tmp_path: Path, state: str):
    first = a_measurement(tmp_path, "m0001", "done")
    second = a_measurement(tmp_path, "m0002", state, tmp_path / "m0001")
    drop_used_responses(second, [first, second])
    assert responses_of(tmp_path / "m0001").exists() == (state != "done")
    assert responses_of(tmp_path / "m0002").exists(), "the next comparison takes them"


def test_responses_that_another_measurement_takes_or_that_are_of_another_service_stay(tmp_path: Path):
    first = a_measurement(tmp_path, "m0001", "done")
    second = a_measurement(tmp_path, "m0002", "done", tmp_path / "m0001")
    third = a_measurement(tmp_path, "m0003", "queued", tmp_path / "m0001")
    drop_used_responses(second, [first, second, third])
    assert responses_of(tmp_path / "m0001").exists()
    drop_used_responses(second, [second])
    assert responses_of(tmp_path / "m0001").exists(), "no measurement of this service"
    drop_used_responses(replace(third, state="done"), [first, second, third])
    assert responses_of(tmp_path / "m0001").exists(), "the list is what counts"
    drop_used_responses(replace(third, state="done"), [first, second, replace(third, state="done")])
    assert not responses_of(tmp_path / "m0001").exists()
