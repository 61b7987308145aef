"""The lines that a run begins with name its baseline and what that reads."""

from typing import Any

import pytest

from ray_probe.config.loading import config_from_dict
from ray_probe.controller.run_log import baseline_line


def line_of(responses: int = 4, **baseline: Any) -> str:
    raw = {
        "model": {"path": "m"}, "data": {"prompts": "p.jsonl"}, "batch": {"responses_per_prompt": responses},
        "estimator": {"baseline": baseline},
    }  # fmt: skip
    return baseline_line(config_from_dict(raw))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (line_of(features=["H", "position_mean"]), "baseline regression (leave_one_out) on H, position_mean"),
        (line_of(mode="residual_mu"), "baseline residual_mu"),
        (line_of(fit="lagged", features=["H"]), "baseline regression (lagged) on H"),
    ],
)
def test_the_baseline_is_named_with_its_columns(line: str, expected: str):
    assert line == expected


def test_the_recommended_columns_are_spelled_out():
    assert line_of().endswith("pos_frac, sibling_mu, sibling_total, entropy_so_far, position_mean")
    assert "sibling" not in line_of(responses=1)
