"""`results --series` on directories, and the options that place a measurement in a series."""

import csv
import io
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.chains import gradient, step
from support.models import save_checkpoint, tiny_llama
from support.series import a_series

from ray_probe.cli import queries, service
from ray_probe.cli.queries import Format
from ray_probe.cli.series import named
from ray_probe.errors import ConfigError, OutputError
from ray_probe.run.comparison.chain import read_chain


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gradient and two comparisons of three checkpoints, in a directory as of a service."""
    directory = tmp_path_factory.mktemp("cli") / "grpo"
    places = [save_checkpoint(directory.parent / f"c{n}", tiny_llama(8, seed=n), "abcdef") for n in range(3)]
    for number, (a, b) in enumerate(pairwise(places), start=1):
        step(directory, number, a, b)
    gradient(directory, "own", places[0])
    return directory


def said(capsys: pytest.CaptureFixture[str], *places: object, **options: Any) -> str:
    assert queries.results([str(place) for place in places], series=True, **options) == 0
    return capsys.readouterr().out


def test_a_directory_of_runs_is_a_series_of_its_name(runs: Path, capsys: pytest.CaptureFixture[str]):
    table = said(capsys, runs)
    assert table.startswith("grpo: 3 checkpoints, 2 comparisons") and "c0 to" in table
    (found,) = json.loads(said(capsys, runs, as_json=True))
    assert found == json.loads(said(capsys, *sorted(runs.glob("*")), form=Format.JSON))[0], "each run by itself"
    chain = read_chain(runs)
    assert [one["since_first"] for one in found["changes"]] == [one.since_first.to_json() for one in chain.steps]
    lines = list(csv.DictReader(io.StringIO(said(capsys, runs, form=Format.CSV))))
    assert [float(line["entropy"]) for line in lines] == [one["entropy"]["value"] for one in found["points"]]
    assert said(capsys, runs, form=Format.MD).startswith("### grpo: 3 checkpoints")


def test_a_run_that_has_not_ended_counts_as_open(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = tmp_path / "grpo"
    shutil.copytree(runs, copy)
    (copy / "step-2" / "result.json").unlink()
    (found,) = json.loads(said(capsys, copy, as_json=True))
    assert (len(found["changes"]), found["open"]) == (1, 1)


def test_the_plot_is_written_where_it_is_asked_for(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "curve.png"
    assert said(capsys, runs, plot=path).endswith(f"plot: {path}\n")
    assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match=r"--plot: got '.*x.txt'; need a file that ends with .png"):
        queries.results([str(runs)], series=True, plot=tmp_path / "x.txt")
    with pytest.raises(OutputError, match="cannot be written"):
        queries.results([str(runs)], series=True, plot=tmp_path / "no" / "x.png")


def test_what_cannot_be_shown_is_refused_in_one_line(runs: Path, tmp_path: Path):
    for places, options, text in (
        ([str(runs), "m0001"], {"series": True}, "RUN_DIR: got 'm0001'; there is no such directory"),
        ([str(tmp_path)], {"series": True}, "it is no run directory and holds none"),
        ([str(runs), str(runs)], {}, "only --series draws, and shows several at once"),
        ([str(runs)], {"plot": tmp_path / "x.png"}, "only --series draws"),
    ):
        with pytest.raises(ConfigError) as caught:
            queries.results(places, **options)
        assert text in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_series_are_chosen_by_name():
    one, two = a_series("one"), a_series("two")
    assert named([one, two], []) == (one, two) and named([one, two], ["two"]) == (two,)
    with pytest.raises(ConfigError, match="NAME: got 'three'; no such series; there are one, two"):
        named([one, two], ["three"])
    with pytest.raises(ConfigError, match="there are none yet; probe CHECKPOINT --series NAME begins one"):
        named([], ["three"])


def test_options_of_probe_are_settings_of_the_section_series():
    found = service._place_in_series("grpo", 0, ["lr=1e-5", "arm=a=b"])
    assert found == {"series.name": "grpo", "series.step": 0, "series.tags": {"lr": "1e-5", "arm": "a=b"}}
    assert service._place_in_series(None, None, None) == {}
    for bad in ("lr", "=x", "lr="):
        with pytest.raises(ConfigError, match=r"--tag: got '.*'; need KEY=VALUE"):
            service._place_in_series(None, None, [bad])
