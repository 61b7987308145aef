"""Draw docs/images/page.png: the live page with two series, in a headless Chromium.

Run it from the root, with the extra `test-slow` installed: `python docs/generate_page_image.py`.
"""

import io
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.browser import chromium, tab  # noqa: E402
from support.page_data import infos, replies, status  # noqa: E402
from support.page_server import serving  # noqa: E402

FILE = Path(__file__).with_name("images") / "page.png"
WIDTH, HEIGHT, COLOURS = 1100, 1230, 128


def main() -> None:
    """Write the image with a palette, so that it is small."""
    from PIL import Image

    quiet = [info.to_json() for info in infos() if info.state != "failed"]
    answers = replies() | {"results": quiet, "status": replace(status(), last_failure=None).to_json()}
    with serving(answers) as server, chromium() as browser, tab(browser, WIDTH) as page:
        page.page.goto(server.url())
        page.wait_for("All figures of m0002")
        page.page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        drawn = page.page.screenshot()
    FILE.parent.mkdir(exist_ok=True)
    Image.open(io.BytesIO(drawn)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(FILE, optimize=True)
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
