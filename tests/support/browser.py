"""A headless Chromium for tests; what is missing fails in one line."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT_MS = 20_000


@contextmanager
def chromium() -> Iterator[Any]:
    """Start the system's Chromium for the block."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        pytest.fail("playwright is missing; install it: pip install -e '.[test-slow]'", pytrace=False)
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.fail(f"no Chromium on PATH ({', '.join(NAMES)}); install one: apt-get install chromium", pytrace=False)
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Tab:
    """A page in the browser, with what went wrong in it.

    Attributes:
        page: Playwright's page.
        errors: errors of scripts and messages of the console that are errors.
        requests: URLs that it asked for, in order.
    """

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def text(self, selector: str = "main") -> str:
        """Return the text of an element, white space joined."""
        return " ".join(self.page.locator(selector).first.inner_text().split())

    def wait_for(self, text: str, selector: str = "main") -> None:
        """Wait until an element has a text, white space joined."""
        said = "([s, t]) => document.querySelector(s).innerText.replace(/\\s+/g, ' ').includes(t)"
        self.page.wait_for_function(said, arg=[selector, text], timeout=WAIT_MS)

    def width(self) -> int:
        """Return the width that the document needs."""
        return int(self.page.evaluate("document.documentElement.scrollWidth"))


@contextmanager
def tab(
    browser: Any, width: int = 1200, scheme: str = "light", scripts: bool = True, expected: str | None = None
) -> Iterator[Tab]:
    """Open a page for the block; errors in it fail the test.

    Args:
        browser: from `chromium`.
        width: of the window, in pixels.
        scheme: light or dark.
        scripts: whether scripts may run.
        expected: part of the errors that are expected; None: none.
    """
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=scripts
    )
    found = Tab(context.new_page())
    found.page.on("pageerror", lambda error: found.errors.append(str(error)))
    found.page.on("console", lambda said: found.errors.append(said.text) if said.type == "error" else None)
    found.page.on("request", lambda request: found.requests.append(request.url))
    try:
        yield found
    finally:
        context.close()
    assert [error for error in found.errors if expected is None or expected not in error] == []


def save(opened: Tab, path: Path) -> None:
    """Save a screenshot of the whole page, for a person to look at."""
    opened.page.screenshot(path=path, full_page=True)
    assert path.stat().st_size > 10_000
