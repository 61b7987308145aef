"""A series as a service would give it, to be varied by tests with `dataclasses.replace`."""

from ray_probe.run.comparison.change import ChangeFigure, Figure
from ray_probe.run.series import Series, SeriesChange, SeriesPoint


def a_point(step: int | None, entropy: float = 28.412, **fields: object) -> SeriesPoint:
    """A checkpoint with a gradient and a comparison behind it."""
    found = {
        "step": step, "checkpoint": f"/runs/grpo/checkpoint-{step}", "tags": {"lr": "1e-6"},
        "measurements": (f"m{step}", f"c{step}"), "responses": 2048, "entropy": Figure(entropy, 0.618),
        "per_token": Figure(0.9213, 0.0131), "length": Figure(30.84, 0.42), "truncated": 0.0298, "snr": 3.37,
        "parity_gap": 2.1e-7,
    }  # fmt: skip
    return SeriesPoint(**found | fields)


def a_change(first: int | None, last: int | None, total: float = -0.512, **fields: object) -> SeriesChange:
    """A comparison of two of its checkpoints."""
    found = {
        "first_step": first, "last_step": last, "first_checkpoint": f"/runs/grpo/checkpoint-{first}",
        "last_checkpoint": f"/runs/grpo/checkpoint-{last}", "measurement": f"c{last}", "responses": 4096,
        "total": ChangeFigure(total, 0.121), "pathwise": ChangeFigure(0.8 * total, 0.064),
        "visitation": ChangeFigure(0.2 * total, 0.093), "per_token": Figure(-0.0131, 0.0041),
        "length": Figure(-0.42, 0.18), "since_first": Figure(total, 0.121), "js": 0.0123,
        "effective_sample_share": 0.61,
    }  # fmt: skip
    return SeriesChange(**found | fields)


def a_series(name: str = "grpo", **fields: object) -> Series:
    """Three checkpoints and the changes between them; the last one's sum is not known."""
    found = {
        "points": (a_point(0), a_point(50, 27.9), a_point(100, 27.2, snr=None)),
        "changes": (a_change(0, 50), a_change(50, 100, -0.7, since_first=Figure())), "open": 2, "failed": 1,
    }  # fmt: skip
    return Series(name, **found | fields)
