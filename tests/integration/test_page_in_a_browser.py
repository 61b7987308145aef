"""The live page in a real browser, against a server with the service's token, policy and answers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.browser import Tab, chromium, save, tab
from support.page_data import a_comparison, a_series, all_series, infos, replies, status
from support.page_server import TOKEN, PageServer, serving

from ray_probe.page.words import Words
from ray_probe.report.number_format import with_error

pytestmark = pytest.mark.slow
LOST = "net::ERR"
REFUSED = "403"
CUT = """() => [...document.querySelectorAll('.number, .value, .big b, .heat td, dd, .readout span')]
    .filter((one) => one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).display !== 'inline')
    .map((one) => one.innerText)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def server() -> Iterator[PageServer]:
    with serving(replies()) as started:
        yield started


def opened(browser: Any, server: PageServer, **options: Any) -> Any:
    """Open the page and wait for its last part."""
    context = tab(browser, **options)
    found = context.__enter__()
    found.page.goto(server.url())
    found.wait_for("All figures of m0002")
    server.wait_for_stream()
    return found, context


@pytest.fixture
def page(browser: Any, server: PageServer) -> Iterator[Tab]:
    found, context = opened(browser, server)
    yield found
    context.__exit__(None, None, None)


def test_the_first_screen_says_entropy_and_change_with_errors_and_units(page: Tab) -> None:
    newest, change = all_series()[1].points[-1], all_series()[1].changes[-1]
    said = page.text("#headline")
    assert f"{with_error(newest.entropy.value, newest.entropy.se)} nats a response" in said
    assert f"{with_error(newest.per_token.value, newest.per_token.se)} nats a token" in said
    assert f"at step {newest.step}, 512 responses" in said
    total = with_error(change.total.value, change.total.se, plus=True)
    assert f"step 25 to step 30: entropy changed by {total} nats a response" in said
    assert f"Since the first checkpoint: {with_error(change.since_first.value, change.since_first.se)}" in said


def test_every_part_of_a_service_is_there(page: Tab) -> None:
    for selector, words in {
        "#top": ("service demo", "measuring", "live", "round 2 of 4"),
        "#wrong": ("LAST FAILURE: actor 5 on 10.0.0.8 died", "m0004 failed: model.path"),
        "#series": ("grpo-plain", "pathwise: at the states visited", "Change by layer and kind, nats a response"),
        "#running": ("3 of 8 sampled, 1 of 8 finished", "449 tokens/s", "Time left about", "Queue: 2 waiting"),
        "#measurements": ("m0001", "m0004", "against grpo-plain/checkpoint-0", "-0.260 ± 0.074"),
        "#noise": ("0.0434 ± 0.0010", "pos_frac", "-39.02", "nats per unit of the feature"),
        "#actors": ("asked 3, alive 2, starting 1", "accumulate shard 0 of round 2, leaving", "Last failure: actor 5"),
        "#result": (Words.of(a_comparison()).verdict, "To do: nothing"),
    }.items():
        for word in words:
            assert word in page.text(selector), (selector, word)
    assert page.page.locator("canvas").count() == 3


def test_nothing_leaves_the_service_and_the_token_leaves_the_address(page: Tab, server: PageServer) -> None:
    base = server.url(None)
    assert all(url.startswith(base) or url.startswith("data:") for url in page.requests)
    assert page.page.url == base and TOKEN not in "".join(page.requests)
    assert page.page.evaluate("sessionStorage.getItem('ray-probe-token')") == TOKEN
    page.page.reload()
    page.wait_for("All figures of m0002")


def test_the_stream_moves_the_page(page: Tab, server: PageServer) -> None:
    progress = replace(status().progress, round=2, collected=8, accumulated=7, tokens=30000, elapsed_s=60.0)
    server.send("status", status(progress=progress, queued=()).to_json())
    page.wait_for("8 of 8 sampled, 7 of 8 finished", "#running")
    page.wait_for("Queue: nothing waits.", "#running")
    server.replies["series"] = [a_series("grpo-late", 0.2, 5).to_json()]
    server.send("result", {"id": "m0003", "state": "done"})
    page.wait_for("grpo-late", "#headline")
    server.send("status", status(state="idle", measurement=None, progress=None, last_failure=None).to_json())
    page.wait_for("No measurement runs.", "#running")
    assert "LAST FAILURE" not in page.text("#wrong")
    server.send("error", {"error": "the controller is being restarted"})
    page.wait_for("The service does not answer: the controller is being restarted", "#banner")
    server.send("status", status().to_json())
    page.page.wait_for_function("() => document.querySelector('#banner').innerText === ''")


