"""report.html in a real browser, from a file; and the page's words and numbers against the command line's."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.browser import Tab, chromium, save, tab
from support.page_data import a_comparison, a_series, all_series
from support.results import some_rounds, typed

from ray_probe.page.report_file import Entry, write_report, write_run_report
from ray_probe.page.words import Words
from ray_probe.report.caveats import caveats
from ray_probe.report.change_plots import holm
from ray_probe.report.change_verdict import change_advice, change_caveats, change_text
from ray_probe.report.number_format import about, number, percent, signed, with_error
from ray_probe.report.table_parts import duration
from ray_probe.run.comparison.chain import names_of
from ray_probe.run.comparison.change import Change, ChangeFigure, Figure

pytestmark = pytest.mark.slow
HOSTILE = "<img src=x onerror=document.title='owned'>\"'</script><script>document.title='owned'</script></noscript>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports: of a run, of a comparison, and of two series with their measurements."""
    directory = tmp_path_factory.mktemp("reports")
    for name, result in (("run", typed()), ("comparison", a_comparison())):
        (directory / name).mkdir()
        write_run_report(result, some_rounds(), directory / name)
    entries = [Entry("m0001", typed(), some_rounds()), Entry("m0002", a_comparison())]
    write_report(directory / "all.html", "Report of a service", entries, all_series())
    return directory


