"""Messages between rollout actors and the fitter on Ray, with its ledger.

Producers deliver as rollout actors do: each waits for the receipt before it delivers the next record. The same messages
to an idle actor show the cost of Ray alone. A round trip gathers a record from each actor, fits, and sends the fit to
each. Records have the demo's size: 7 features, 4 prompts.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from benchmarks.ledger import RULE, delivery_of
from benchmarks.measure import ratio, shown
from benchmarks.private_ray import private_ray
from benchmarks.saving import save
from ray_probe.cluster.actors.fitter import FitterHandle, fitter_actor
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.run.messages import Delivery, FitterSession, Receipt

ROUNDS = 5
PRODUCERS = (1, 2, 4, 16)
DELIVERIES = 1_000  # by all producers together, a round
TRIPS = 20
PULLS = 300
DEADLINE_S = 60.0
Figures = dict[str, Any]


class Producer:
    """Stands in for a rollout actor: delivers a record and receives a fit."""

    def __init__(self) -> None:
        self._delivery = delivery_of(0)

    def deliver(self, fitter: Any, session: FitterSession, round_number: int, first: int, count: int) -> int:
        """Deliver so many shards of a round, one after the other."""
        handle = FitterHandle(fitter)
        for shard in range(first, first + count):
            handle.accept(session, replace(self._delivery, round=round_number, shard=shard), DEADLINE_S)
        return count

    def take(self, fit: PublishedFit) -> int:
        """Receive a fit."""
        return fit.version


class Idle:
    """Acknowledges deliveries without reading them."""

    def accept(self, session: FitterSession, delivery: Delivery) -> Receipt:
        """Like the fitter's."""
        return Receipt("accepted")


class Stage:
    """The fitter with its ledger, an idle actor, and producers."""

    def __init__(self, directory: Path) -> None:
        self.fitter = fitter_actor({}, directory / "fitter.json")
        self.session = self.fitter.open(RULE, "policy", directory / "ledger.jsonl")
        self.idle = ray.remote(Idle).options(num_cpus=0).remote()
        self.producers = [ray.remote(Producer).options(num_cpus=0).remote() for _ in range(max(PRODUCERS))]
        self.round = 0

    def close_round(self, shards: int) -> PublishedFit:
        """Fit the open round."""
        fit = self.fitter.close_round(self.round, list(range(shards)), self.round)
        self.round += 1
        return fit

    def ingest(self, producers: int, receiver: Any) -> float:
        """Return deliveries a second."""
        each = DELIVERIES // producers
        started = time.perf_counter()
        sent = [
            producer.deliver.remote(receiver, self.session, self.round, place * each, each)
            for place, producer in enumerate(self.producers[:producers])
        ]
        total = sum(ray.get(sent))
        seconds = time.perf_counter() - started
        if receiver is self.fitter.actor:
            self.close_round(total)
        return total / seconds

    def trip(self, producers: int) -> float:
        """Seconds to gather a record from each producer, fit, and bring the fit to each."""
        actor, chosen = self.fitter.actor, self.producers[:producers]
        started = time.perf_counter()
        ray.get([p.deliver.remote(actor, self.session, self.round, place, 1) for place, p in enumerate(chosen)])
        fit = self.close_round(producers)
        ray.get([producer.take.remote(fit) for producer in chosen])
        return time.perf_counter() - started

    def pull(self) -> float:
        """Time a request for the current beta, seconds."""
        started = time.perf_counter()
        self.fitter.beta()
        return time.perf_counter() - started


def deliveries(stage: Stage) -> Figures:
    """Measure deliveries a second, to the fitter and to the idle actor in turn."""
    found: Figures = {}
    for producers in PRODUCERS:
        rates: dict[str, list[float]] = {"fitter": [], "idle": []}
        for counted in range(-1, ROUNDS):
            for name, receiver in (("fitter", stage.fitter.actor), ("idle", stage.idle)):
                rate = stage.ingest(producers, receiver)
                if counted >= 0:
                    rates[name].append(rate)
        median = {name: statistics.median(values) for name, values in rates.items()}
        share = ratio(rates["fitter"], rates["idle"])
        print(
            f"  {producers} producers: {median['fitter']:6.0f} deliveries/s "
            f"({min(rates['fitter']):.0f}-{max(rates['fitter']):.0f}), {shown(share, 2)} of an idle actor"
        )
        found[str(producers)] = {"per_second": rates, "median": median, "over_idle": share}
    return found


def trips(stage: Stage) -> Figures:
    """Measure round trips by number of actors, and requests for beta."""
    found: Figures = {}
    for producers in PRODUCERS:
        stage.trip(producers)
        found[str(producers)] = _figures([stage.trip(producers) for _ in range(TRIPS)])
        allowed = 2.0 * producers + 5.0
        print(
            f"  fit round, {producers} actors: {_shown(found[str(producers)])}   (at most {allowed:.0f} is the target)"
        )
    found["beta"] = _figures([stage.pull() for _ in range(PULLS)])
    print(f"  pull of beta: {_shown(found['beta'])}   (at most 2 is the target)")
    return found


def _figures(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(1e3 * value for value in seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"p50_ms": statistics.median(ordered), "p99_ms": p99, "least_ms": ordered[0], "calls": len(ordered)}


def _shown(figures: dict[str, float]) -> str:
    return f"p50 {figures['p50_ms']:.2f} ms, p99 {figures['p99_ms']:.2f} ms of {figures['calls']:.0f}"


def main() -> None:
    """Measure, print, save."""
    with tempfile.TemporaryDirectory() as name, private_ray(slots=1):
        stage = Stage(Path(name))
        figures = {"deliveries": deliveries(stage), "round_trips": trips(stage)}
        stage.fitter.kill()
    save("ray_messages", figures | {"rounds": ROUNDS, "deliveries_a_round": DELIVERIES})


if __name__ == "__main__":
    main()
