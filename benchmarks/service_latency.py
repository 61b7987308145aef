"""Time that a service takes to answer the shell and a connected client.

Figures from the shell include the start of Python, whose reference is `python -c pass`. Queries run in turn, on an idle
service and during a measurement that uses every actor.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.common import DEMO
from benchmarks.measure import seconds_of
from benchmarks.saving import ROOT, save

SHELL_CALLS, CLIENT_CALLS = 20, 50
QUERIES = ("status", "beta", "variance")
LAUNCH = [sys.executable, str(ROOT / "launch.py")]


def _figures(seconds: list[float]) -> dict[str, float]:
    """Return median, 95th percentile (of 20 calls the 19th) and maximum, seconds."""
    ordered = sorted(seconds)
    p95 = ordered[max(0, round(0.95 * len(ordered)) - 1)]
    return {"median_s": statistics.median(ordered), "p95_s": p95, "max_s": ordered[-1], "calls": len(ordered)}


def _launch(*arguments: str) -> None:
    subprocess.run([*LAUNCH, *arguments], cwd=ROOT, check=True, capture_output=True)


def _python() -> None:
    subprocess.run([sys.executable, "-c", "pass"], check=True)


def _ask(client: Any) -> dict[str, Any]:
    shell = {query: [seconds_of(lambda q=query: _launch(q, "--json")) for _ in range(SHELL_CALLS)] for query in QUERIES}
    calls = {query: [seconds_of(getattr(client, query)) for _ in range(CLIENT_CALLS)] for query in QUERIES}
    return {
        "shell": {query: _figures(seconds) for query, seconds in shell.items()},
        "client": {query: _figures(seconds) for query, seconds in calls.items()},
    }


def main() -> None:
    """Start a service on the demo, query it idle and under load, and end it."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["XDG_STATE_HOME"] = home
        from ray_probe.service.client import ProbeClient

        _launch("up", str(DEMO), "--name", "latency", "--out", home)
        try:
            with ProbeClient.connect() as client:
                client.wait(client.probe(ROOT / "configs/models/tiny", settings={"batch.rounds": 1}))
                reference = [seconds_of(_python) for _ in range(SHELL_CALLS)]
                figures = {"python": _figures(reference), "idle": _ask(client)}
                busy = client.probe(ROOT / "configs/models/tiny", settings={"batch.rounds": 1000})
                while not client.result(busy)[0].rounds:
                    time.sleep(0.1)
                figures["under load"] = _ask(client)
                client.cancel(busy)
        finally:
            _launch("down")
    print(f"seconds to answer (median, 95th percentile, largest); python -c pass: {figures['python']['median_s']:.3f}")
    for state in ("idle", "under load"):
        for way, by_query in figures[state].items():
            for query, found in by_query.items():
                cells = "  ".join(f"{found[key]:.3f}" for key in ("median_s", "p95_s", "max_s"))
                print(f"  {state:10s} {way:6s} {query:8s} {cells}")
    save("service_latency", json.loads(json.dumps(figures)))


if __name__ == "__main__":
    main()