def opened(page: Tab, path: Path) -> None:
    page.page.goto(path.as_uri())
    page.page.wait_for_selector("h1")
    assert [url for url in page.requests if not url.startswith("data:")] == [path.as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("name", ["run/report.html", "comparison/report.html", "all.html"])
def test_a_report_draws_itself_from_a_file(
    browser: Any, directory: Path, name: str, width: int, scheme: str, tmp_path: Path
) -> None:
    with tab(browser, width, scheme) as page:
        opened(page, directory / name)
        page.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        page.page.wait_for_function("() => document.querySelectorAll('details:not([open])').length === 0")
        if name != "comparison/report.html":
            page.page.wait_for_selector("canvas")
        assert page.width() <= width
        save(page, tmp_path / "report.png")


def test_a_report_says_what_was_found_what_it_means_and_what_to_do(browser: Any, directory: Path) -> None:
    words = Words.of(a_comparison())
    with tab(browser) as page:
        opened(page, directory / "comparison" / "report.html")
        said = page.text()
        for word in (words.title, *words.lines, words.verdict, "To do: nothing", "Which part of the update did it"):
            assert word in said
        page.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        rows = [" ".join(text.split()) for text in page.page.locator("table.figures tr").all_inner_texts()]
        for _, name, value, note in words.rows:
            assert " ".join(" ".join((name, note, value)).split()) in rows
        assert page.page.locator("details.meaning").count() >= 4


def test_parts_of_an_update_have_every_cell(browser: Any, directory: Path) -> None:
    change = a_comparison().change
    assert change is not None and len(change.parts) >= 20
    with tab(browser) as page:
        opened(page, directory / "comparison" / "report.html")
        cells = [" ".join(text.split()).removesuffix(" *") for text in page.page.locator(".heat td").all_inner_texts()]
        for part in change.parts:
            if part.group.startswith("layer "):
                assert with_error(part.value, part.se, plus=True) in cells
        assert with_error(change.remainder.value, change.remainder.se, plus=True) in page.text()


def test_a_hostile_name_stays_text(browser: Any, tmp_path: Path) -> None:
    config = {"model": {"path": HOSTILE}, "compare": {"against": HOSTILE}}
    entries = [Entry(HOSTILE, replace(typed(), config=config, partial=(HOSTILE,))) for _ in range(2)]
    path = tmp_path / "x.html"
    write_report(path, HOSTILE, entries, [replace(a_series("s", 0.1, 1), name=HOSTILE)])
    for scripts in (True, False):
        with tab(browser, scripts=scripts) as page:
            opened(page, path)
            assert page.page.title() == HOSTILE and HOSTILE in page.text()
            assert page.page.locator("img").count() == 0


def test_without_scripts_there_is_a_table(browser: Any, directory: Path) -> None:
    with tab(browser, scripts=False) as page:
        opened(page, directory / "all.html")
        said = page.text()
        assert Words.of(a_comparison()).verdict in said and "8.49 ± 0.48 nats" in said
        assert page.page.locator("table").count() == 6


@pytest.fixture(scope="module")
def called(browser: Any, directory: Path) -> Iterator[Any]:
    """Return what a function of the page's scripts returns for each list of arguments."""
    with tab(browser) as page:
        opened(page, directory / "all.html")
        code = "([name, calls]) => calls.map((one) => RayProbe.format[name](...one))"
        yield lambda name, calls: page.page.evaluate(code, [name, list(calls)])


def numbers(seed: int, count: int = 3000) -> list[float]:
    """Return numbers of every size, ties among them."""
    noise = random.Random(seed)
    wide = [noise.choice((-1, 1)) * 10 ** noise.uniform(-9, 9) for _ in range(count)]
    ties = [noise.randint(-4000, 4000) / 2 ** noise.randint(0, 12) for _ in range(count)]
    return [*wide, *ties, 0.0, -0.0, 1.0, 9.995, 0.00099995, 999999.5, 1e6, 2.5, 0.125]


def test_numbers_are_written_as_on_the_command_line(called: Any) -> None:
    values, errors = numbers(1), [abs(value) for value in numbers(2)]
    for digits in (2, 3, 4):
        assert called("number", ([v, digits] for v in values)) == [number(v, digits) for v in values]
    assert called("signed", ([v] for v in values)) == [signed(v) for v in values]
    pairs = [*zip(values, errors, strict=True), (1.5, None), (None, 1.0), (None, None), (0.5, 0.0)]
    for plus in (False, True):
        assert called("withError", ([v, e, plus] for v, e in pairs)) == [with_error(v, e, plus) for v, e in pairs]
    shares = [value for value in errors if value <= 1.0]
    assert called("percent", ([v] for v in shares)) == [percent(v, 1.0) for v in shares]
    assert called("about", ([v] for v in errors)) == [about(v) for v in errors]
    assert called("duration", ([v] for v in errors)) == [duration(v) for v in errors]
    whole = [0, 7, 1234, 12345678]
    assert called("whole", ([v] for v in whole)) == [number(v) for v in whole]
    paths = [["/a/x", "/b/x"], ["/a/x", "/a/y"], ["x"], ["/a/b/c", "/a/d/c", "/e/b/c"], ["/a/x", "/a/x"]]
    assert called("namesOf", ([one] for one in paths)) == [names_of(one) for one in paths]


def changes() -> Iterator[Change]:
    """Yield comparisons with every kind of finding."""
    found = a_comparison().change
    assert found is not None
    totals = (
        found.total, ChangeFigure(-0.05, 0.07, None, (-0.19, 0.09)), ChangeFigure(0.0, 0.0, 0.0, (0.0, 0.0)),
        ChangeFigure(0.4, None), ChangeFigure(None, None), ChangeFigure(0.4, 0.1, None, (0.2, 0.6)),
    )  # fmt: skip
    for total in totals:
        for length in (Figure(0.4, 0.1), Figure(-0.4, 0.1), Figure(None, None)):
            yield replace(found, total=total, length=replace(found.length, change=length), effective_sample_share=0.02)


def test_findings_are_said_as_on_the_command_line(called: Any) -> None:
    found, moved = list(changes()), 1.0
    asked = [[one.to_json() | {"responses": 512}] for one in found]
    assert called("changeText", asked) == [change_text(one) for one in found]
    results = [replace(a_comparison(), change=one) for one in found]
    assert called("changeAdvice", asked) == [change_advice(one) for one in results]
    assert called("changeCaveats", asked) == [change_caveats(replace(one, moved_share=moved)) for one in found]
    truncated = typed(counts__truncated=512, counts__sequences=2048, config__generation__max_new_tokens=None)
    assert called("pointCaveats", [[{"truncated": 0.25}], [{"truncated": 0.05}]]) == [
        [line for line in caveats(truncated) if line.startswith("TRUNCATED")], []]  # fmt: skip


def test_the_same_cells_are_marked_as_in_the_plots(called: Any) -> None:
    noise = random.Random(3)
    for size in (1, 5, 30, 200):
        parts = [(noise.gauss(0, 2.5), noise.choice((1.0, 0.0, 2.0))) for _ in range(size)]
        (marks,) = called("holm", [[[{"value": value, "se": se} for value, se in parts]]])
        assert marks == holm(parts) and any(marks) == any(holm(parts))