def test_a_reader_s_choices_stay_when_figures_come_in(page: Tab, server: PageServer) -> None:
    token = page.page.get_by_role("radio", name="entropy a token")
    token.check(force=True)
    page.page.locator("select").select_option(label="mlp, all steps")
    page.wait_for("Change by layer and step, mlp, nats a response", "#series")
    server.replies["series"] = [one.to_json() for one in (*all_series(), a_series("third", 0.05, 3))]
    server.send("result", {"id": "m0003", "state": "done"})
    page.wait_for("third", "#headline")
    assert token.is_checked()
    assert "Change by layer and step, mlp" in page.text("#series")


def test_a_measurement_is_chosen_by_keyboard(page: Tab) -> None:
    page.page.get_by_label("show m0001").focus()
    page.page.keyboard.press("Enter")
    page.wait_for("All figures of m0001")
    assert page.page.evaluate("document.activeElement.getAttribute('aria-label')") == "show m0001"
    assert "entropy known to 2 %; direction known to 54 % (SNR 3.37)" in page.text("#result")


def test_charts_are_read_by_keyboard(page: Tab) -> None:
    page.page.locator(".plot").first.focus()
    for key, step in (("Home", 0), ("ArrowRight", 5), ("End", 30), ("ArrowLeft", 25)):
        page.page.keyboard.press(key)
        page.wait_for(f"grpo-plain: step {step}:", ".readout")
        point = next(point for point in all_series()[1].points if point.step == step)
        assert with_error(point.entropy.value, point.entropy.se) in page.text(".readout")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.page.evaluate(outline) == "solid"


def test_a_lost_connection_is_said_and_comes_back(browser: Any) -> None:
    with serving(replies()) as first, tab(browser, expected=LOST) as page:
        page.page.goto(first.url())
        page.wait_for("All figures of m0002")
        port = first.port
        first.stop()
        page.wait_for("Connection lost at", "#banner")
        page.wait_for("not connected", "#top")
        assert "What is shown is from before. Next try in" in page.text("#banner")
        changed = replies() | {"series": [a_series("after", 0.1, 7).to_json()]}
        with serving(changed, port):
            page.wait_for("after", "#headline")
            page.wait_for("live", "#top")
            assert page.text("#banner") == ""


def test_without_a_token_or_with_a_wrong_one_the_page_asks_for_it(browser: Any, server: PageServer) -> None:
    with tab(browser, expected=REFUSED) as page:
        page.page.goto(server.url(None))
        page.wait_for("This page needs the service's token")
        assert not [path for path in server.asked if path.startswith("/v1/")]
        for token, said in (("wrong", "The service refused this token"), (TOKEN, "All figures of m0002")):
            page.page.get_by_label("Token:").fill(token)
            page.page.keyboard.press("Enter")
            page.wait_for(said)
        assert page.page.locator("#sign-in form").count() == 0


def test_a_fault_of_the_page_is_no_lost_connection(browser: Any) -> None:
    with serving(replies() | {"series": [{"name": "no points"}]}) as server, tab(browser, expected="undefined") as page:
        with page.page.expect_event("pageerror"):
            page.page.goto(server.url())
        page.wait_for("The page failed: Cannot read properties of undefined", "#banner")
        assert server.asked.count("/v1/status") == 1


def test_a_service_that_has_measured_nothing_says_what_to_do(browser: Any) -> None:
    idle = status(state="idle", measurement=None, progress=None, queued=(), ended=0, last_failure=None)
    answers = {"status": idle.to_json(), "series": [], "results": []}
    with serving(answers) as server, tab(browser) as page:
        page.page.goto(server.url())
        page.wait_for("Queue one: ray-probe probe CHECKPOINT")
        assert "Nothing is measured yet" in page.text("#headline")
        assert "Beta: comes with the first round" in page.text("#noise")
        assert "nothing that this service can see" in page.text("#wrong")


def test_a_hostile_name_stays_text(browser: Any) -> None:
    name = "<img src=x onerror=document.title='owned'>\"'</script>"
    bad = [replace(info, checkpoint=name, cause=name, tags={name: name}) for info in infos()]
    series = replace(all_series()[0], name=name)
    answers = replies() | {"results": [info.to_json() for info in bad], "series": [series.to_json()]}
    with serving(answers) as server, tab(browser) as page:
        page.page.goto(server.url())
        page.wait_for("All figures of m0002")
        assert name in page.text("#headline") and page.page.locator("img").count() == 0
        assert page.page.title() == "demo: measuring"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1200])
def test_it_fits_the_window_and_cuts_no_number(
    browser: Any, server: PageServer, width: int, scheme: str, tmp_path: Path
) -> None:
    page, context = opened(browser, server, width=width, scheme=scheme)
    assert page.width() <= width
    assert page.page.evaluate(CUT) == []
    paper = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 28)")
    save(page, tmp_path / f"page-{width}-{scheme}.png")
    context.__exit__(None, None, None)
