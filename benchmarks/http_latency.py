"""Time that a service takes to answer /v1/status beside two busy actors.

Requests are due at a fixed rate, whatever became of earlier ones: the time of each counts from when it was due. Each
has a connection of its own, as those of many clients have.
"""

import http.client
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from benchmarks.common import DEMO
from benchmarks.saving import ROOT, save
from ray_probe.service.client import ProbeClient

PER_SECOND, SECONDS, THREADS = 20, 60, 16
MOST_MS = 100.0
LAUNCH = [sys.executable, str(ROOT / "launch.py")]


def _launch(*arguments: str) -> str:
    done = subprocess.run([*LAUNCH, *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout


def _requests(url: str) -> list[float]:
    """Return the milliseconds of each request, sent at its time by one of some threads."""
    parts, token = urlsplit(url), url.partition("#token=")[2]
    began = time.perf_counter() + 0.5
    paused = threading.Event()

    def ask(number: int) -> float:
        due = began + number / PER_SECOND
        paused.wait(max(0.0, due - time.perf_counter()))
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=30)
        connection.request("GET", "/v1/status", headers={"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        if answer.status != 200:
            raise RuntimeError(f"/v1/status answered with {answer.status}")
        return 1000.0 * (time.perf_counter() - due)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(ask, range(PER_SECOND * SECONDS)))


def _figures(milliseconds: list[float]) -> dict[str, float]:
    ordered = sorted(milliseconds)

    def quantile(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {"requests": len(ordered), "median_ms": quantile(0.5), "p95_ms": quantile(0.95), "p99_ms": quantile(0.99),
            "max_ms": ordered[-1]}  # fmt: skip


def main() -> None:
    """Serve the demo with two actors, ask it idle and while both work, and end it."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["XDG_STATE_HOME"] = home
        figures: dict[str, Any] = {"per_second": PER_SECOND, "seconds": SECONDS, "actors": 2}
        figures["load_before"] = os.getloadavg()[0]
        _launch("up", str(DEMO), "--name", "latency", "--out", home, "--actors", "2", "--http")
        try:
            url = _launch("serve", "--run", "latency").splitlines()[0]
            with ProbeClient.connect(url) as client:
                figures["idle"] = _figures(_requests(url))
                busy = client.probe(ROOT / "configs/models/tiny", settings={"batch.rounds": 1000})
                while not client.measured(busy)[0].rounds or client.status().actors_alive < 2:
                    time.sleep(0.1)
                figures["busy"] = _figures(_requests(url))
                figures["rounds_meanwhile"] = client.measured(busy)[0].rounds
                client.cancel(busy)
        finally:
            _launch("down", "--run", "latency")
    for state in ("idle", "busy"):
        found = figures[state]
        cells = "  ".join(f"{key} {found[key]:6.1f}" for key in ("median_ms", "p95_ms", "p99_ms", "max_ms"))
        print(f"  {state:5s} {cells}   of {found['requests']}")
    print(f"  the most that is wanted at the 99th percentile: {MOST_MS:g} ms")
    save("http_latency", figures)


if __name__ == "__main__":
    main()
