"""What a service beside a training run answers, for tests of the page: two series of seven checkpoints."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ray_probe.controller.replies import MeasurementInfo, Status
from ray_probe.page.words import Words
from ray_probe.run.comparison.change import ChangeFigure, Figure, PartChange
from ray_probe.run.result import Entropy, Result
from ray_probe.run.series import Series, SeriesChange, SeriesPoint
from support.replies import a_beta, a_status, a_variance, an_info

RECORDED = Path(__file__).parents[1] / "data" / "comparison_result.json"
STEPS = tuple(range(0, 35, 5))
LAYERS, KINDS = 4, ("q", "k", "v", "o", "mlp", "norms")


def a_comparison() -> Result:
    """Return the result of a comparison of the demo's checkpoints with parts, as it was recorded."""
    return Result.from_json(json.loads(RECORDED.read_text()))


def a_series(name: str, falls: float, seed: int, parts: bool = True) -> Series:
    """Return a series whose entropy falls by a share a step.

    Args:
        name: of the series.
        falls: share of the entropy that is lost from step to step.
        seed: of the noise.
        parts: also the parts of the update.
    """
    noise = random.Random(seed)
    levels = [9.2 * math.exp(-falls * place) for place in range(len(STEPS))]
    points = tuple(
        SeriesPoint(
            step, f"/runs/{name}/checkpoint-{step}", {"lr": "1e-6"}, (f"m{place + 1:04d}",), 512,
            Figure(level + noise.gauss(0, 0.12), 0.35), Figure(level / 29 + noise.gauss(0, 0.002), 0.0081),
            Figure(29.0 + 0.4 * place, 1.2), 0.012 + 0.004 * place, 2.2 - 0.2 * place, 2.3e-7,
        )
        for place, (step, level) in enumerate(zip(STEPS, levels, strict=True))
    )  # fmt: skip
    changes = tuple(_change(name, place, levels, noise, parts) for place in range(1, len(STEPS)))
    return Series(name, points, changes, open=1, failed=0)


def _change(name: str, place: int, levels: Sequence[float], noise: random.Random, parts: bool) -> SeriesChange:
    whole = levels[place] - levels[place - 1]
    pathwise = 1.25 * whole + noise.gauss(0, 0.02)
    found = tuple(
        PartChange(f"layer {layer} {kind}", whole * noise.random() / 12, 0.012)
        for layer in range(LAYERS)
        for kind in KINDS
    )
    before, after = STEPS[place - 1], STEPS[place]
    rest = (PartChange("embedding", whole / 40, 0.004), PartChange("head", whole / 8, 0.005))
    return SeriesChange(
        first_step=before, last_step=after, first_checkpoint=f"/runs/{name}/checkpoint-{before}",
        last_checkpoint=f"/runs/{name}/checkpoint-{after}", measurement=f"c{place:04d}", responses=512,
        total=_figure(whole, 0.071), pathwise=_figure(pathwise, 0.024),
        visitation=_figure(whole - pathwise, 0.066), per_token=Figure(whole / 29, 0.0025), length=Figure(0.4, 0.21),
        since_first=Figure(levels[place] - levels[0], 0.07 * math.sqrt(place)), js=0.05,
        effective_sample_share=0.48, parts=(*found, *rest) if parts else (),
    )  # fmt: skip


def _figure(value: float, se: float) -> ChangeFigure:
    return ChangeFigure(value, se, None, (value - 1.98 * se, value + 1.98 * se))


def all_series() -> list[Series]:
    """Return two runs of training, side by side."""
    return [a_series("grpo-entropy-bonus", 0.035, 1), a_series("grpo-plain", 0.11, 2)]


def infos() -> list[MeasurementInfo]:
    """Return a gradient measurement, a comparison, a failed one and one at work."""
    compared = a_comparison()
    assert compared.change is not None
    done = replace(
        working(0), id="m0001", state="done", rounds=4, finished="2026-05-01T12:20:00+00:00", exit_code=0,
    )  # fmt: skip
    comparison = replace(
        done, id="m0002", checkpoint="/runs/grpo-plain/checkpoint-5", against="/runs/grpo-plain/checkpoint-0", step=5,
        entropy=compared.entropy, gradient=compared.gradient, change=compared.change.total, sequences=512,
    )  # fmt: skip
    failed = replace(
        done, id="m0004", state="failed", rounds=0, sequences=0, entropy=None, gradient=None, step=10, exit_code=2,
        checkpoint="/runs/grpo-plain/checkpoint-10",
        cause="model.path = '/runs/grpo-plain/checkpoint-10': it is gone; give a checkpoint that is there",
    )  # fmt: skip
    return [done, comparison, failed, working(15)]


def working(step: int) -> MeasurementInfo:
    """Return the measurement of a checkpoint of the second run of training."""
    (point,) = [point for point in all_series()[1].points if point.step == step]
    entropy = Entropy(point.entropy.value, point.entropy.se, point.per_token.value, point.per_token.se)
    return replace(an_info(), series="grpo-plain", step=step, checkpoint=point.checkpoint, entropy=entropy)


def status(**changes: object) -> Status:
    """Return the status of a service at work with one actor that died."""
    own: dict[str, object] = {"measurement": working(15), "queued": ("m0005", "m0006"), "actors_starting": 1}
    own["last_failure"] = "actor 5 on 10.0.0.8 died: killed by the system for its memory"
    return replace(a_status(), **(own | changes))  # type: ignore[arg-type]


def replies() -> dict[str, object]:
    """Return the JSON of each path under `/v1/`."""
    from support.results import typed

    results = {"m0001": typed(), "m0002": a_comparison()}
    answers: dict[str, object] = {
        "status": status().to_json(), "series": [one.to_json() for one in all_series()],
        "results": [info.to_json() for info in infos()], "beta": a_beta().to_json(), "variance": a_variance().to_json(),
    }  # fmt: skip
    for info in infos():
        result = results.get(info.id)
        words = None if result is None else Words.of(result).to_json()
        found = None if result is None else result.to_json()
        answers[f"results/{info.id}"] = {"info": info.to_json(), "result": found, "words": words}
    return answers
