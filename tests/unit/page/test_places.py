"""A report of directories and services holds their measurements, or refuses in one line."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support.chains import gradient, step
from support.html_report import data_of
from support.models import save_checkpoint, tiny_llama
from support.page_data import a_comparison, all_series, infos
from support.results import typed

from ray_probe.cli.report import report, service_part
from ray_probe.controller.replies import MeasurementInfo
from ray_probe.errors import ConfigError
from ray_probe.page.places import part_of
from ray_probe.run.result import Result
from ray_probe.run.series import Series


def a_run(path: Path, result: Result) -> Path:
    path.mkdir(parents=True)
    path.joinpath("result.json").write_text(json.dumps(result.to_json()))
    return path


def test_runs_are_shown_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = a_run(tmp_path / "one", typed()), a_run(tmp_path / "runs" / "two", a_comparison())
    a_run(tmp_path / "runs" / "three", typed())
    out = tmp_path / "x.html"
    assert report([str(one), str(other.parent)], out) == 0
    assert capsys.readouterr().out == f"report: {out}\n"
    data = data_of(out.read_text(encoding="utf-8"))
    assert [entry["name"] for entry in data["entries"]] == ["one", "three", "two"]
    assert data["title"] == "Report of one, runs" and data["series"] == []


def test_runs_of_a_series_are_a_curve_whichever_directory_holds_them(tmp_path: Path) -> None:
    checkpoints = [save_checkpoint(tmp_path / f"checkpoint-{n}", tiny_llama(8, seed=n), "abcdef") for n in (0, 50)]
    step(tmp_path / "one", 1, *checkpoints, series={"name": "train", "step": 50})
    gradient(tmp_path / "two", "own", checkpoints[0], series={"name": "train", "step": 0})
    step(tmp_path / "one", 2, *checkpoints)
    (tmp_path / "one" / "step-1").rename(tmp_path / "one" / "m0001")
    (tmp_path / "one" / "step-2").rename(tmp_path / "one" / "m0002")
    part = part_of([tmp_path / "one", tmp_path / "two" / "own"])
    assert [entry.name for entry in part.entries] == ["m0001", "m0002", "own"]
    (series,) = part.series
    assert (series.name, [point.step for point in series.points]) == ("train", [0, 50])
    assert series.changes[0].measurement == "m0001" and series.points[0].measurements == ("m0001", "own")


def test_a_service_gives_what_it_has_measured() -> None:
    @dataclass
    class Api:
        """A controller that has measured two checkpoints."""

        name: str = "demo"
        there: tuple[MeasurementInfo, ...] = ()

        def results(self) -> tuple[MeasurementInfo, ...]:
            return self.there

        def measured(self, measurement: str | None = None) -> tuple[MeasurementInfo, Result | None]:
            info = next(item for item in self.there if item.id == measurement)
            return info, typed() if info.state == "done" else None

        def series(self) -> tuple[Series, ...]:
            return tuple(all_series())

    api: Any = Api(there=tuple(infos()))
    part = service_part(api)
    assert [entry.name for entry in part.entries] == ["m0001", "m0002"]
    assert (part.title, list(part.series)) == ("Report of demo", all_series())
    api.there = tuple(replace(info, rounds=0) for info in infos())
    with pytest.raises(ConfigError, match="SERVICE: got 'demo'; nothing is measured yet"):
        service_part(api)


def test_what_holds_no_result_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"RUN_DIR: got .*; need a run's directory with result\.json in it"):
        part_of([tmp_path])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    damaged.joinpath("result.json").write_text("{")
    with pytest.raises(ConfigError, match=r"result\.json cannot be read"):
        part_of([damaged])
    out = tmp_path / "x.html"
    with pytest.raises(ConfigError):
        report([str(damaged)], out)
    assert not out.exists()


@pytest.mark.parametrize("out", ["missing/x.html", "."])
def test_a_file_that_cannot_be_written_is_refused_first(tmp_path: Path, out: str) -> None:
    with pytest.raises(ConfigError, match="--out: got "):
        report(["no-such-service"], tmp_path / out)


def test_nothing_to_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"name a directory or a service, or give --url"):
        report(None, tmp_path / "x.html")
