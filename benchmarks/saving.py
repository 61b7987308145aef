"""Writes the figures of benchmarks; imports neither Ray nor transformers."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def save(name: str, figures: dict[str, Any]) -> None:
    """Write a benchmark's figures and the machine that they were measured on."""
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "torch": version("torch")}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine} | figures, indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)}\n")


def save_for(name: str, options: Any, figures: dict[str, Any]) -> None:
    """Write the figures and options of a benchmark that can run on a GPU."""
    named = name if options.device == "cpu" else f"{name}_{options.device}"
    save(named, {"device": options.device, "threads": options.threads, "rounds": options.rounds} | figures)
