"""The error of the change between two checkpoints, and of two measurements.

Those are independent, or take common seeds. B is the demo after REINFORCE steps of configs/make_tiny_rl.py, at its
learning rate or at larger ones. All errors are scaled to 512 responses sampled in all, those of A and B together
(`benchmarks.change_runs`).
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.change_runs import BUDGET, ESTIMATORS, START, measure
from benchmarks.saving import ROOT, save
from ray_probe.rollout.loader import pin_threads

sys.path.insert(0, str(ROOT / "configs"))
import make_tiny_rl

SEED = 0
LINE = "{:12s} {:>7} {:>7} {:>7} {:>6} {:>16} {:>6} {:>6} {:>6} {:>15} {:>15}"


class Update(NamedTuple):
    """An update of the demo, and the number of prompts it is measured on."""

    name: str
    steps: int
    learning_rate: float
    prompts: int


SMALL = tuple(
    Update(f"{steps} step{'s' if steps > 1 else ''}", steps, make_tiny_rl.LEARNING_RATE, 512) for steps in (1, 5, 20)
)
LARGE = tuple(
    Update(f"KL about {kl}", 1, learning_rate, 128) for kl, learning_rate in ((2, 6.5e-4), (5, 9.7e-4), (10, 1.34e-3))
)


def updated(updates: tuple[Update, ...], directory: Path) -> Iterator[tuple[Update, Path]]:
    """Train the demo once, and yield each update that is reached with its checkpoint.

    Args:
        updates: of one learning rate.
        directory: that checkpoints are written to.
    """
    tokenizer = AutoTokenizer.from_pretrained(START, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(START, local_files_only=True).eval()
    by_steps = {update.steps: update for update in updates}
    training = make_tiny_rl.train(model, tokenizer, max(by_steps), SEED, updates[0].learning_rate)
    for step, _ in enumerate(training, start=1):
        if step in by_steps:
            checkpoint = directory / by_steps[step].name.replace(" ", "-")
            make_tiny_rl.save(model, START, checkpoint)
            yield by_steps[step], checkpoint


def show(update: Update, figures: dict[str, Any]) -> None:
    """Print the figures of an update."""
    errors = [figures["estimators"][name][f"se_at_{BUDGET}"] for name in ESTIMATORS]
    mixture, kl = figures["estimators"]["mixture"], figures["kl"]
    ratios = [figures["error_ratios"][f"mixture_to_{other}"] for other in ESTIMATORS[1:]]
    print(
        LINE.format(
            update.name, figures["prompts"], f"{kl['ab']:.2f}", f"{kl['ba']:.2f}",
            f"{figures['effective_sample_share']:.3f}", f"{mixture['value']:+.3f} +- {mixture['se']:.3f}",
            *(f"{error:.3f}" for error in errors),
            *(f"{ratio['value']:.3f} +- {ratio['se']:.3f}" for ratio in ratios),
        ),
        flush=True,
    )  # fmt: skip


def main() -> None:
    """Measure all updates, print and save."""
    logging.disable_progress_bar()
    pin_threads(1)
    print(f"errors at {BUDGET} responses: (a) mixture, (b) independent measurements, (c) common seeds")
    heads = ("update", "prompts", "KL(A,B)", "KL(B,A)", "ESS", "change (a)", "(a)", "(b)", "(c)", "(a)/(b)", "(a)/(c)")
    print(LINE.format(*heads))
    found = {}
    with tempfile.TemporaryDirectory() as parent:
        for updates in (SMALL, *((update,) for update in LARGE)):
            for update, checkpoint in updated(updates, Path(parent)):
                started = time.monotonic()
                figures = measure(checkpoint, update.prompts).figures()
                figures["seconds"]["all"] = time.monotonic() - started
                found[update.name] = {"steps": update.steps, "learning_rate": update.learning_rate} | figures
                show(update, figures)
    save("change", {"seed": SEED, "updates": found})


if __name__ == "__main__":
    main()
