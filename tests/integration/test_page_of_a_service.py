"""The live page in a real browser, of a real service on a cluster of its own."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import Tab, chromium, save, tab
from support.checkpoints import write_checkpoint
from support.html_report import data_of
from support.served import served
from support.shell import Shell

from ray_probe.report.number_format import with_error
from ray_probe.run.directory import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.own_cluster, pytest.mark.timeout(600)]
STARTS_MS = 240_000  # limits are for a machine with other work


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, str]]:
    with served(tmp_path_factory.mktemp("home"), rounds=3) as found:
        yield found


@pytest.fixture(scope="module")
def page(service: tuple[Shell, str]) -> Iterator[Tab]:
    with chromium() as browser, tab(browser) as found:
        found.page.set_default_timeout(STARTS_MS)
        found.page.goto(service[1])
        yield found


def appears(page: Tab, text: str, selector: str) -> None:
    """Wait until the page says something that a measurement takes a while for."""
    said = "([s, t]) => document.querySelector(s).innerText.replace(/\\s+/g, ' ').includes(t)"
    page.page.wait_for_function(said, arg=[selector, text], timeout=STARTS_MS)


def test_the_page_follows_a_series_from_nothing_to_its_report(
    page: Tab, service: tuple[Shell, str], tmp_path: Path
) -> None:
    shell, url = service
    appears(page, "Nothing is measured yet", "#headline")
    appears(page, "No measurement runs", "#running")
    there = [str(write_checkpoint(tmp_path / f"checkpoint-{number}", seed=number)) for number in (0, 1)]
    shell.run("probe", there[0], "--series", "train", "--step", "0")
    compared: Any = shell.ask(
        "probe", there[1], "--against", there[0], "--series", "train", "--step", "10",
        "--set", "batch.responses_per_prompt=4", "--set", "compare.parts=true",
    )  # fmt: skip
    appears(page, "step 0 to step 10:", "#headline")
    appears(page, "All figures of m0002", "#result")
    appears(page, "idle", "#top")
    directory = Path(compared["directory"])
    change = RunDirectory(directory).result().change  # type: ignore[union-attr]
    assert change is not None
    total = with_error(change.total.value, change.total.se, plus=True)
    for selector in ("#measurements", "#result"):
        assert total in page.text(selector)
    for part in change.parts:
        assert with_error(part.value, part.se, plus=True) in page.text("#result")
    assert page.text("#banner") == "" and "asked 1, alive 1" in page.text("#actors")
    assert all(one.startswith((url.partition("#")[0], "data:")) for one in page.requests)
    save(page, tmp_path / "service.png")
    out = tmp_path / "x.html"
    shell.run("report", "demo", "-o", out)
    data = data_of(out.read_text(encoding="utf-8"))
    assert [entry["name"] for entry in data["entries"]] == ["m0001", "m0002"]
    assert [point["step"] for point in data["series"][0]["points"]] == [0, 10]
    assert data_of((directory / "report.html").read_text(encoding="utf-8"))["entries"][0]["result"]["change"]


def test_the_page_takes_up_a_server_that_was_killed(page: Tab, service: tuple[Shell, str]) -> None:
    import psutil

    port = int(service[1].rpartition(":")[2].partition("/")[0])
    (server,) = {
        connection.pid for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }  # fmt: skip
    assert server is not None and server != os.getpid()
    psutil.Process(server).kill()
    appears(page, "Connection lost at", "#banner")
    page.page.wait_for_function("() => document.querySelector('#banner').innerText === ''", timeout=STARTS_MS)
    appears(page, "live", "#top")
    page.errors[:] = [error for error in page.errors if "net::ERR" not in error]
