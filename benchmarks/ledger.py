"""Cost of acknowledging a record, records lost in a crash, time to restart.

To acknowledge a record, the fitter checks, writes and fsyncs it. One write and fsync of as many bytes is measured in
turn with it. On a disk with a slow fsync, such as a shared file system, concurrent deliveries share one fsync.
"""

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import ratio, seconds_of, shown
from benchmarks.saving import save
from ray_probe.core.estimator.baselines import BaselineRule
from ray_probe.core.estimator.records import position_bins, record_of_tokens, with_prompts
from ray_probe.core.policy.features import DEFAULT_FEATURES
from ray_probe.fitter.fitter import Fitter
from ray_probe.fitter.host import FitterHost
from ray_probe.run.messages import Delivery

ACKS = 10_000
SHARDS = 100
KILLS = 10
SLOW_FSYNC_S = 0.005
SENDERS = 16
ROUNDS = 5
CAP, PROMPTS, RESPONSES = 64, 4, 4
RULE = BaselineRule("regression", "leave_one_out", 1e-3, 0.9, DEFAULT_FEATURES, CAP)


def delivery_of(seed: int) -> Delivery:
    """Return a record of the demo's size: 4 prompts, 4 responses each."""
    numbers = np.random.default_rng(seed)
    lengths = numbers.integers(1, CAP + 1, PROMPTS * RESPONSES)
    phi_TD = numbers.normal(size=(lengths.sum(), len(DEFAULT_FEATURES)))
    position_T = np.concatenate([np.arange(length) for length in lengths])
    record = record_of_tokens(phi_TD, numbers.normal(size=(len(phi_TD), 1)), position_T, CAP)
    assert len(record.bin_weight_B) == position_bins(CAP)
    rows = np.stack([np.ones(len(lengths)), numbers.normal(size=len(lengths)), lengths], axis=1)
    packed = with_prompts(record, np.arange(len(lengths)) % PROMPTS, rows).pack()
    return Delivery("policy", DEFAULT_FEATURES, 0, 0, packed, "cpu")


def _figures(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "p50_ms": 1e3 * statistics.median(ordered),
        "p99_ms": 1e3 * ordered[int(0.99 * len(ordered))],
        "per_second": len(ordered) / sum(ordered),
    }


