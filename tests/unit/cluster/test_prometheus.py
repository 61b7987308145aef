"""The metrics that a service gives to Prometheus, without Ray."""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from support.replies import a_status, an_info

from ray_probe.cluster import prometheus
from ray_probe.cluster.prometheus import PrometheusMetrics
from ray_probe.run.comparison.change import ChangeFigure
from ray_probe.run.result import Entropy


class Metric:
    """A gauge or counter that keeps its values by tags."""

    made: ClassVar[dict[str, "Metric"]] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.keys, self.values = tag_keys, {}
        Metric.made[name] = self

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == self.keys
        self.values[tuple(tags.values())] = value

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.values[tuple(tags.values())] = self.values.get(tuple(tags.values()), 0) + value


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Metric]:
    monkeypatch.setattr(Metric, "made", {})
    for name in ("Gauge", "Counter"):
        monkeypatch.setattr(prometheus, name, Metric)
    return Metric.made


def an_end(identity: str, finished: str, **fields: Any) -> Any:
    return replace(an_info(), id=identity, state="done", finished=finished, **fields)


def test_the_newest_figures_of_each_series_and_the_state_of_the_service_are_set(made: dict[str, Metric]):
    change = ChangeFigure(-0.5, 0.1)
    items = [
        an_end("m1", "2026-05-01T12:00:00+00:00", series="grpo", step=50),
        an_end("m2", "2026-05-01T13:00:00+00:00", series="grpo", step=100, against="/c", change=change,
               entropy=Entropy(99.0), gradient=None),
        an_end("m3", "2026-05-01T11:00:00+00:00"),
        replace(an_info(), id="m4", series="grpo", step=150),
    ]  # fmt: skip
    answers = SimpleNamespace(status=a_status, results=lambda: tuple(items))
    metrics = PrometheusMetrics("demo", answers)
    metrics.update()
    expected = {
        "probe_actors_asked": {("demo",): 3.0}, "probe_actors_alive": {("demo",): 2.0},
        "probe_queued": {("demo",): 2.0}, "probe_shards_retried": {("demo",): 2.0},
        "probe_entropy_nats": {("demo", "grpo"): 28.412, ("demo", ""): 28.412},
        "probe_entropy_se_nats": {("demo", "grpo"): 0.618, ("demo", ""): 0.618},
        "probe_change_nats": {("demo", "grpo"): -0.5}, "probe_change_se_nats": {("demo", "grpo"): 0.1},
        "probe_step": {("demo", "grpo"): 100.0}, "probe_rounds": {("demo", "grpo"): 3, ("demo", ""): 1},
        "probe_responses": {("demo", "grpo"): 3072, ("demo", ""): 1024},
    }  # fmt: skip
    assert {name: made[name].values for name in expected} == expected
    items[-1] = replace(items[-1], rounds=3)
    metrics.update()
    assert made["probe_rounds"].values == {("demo", "grpo"): 5, ("demo", ""): 1}, "a counter takes what came since"


def test_ray_takes_every_name(made: dict[str, Metric]):
    PrometheusMetrics("demo", SimpleNamespace())
    assert made and all(re.fullmatch("[a-z_]+", name) for name in made)


def test_a_failure_is_one_warning(made: dict[str, Metric], monkeypatch: pytest.MonkeyPatch, caplog: Any):
    monkeypatch.setattr(prometheus, "EVERY_S", 0.001)
    tries: list[int] = []
    metrics = PrometheusMetrics("demo", SimpleNamespace(status=lambda: tries.append(1) or 1 / 0))
    monkeypatch.setattr(metrics._closing, "wait", lambda seconds: len(tries) == 3)
    metrics._work()
    assert len(tries) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "metrics for Prometheus are not set: division by zero"
    ]
