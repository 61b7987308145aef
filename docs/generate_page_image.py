r"""Draw docs/images/page.png: the live page of a real service, in Chromium.

Run it from the root, with the extra `test-slow` installed:

    ray-probe up configs/tiny.yaml --http --name demo
    ray-probe probe configs/models/tiny --series reinforce --step 0
    ray-probe probe configs/models/tiny-rl --series reinforce --step 5
    ray-probe probe configs/models/tiny-rl --against configs/models/tiny --series reinforce --step 5 \
        --set compare.parts=true
    python docs/generate_page_image.py 'http://127.0.0.1:PORT/#token=...'   # the address that `up` printed
"""

import io
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.browser import chromium, tab  # noqa: E402

FILE = Path(__file__).with_name("images") / "page.png"
WIDTH, HEIGHT, COLOURS = 1100, 1400, 256


def main(url: str) -> None:
    """Write the image with a palette, so that it is small.

    Args:
        url: of the service, with its token.
    """
    from PIL import Image

    with chromium() as browser, tab(browser, WIDTH) as page:
        page.page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        page.page.goto(url)
        page.wait_for("All figures of")
        drawn = page.page.screenshot()
    FILE.parent.mkdir(exist_ok=True)
    Image.open(io.BytesIO(drawn)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(FILE, optimize=True)
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