def _acknowledge(directory: Path) -> dict[str, Any]:
    """Time `ACKS` acknowledgements, each followed by a plain write and fsync."""
    sent = [delivery_of(seed) for seed in range(SHARDS)]
    fitter = Fitter(RULE, "policy", directory / "ledger.jsonl")
    plain = os.open(directory / "plain", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    acks_s, plain_s, line = [], [], b"x" * (8 * len(sent[0].packed) * 4 // 3 + 150)
    for number in range(ACKS // SHARDS):
        for shard in range(SHARDS):
            delivery = replace(sent[shard], round=number, shard=shard)
            acks_s.append(seconds_of(lambda delivery=delivery: fitter.accept(delivery)))
            plain_s.append(seconds_of(lambda: (os.write(plain, line), os.fsync(plain))))
        fitter.close_round(number, range(SHARDS))
    rebuild_s = seconds_of(lambda: Fitter(RULE, "policy", directory / "ledger.jsonl"))
    return {
        "acknowledge": _figures(acks_s), "write_and_fsync": _figures(plain_s), "record_bytes": len(line),
        "rebuild_s": rebuild_s, "rebuilt_records": ACKS,
    }  # fmt: skip


def _together(directory: Path) -> dict[str, Any]:
    """Time deliveries from one and from `SENDERS` senders with a slow fsync."""
    host, fsync, rates = FitterHost(), os.fsync, dict[str, list[float]](one=[], many=[])
    opening = host.open(RULE, "policy", directory / "slow.jsonl", [])
    delivery = delivery_of(0)

    def slow(descriptor: int) -> None:
        fsync(descriptor)
        time.sleep(SLOW_FSYNC_S)

    os.fsync = slow
    try:
        for number in range(ROUNDS):
            for name, senders, first in (("one", 1, 0), ("many", SENDERS, SHARDS)):
                sent = [replace(delivery, round=number, shard=first + place) for place in range(SHARDS)]
                with ThreadPoolExecutor(senders) as pool:
                    seconds = seconds_of(
                        lambda pool=pool, sent=sent: list(pool.map(partial(host.accept, opening), sent))
                    )
                rates[name].append(SHARDS / seconds)
            host.fitter.close_round(number, range(2 * SHARDS))
    finally:
        os.fsync = fsync
    return {
        "slow_fsync_s": SLOW_FSYNC_S,
        "senders": SENDERS,
        "per_second": rates,
        "gain": ratio(rates["many"], rates["one"]),
    }


def _child(path: Path) -> None:
    """Acknowledge records and print them, without end."""
    sent, fitter = [delivery_of(seed) for seed in range(SHARDS)], Fitter(RULE, "policy", path)
    while True:
        number = fitter.current.round + 1
        for shard in range(SHARDS):
            if fitter.accept(replace(sent[shard], round=number, shard=shard)).status == "accepted":
                os.write(1, f"{number} {shard}\n".encode())
        fitter.close_round(number, range(SHARDS))


def _lost(path: Path) -> dict[str, int]:
    """Kill acknowledging processes; count acknowledged records that are missing."""
    chance, acknowledged = random.Random(0), set[tuple[int, int]]()
    kills = 0
    while len(acknowledged) < ACKS or kills < KILLS:
        command = [sys.executable, "-m", "benchmarks.ledger", str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for _ in range(chance.randint(1, 2 * ACKS // KILLS)):
                acknowledged.add(tuple(map(int, child.stdout.readline().split())))  # type: ignore[arg-type]
            child.send_signal(signal.SIGKILL)
            acknowledged |= {tuple(map(int, line.split())) for line in child.stdout if line.endswith("\n")}  # type: ignore[misc]
        kills += 1
    from ray_probe.fitter.ledger import read_ledger

    found = read_ledger(path).records
    return {"acknowledged": len(acknowledged), "kills": kills, "lost": len(acknowledged - set(found))}


def _recovery(directory: Path) -> dict[str, Any]:
    """Time from the SIGKILL of a fitter on Ray to its next answer."""
    from benchmarks.private_ray import private_ray
    from ray_probe.cluster.actors.fitter import fitter_actor

    with private_ray(slots=1):
        fitter = fitter_actor({}, directory / "fitter.json")
        fitter.open(RULE, "policy", directory / "ledger.jsonl", [range(SHARDS)] * (ACKS // SHARDS))
        seconds = []
        for _ in range(KILLS):
            os.kill(fitter.pid(), signal.SIGKILL)
            seconds.append(seconds_of(fitter.beta))
            assert fitter.beta().version == ACKS // SHARDS
        fitter.kill()
    return {"recovery_s": seconds, "median_s": statistics.median(seconds), "max_s": max(seconds)}


def main() -> None:
    """Measure on the disk of the temporary directory, print, save."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        costs = _acknowledge(directory)
        together = _together(directory)
        recovery = _recovery(directory)
        lost = _lost(directory / "killed.jsonl")
    for what in ("acknowledge", "write_and_fsync"):
        figures = costs[what]
        cells = "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
        print(f"  {what:16s} {cells}   (p99 of an acknowledgement at most 1 ms is the target)")
    gain = f"{SENDERS} senders deliver x{shown(together['gain'], 2)} as many records a second as one"
    print(f"  with {1e3 * SLOW_FSYNC_S:g} ms more for an fsync, {gain}")
    print(f"  rebuilt from {ACKS} records in {costs['rebuild_s']:.2f} s")
    found = f"median {recovery['median_s']:.1f}, at most {recovery['max_s']:.1f}"
    print(f"  killed on Ray, with that ledger: seconds to the next answer {found}")
    print(f"  {lost['acknowledged']} acknowledged over {lost['kills']} SIGKILLs, {lost['lost']} lost")
    save("ledger", {**costs, "together": together, "recovery": recovery, "killed": lost})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _child(Path(sys.argv[1]))
    else:
        main()
