"""report.html is one file that loads nothing, says every figure, and stays whole whatever names are in it."""

import base64
import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.html_report import ReportParts, data_of, loaded_from
from support.page_data import a_comparison, all_series
from support.results import some_rounds, typed

from ray_probe.page.report_file import SCRIPTS, Entry, report_html, static_text, write_run_report
from ray_probe.page.words import Words
from ray_probe.report.number_format import with_error
from ray_probe.run.result import Result
from ray_probe.run.series import Series, SeriesPoint

MOST_BYTES = 150_000
HOSTILE = (
    "</script><script>alert(1)</script>", "<!--<script>", "</noscript><b>", "]]>", "<img src=x onerror=alert(1)>",
    "&lt;b&gt;", '"\'`${1}', "a\u2028b\u2029c", "\x00\x07", "مرحبا \u202e", "<//script >", "{data}", "{{}}",
)  # fmt: skip


def a_report() -> str:
    entries = [Entry("m0001", typed(), some_rounds()), Entry("m0002", a_comparison())]
    return report_html("Report of a service", entries, all_series())


def hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_nothing_is_loaded_and_only_the_scripts_of_the_package_may_run() -> None:
    parts = ReportParts(text := a_report())
    assert loaded_from(text) == []
    assert parts.policy == {
        "default-src": ["'none'"], "img-src": ["data:"], "base-uri": ["'none'"], "form-action": ["'none'"],
        "script-src": [hash_of(raw) for tag, attributes, raw in parts.raw if tag == "script" and not attributes],
        "style-src": [hash_of(raw) for tag, _, raw in parts.raw if tag == "style"],
    }  # fmt: skip
    assert len(parts.policy["script-src"]) == len(parts.policy["style-src"]) == 1
    assert not any(name.startswith("on") or name == "style" for _, attributes in parts.tags for name in attributes)


def test_no_script_asks_the_network_or_runs_text() -> None:
    for name in SCRIPTS[1:]:
        text = static_text(name)
        assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|EventSource|import\(|innerHTML|\beval\b", text)
        assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg"}
        assert "</" not in text and "<!--" not in text


def test_without_data_it_is_small() -> None:
    assert len(report_html("nothing", []).encode()) <= MOST_BYTES


def test_the_data_are_the_result_to_the_last_digit() -> None:
    data = data_of(a_report())
    first, second = data["entries"]
    assert (Result.from_json(first["result"]), Result.from_json(second["result"])) == (typed(), a_comparison())
    assert Words.from_json(second["words"]) == Words.of(a_comparison())
    assert [Series.from_json(one) for one in data["series"]] == all_series()
    assert [one["entropy"]["per_sequence"] for one in first["rounds"]] == [28.0] * 3


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_stays_text(name: str) -> None:
    harmless = a_report()
    result = replace(typed(), partial=(name,), conflicts=(name,))
    series = Series(name, (SeriesPoint(1, name, {name: name}),))
    text = report_html(name, [Entry(name, replace(result, config={"model": {"path": name}}))], [series])
    parts = ReportParts(text)
    kinds = [tag for tag, _ in ReportParts(harmless).tags if tag in ("script", "style", "img", "b")]
    assert [tag for tag, _ in parts.tags if tag in ("script", "style", "img", "b")] == kinds
    data = data_of(text)
    assert (data["title"], data["series"][0]["points"][0]["tags"]) == (name, {name: name})
    assert parts.policy == ReportParts(harmless).policy, "data are no part of what may run"
    assert text.count("</script>") == 2


def test_a_reader_without_scripts_has_every_figure_with_its_error_and_unit() -> None:
    result = a_comparison()
    text = ReportParts(a_report()).text
    for said in (Words.of(result).verdict, *(" ".join(row).strip() for row in Words.of(result).rows)):
        assert " ".join(said.split()) in text
    for point in (point for one in all_series() for point in one.points):
        assert with_error(point.entropy.value, point.entropy.se) in text


def test_words_are_those_of_the_command_line() -> None:
    words = Words.of(typed(partial=["0/1"]))
    assert words.verdict.startswith("PARTIAL, so perhaps biased: entropy known to 2 %")
    assert any(caveat.startswith("PARTIAL: 1 shard given up: shard 1 of round 1") for caveat in words.caveats)
    assert ("Entropy", "per sequence", "28.41 ± 0.62 nats", "± one standard error, prompts as clusters") in words.rows
    sections = [group for group, *_ in words.rows if group]
    assert sections == ["Entropy", "Gradient", "Baseline", "Paired", "Parity", "Counts", "Time"]
    assert Words.from_json(words.to_json()) == words


def test_a_run_directory_gets_its_report(tmp_path: Path) -> None:
    run = tmp_path / "run-7"
    run.mkdir()
    write_run_report(a_comparison(), some_rounds(), run)
    assert [path.name for path in run.iterdir()] == ["report.html"]
    data = data_of((run / "report.html").read_text(encoding="utf-8"))
    assert (data["title"], [entry["name"] for entry in data["entries"]]) == ("Report of run-7", ["run-7"])
