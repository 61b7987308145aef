"""Times variants in interleaved rounds, and measures peak memory."""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

MEGABYTE = 1e6
Variant = Callable[[], object]


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return the options that benchmarks of the numerics share."""
    options = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--threads", type=int, default=1, help="threads of torch; an actor with one CPU has 1")
    options.add_argument("--rounds", type=int, default=rounds)
    options.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 151_936])
    options.add_argument("--top-p", type=float, nargs="+", default=[0.95, 1.0])
    options.add_argument("--peak", help="one case as JSON, whose peak memory this process measures")
    return options


def interleaved(variants: Mapping[str, Variant], rounds: int, device: str) -> dict[str, list[float]]:
    """Time the variants in turn, round by round, after an uncounted round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for counted in range(-1, rounds):
        for name, variant in variants.items():
            _wait(device)
            start = time.perf_counter()
            result = variant()
            _wait(device)
            if counted >= 0:
                seconds[name].append(time.perf_counter() - start)
            del result
    return seconds


def seconds_of(work: Variant) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Return median, least and greatest of the ratios within each round."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}


def shown(value: Mapping[str, float], digits: int = 1) -> str:
    """Return a ratio as a table shows it."""
    return f"{value['median']:.{digits}f} [{value['least']:.{digits}f}-{value['greatest']:.{digits}f}]"


def peak_bytes(action: Variant, device: str) -> int:
    """Return the peak memory of an action above the memory before it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return int(torch.cuda.max_memory_allocated() - before)
    ctypes.CDLL(None).malloc_trim(0)  # memory freed earlier must not serve the action unseen
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_bytes("VmRSS")
    action()
    return memory_bytes("VmHWM") - before


def peak_in_fresh_process(module: str, arguments: list[str], case: Mapping[str, Any]) -> int:
    """Return the peak memory that a benchmark prints when called with `--peak`."""
    command = [sys.executable, "-m", module, *arguments, "--peak", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return int(done.stdout.split()[-1])


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def memory_bytes(field: str) -> int:
    """Return a memory field of /proc/self/status, such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)
