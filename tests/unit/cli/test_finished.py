"""A finished run is shown again from its directory: as a table, JSON, CSV or Markdown."""

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.replies import an_info
from support.results import a_result, set_in

from ray_probe.cli import main as cli
from ray_probe.cli.tables.listing import listing_csv, listing_markdown
from ray_probe.report.export import figures_of, result_csv, result_markdown
from ray_probe.run.directory import as_json
from ray_probe.run.result import Result
from ray_probe.system.digests import chained

RESULT = a_result() | {"schema_version": 1}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "result.json").write_text(as_json(RESULT))
    return tmp_path / "mine"


def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code, and stdout or else stderr."""
    monkeypatch.setattr(sys, "argv", ["ray-probe", "results", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, said.out or said.err


def test_the_table_is_that_of_the_run_short_or_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    code, text = called(monkeypatch, capsys, run)
    assert code == 0 and "28.41 ± 0.62 nats" in text and "Advantage" not in text
    last = text.splitlines()[-2:]
    assert last == [f"results, plots and log: {run}", f"all figures: ray-probe results {run} --verbose"]
    assert len(text.splitlines()) <= 14
    code, text = called(monkeypatch, capsys, run, "--verbose")
    assert code == 0 and "Advantage" in text and text.endswith(f"results, plots and log: {run}\n")


def test_json_is_the_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path) -> None:
    for arguments in (["--json"], ["--format", "json"], ["--json", "--format", "json"]):
        code, text = called(monkeypatch, capsys, run, *arguments)
        assert code == 0 and json.loads(text) == json.loads((run / "result.json").read_text())


def test_the_exit_code_is_that_of_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    for changes, expected in (({"partial": ["0/3"]}, 3), ({"conflicts": ["0/3"]}, 1)):
        (run / "result.json").write_text(as_json(RESULT | changes))
        assert called(monkeypatch, capsys, run, "--format", "csv")[0] == expected


def test_csv_has_every_digit_with_its_error_and_unit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    code, text = called(monkeypatch, capsys, run, "--format", "csv")
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(text))}
    assert code == 0
    assert rows["entropy.per_sequence"] == {
        "name": "entropy.per_sequence", "value": "28.412", "se": "0.618", "unit": "nats",
    }  # fmt: skip
    assert rows["config.model.path"]["value"] == "configs/models/[tiny]"
    assert rows["gradient.norm_debiased"]["value"] == repr(7.921**0.5)
    assert rows["gradient.norm_raw"]["value"] == "3.214"
    assert rows["advantage_mean_square.none"]["se"] == repr(RESULT["advantage_mean_square_se"]["none"])
    assert rows["advantage_paired.regression-constant"]["value"] == "-100.29"
    assert rows["beta.pos_frac"]["unit"] == "nats per unit of pos_frac"
    assert rows["counts.tokens"]["value"] == "81234" and rows["partial"]["value"] == "0"
    assert "gradient.norm" not in rows


def test_markdown_has_a_table_the_verdict_and_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    result = json.loads((run / "result.json").read_text())
    set_in(result, "counts.truncated", 1024)
    set_in(result, "config.model.path", "a|b")
    (run / "result.json").write_text(as_json(result))
    code, text = called(monkeypatch, capsys, run, "--format", "md")
    assert code == 0
    assert text.startswith("### Entropy of responses and its gradient: a\\|b\n")
    for line in (
        "| figure | value | unit |", "| --- | --- | --- |", "| `entropy.per_sequence` | 28.41 ± 0.62 | nats |",
        "| `advantage_mean_square.regression` | 17.91 ± 0.38 | nats^2 a token |", "| `counts.tokens` | 81,234 |  |",
    ):  # fmt: skip
        assert f"\n{line}\n" in text, line
    assert "\nentropy known to 2 %; direction known to 54 % (SNR 3.37)\n" in text
    assert "\n- TRUNCATED: 50 %" in text


@pytest.mark.parametrize(
    "changes", [{}, {"beta.values": None, "entropy": {}, "gradient": {}, "advantage_paired": None}]
)
def test_what_is_null_is_empty_in_csv_and_not_available_in_markdown(changes: dict[str, Any]) -> None:
    result = a_result()
    for dotted, value in {"entropy.per_sequence_se": None, "gradient.snr": None, **changes}.items():
        set_in(result, dotted, value)
    found = Result.from_json(result)
    assert "gradient.snr,,," in result_csv(found).splitlines()
    assert "| `gradient.snr` | n/a |  |" in result_markdown(found)
    assert "None" not in result_csv(found) + result_markdown(found)
    assert {figure.name for figure in figures_of(Result())} >= {"entropy.per_sequence", "gradient.norm_raw", "partial"}


def test_measurements_are_listed_a_line_each() -> None:
    empty = replace(an_info(), id="m0004", entropy=None, gradient=None, cause='a "quoted", cause')
    items = [an_info(), empty]
    first, second = csv.DictReader(io.StringIO(listing_csv(items)))
    assert [first[key] for key in ("id", "entropy.per_sequence", "entropy.per_sequence_se")] == [
        "m0003", "28.412", "0.618",
    ]  # fmt: skip
    assert (first["gradient.norm_raw"], first["gradient.snr"]) == ("3.214", "3.37")
    assert (second["entropy.per_sequence"], second["gradient.snr"], second["cause"]) == ("", "", 'a "quoted", cause')
    lines = listing_markdown(items).splitlines()
    figures = "1 | 1,024 |  | 28.41 ± 0.62 | 2.81 | 3.37 |"
    assert lines[2] == f"| m0003 | running | /checkpoints/run-7/step-[200] |  |  | {figures}"
    assert lines[3].endswith("| n/a | n/a | n/a |")


def test_what_cannot_be_shown_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("")
    (tmp_path / "begun" / "rounds.jsonl").write_bytes(chained('{"round": 0, "group": [0, 0]}', 0)[0])
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "result.json").write_text("{")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_text("[1]")
    for path, words in {
        "nowhere": ("no such directory",),
        "empty": ("need the directory of a run, with result.json in it",),
        "begun": ("no result.json yet, and 1 finished rounds", f"run --resume {tmp_path / 'begun'}"),
        "damaged": ("result.json cannot be read",),
        "other": ("holds no result",),
        "": ("it holds some; give one: damaged, mine, other",),
        "mine/result.json": ("no such directory; give that of a run",),
    }.items():
        code, text = called(monkeypatch, capsys, tmp_path / path)
        assert code == 2 and text.startswith("error: RUN_DIR: got ") and text.count("\n") == 1, text
        assert all(word in text for word in words), text


def test_two_formats_at_once_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    code, text = called(monkeypatch, capsys, run, "--json", "--format", "csv")
    assert code == 2 and text.startswith("error: --format: got 'csv'; --json is another format")


def test_a_name_is_a_directory_only_where_one_is_there_and_no_service_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    assert called(monkeypatch, capsys, "mine")[0] == 0
    code, text = called(monkeypatch, capsys, "mine", "--run", "demo")
    assert code == 2 and "demo" in text
    code, text = called(monkeypatch, capsys, "m0001")
    assert code == 2 and "m0001" not in text, "an id needs a service, and no service is up"
