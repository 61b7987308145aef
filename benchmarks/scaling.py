"""Speed-up of two Ray actors over one, and the cost of Ray over one process.

Actors are started and warm before anything is timed; seconds cover whole rounds with their commit. Two processes share
a machine's memory and often its cores, so two processes without Ray are timed for comparison.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.common import build, prepare_demo
from benchmarks.measure import ratio, shown
from benchmarks.private_ray import private_ray
from benchmarks.saving import save
from ray_probe.cluster.backend import RayBackend
from ray_probe.controller.local_backend import LocalBackend
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.run.backend import Backend
from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation.prepare import PreparedRun
from ray_probe.run.preparation.prepared import baseline_rule

ROUNDS = 5
MEASUREMENT = ("batch.rounds=2", "batch.prompts_per_round=32", "estimator.pass=one")
HELD = 10**9  # positions, more than any run has


def _run(prepared: PreparedRun, directory: RunDirectory, backend: Backend) -> dict[str, float]:
    """Return the seconds of a run's rounds, and of its actors' work in them."""
    timing = OfflineEntropyProbe(prepared.config, prepared.plan, backend, directory).run().to_json()["timing"]
    return {
        "seconds": timing["seconds"],
        "work": sum(timing[k] for k in ("generate_s", "teacher_force_s", "backward_s")),
    }


def _on_ray(prepared: PreparedRun, backend: RayBackend) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as parent:
        directory = RunDirectory.create(Path(parent), "benchmark")
        backend.open(directory, held_positions=HELD)
        return _run(prepared, directory, backend)


def _in_process(prepared: PreparedRun, rollout: Any) -> dict[str, float]:
    rule = baseline_rule(prepared.config)
    with tempfile.TemporaryDirectory() as parent:
        directory = RunDirectory.create(Path(parent), "benchmark")
        backend = LocalBackend([rollout], rule, prepared.policy_id, directory, held_positions=HELD)
        return _run(prepared, directory, backend)


def _worker(pipe: Connection) -> None:
    """Run the demo on each request, until False arrives."""
    prepared = prepare_demo(*MEASUREMENT)
    rollout = build(prepared)
    while pipe.recv():
        _in_process(prepared, rollout)
        pipe.send(None)


class Pair:
    """Two processes without Ray."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(2)]
        self._pipes = [ours for ours, _ in pipes]
        self._processes = [context.Process(target=_worker, args=(theirs,), daemon=True) for _, theirs in pipes]
        for process in self._processes:
            process.start()

    def seconds(self, at_once: int) -> float:
        """Return the seconds in which `at_once` of them run the demo once each."""
        started = time.perf_counter()
        for pipe in self._pipes[:at_once]:
            pipe.send(True)
        for pipe in self._pipes[:at_once]:
            pipe.recv()
        return time.perf_counter() - started

    def close(self) -> None:
        """End both processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(False)
            process.join()


def _measure() -> dict[str, list[dict[str, float]]]:
    """Time every variant in turn, after an uncounted round."""
    prepared, pair = prepare_demo(*MEASUREMENT), Pair()
    rollout, names = build(prepared), ("one actor", "two actors", "in process")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*names, "pair")}
    with tempfile.TemporaryDirectory() as state, private_ray(slots=3):
        backends = []
        for actors in (1, 2):
            config = prepare_demo(*MEASUREMENT, f"cluster.actors={actors}").config
            own = Path(state, str(actors))
            own.mkdir()
            backends.append(RayBackend(config, state=own))
            backends[-1].load(prepared, wait_for=actors)
        for counted in range(-1, ROUNDS):
            got = [_on_ray(prepared, backend) for backend in backends] + [_in_process(prepared, rollout)]
            alone, both = pair.seconds(1), pair.seconds(2)
            if counted >= 0:
                for name, one in zip(names, got, strict=True):
                    found[name].append(one)
                found["pair"].append({"alone": alone, "both": both})
        for backend in backends:
            backend.close()
    pair.close()
    return found


def main() -> None:
    """Measure, print, save."""
    found = _measure()
    seconds = {name: [one["seconds"] for one in runs] for name, runs in found.items() if name != "pair"}
    pair = found["pair"]
    speed_up = ratio(seconds["one actor"], seconds["two actors"])
    possible = ratio([2 * one["alone"] for one in pair], [one["both"] for one in pair])
    over = ratio(seconds["one actor"], seconds["in process"])
    idle = [1.0 - one["work"] / one["seconds"] for one in found["one actor"]]
    share = {"median": statistics.median(idle), "least": min(idle), "greatest": max(idle)}
    print(f"  two actors over one: x{shown(speed_up, 2)}; two processes without Ray over one: x{shown(possible, 2)}")
    print(f"  time of one actor over one process without Ray: {shown(over, 3)}")
    print(f"  share of one actor's time outside its work: {shown(share, 3)}   (at most 0.05 is the target)")
    for name, values in seconds.items():
        print(f"    {name:12s} {statistics.median(values) / 2:.2f} s a round of 128 responses")
    figures = {"speed_up": speed_up, "two_processes": possible, "ray_over_in_process": over, "overhead_share": share}
    save("scaling", figures | {"settings": MEASUREMENT, "cores": os.cpu_count(), "runs": found})


if __name__ == "__main__":
    main()
