"""A result.json and its rounds as a run would leave them, to be spoilt by tests."""

from typing import Any

from ray_probe.core.estimator.modes import MODES
from ray_probe.run.result import Result
from ray_probe.run.rounds_file import FinishedRound

SQUARES = dict(zip(MODES, (412.3, 118.2, 24.6, 17.91), strict=True))


def a_result() -> dict[str, Any]:
    """A finished run of four rounds with nothing to warn of."""
    baseline = {"mode": "regression", "fit": "leave_one_out"}
    return {
        "schema_version": 1,
        "config": {
            "model": {"path": "configs/models/[tiny]", "adapter": None, "trainable": "all", "dtype": "float32"},
            "batch": {"prompts_per_round": 64, "responses_per_prompt": 8, "rounds": 4},
            "estimator": {"x_estimator_mode": "rb_residual", "baseline": baseline},
            "generation": {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 64, "rb_requires_grad": True},
        },
        "beta": {
            "features": ["H", "top1", "pos_frac"], "values": [0.8123, -4.31, -39.02], "version": 4, "round": 3,
            "ridge_lambda": 1e-3, "tokens": 81234, "sequences": 2048, "r2": 0.8342, "condition_number": 3.21e5,
            "fallback": None,
        },
        "advantage_variance": dict(zip(MODES, (172.1, 115.8, 24.11, 17.55), strict=True)),
        "advantage_mean_square": dict(SQUARES),
        "advantage_mean_square_se": {mode: 0.021 * square for mode, square in SQUARES.items()},
        "advantage_mean_square_ratio": {
            mode: {"value": SQUARES[mode] / 412.3, "se": 0.001, "interval": None} for mode in MODES
        },
        "advantage_paired": [
            {"mode": "regression", "against": "constant", "difference": -100.29, "se": 2.04, "interval": None},
        ],
        "entropy": {
            "per_sequence": 28.412, "per_sequence_se": 0.618, "per_token": 0.9213, "per_token_se": 0.0131,
            "per_sequence_se_within": 0.211, "per_token_se_within": 0.0044, "per_sequence_interval": [27.2, 29.62],
            "per_token_interval": [0.8956, 0.947], "clusters": 512,
        },
        "gradient": {
            "norm_raw": 3.214, "norm_debiased": 2.8144, "norm_sq_debiased": 7.921, "trace_cov": 4813.2, "snr": 3.37,
            "why_null": None,
        },
        "parity": {"mean_gap": 2.1e-7, "p99_gap": 1.2e-6, "max_gap": 3.4e-5, "outside_nucleus": 2.2e-5},
        "counts": {
            "rounds": 4, "shards": 32, "sequences": 2048, "tokens": 81234, "eos_only": 12, "truncated": 61,
            "shards_retried": 1, "actors": 5, "unfitted_shards": 0, "regenerated": 0, "repeated_prompts": 0,
        },
        "partial": False,
        "conflicts": [],
        "timing": {
            "seconds": 182.4, "tokens_per_second": 445.4, "generate_s": 301.2, "teacher_force_s": 98.1,
            "backward_s": 255.0, "fit_s": 0.21, "wait_s": 33.9,
        },
        "positions": {
            "edges": [0.0, 16.0, 32.0, 48.0, 64.0], "tokens": [900, 500, 0, 20],
            "target_mean": [30.0, 20.0, None, 1.0], "mu_hat_mean": [28.0, 21.0, None, 2.5],
        },
    }  # fmt: skip


def typed(**changes: Any) -> Result:
    """The finished run with changes by dotted key, dots written as `__`."""
    result = a_result()
    for dotted, value in changes.items():
        set_in(result, dotted.replace("__", "."), value)
    return Result.from_json(result)


def some_rounds(count: int = 3) -> list[FinishedRound]:
    """Lines of rounds.jsonl, all rounds alike."""
    advantage = {mode: {"mean": 0.1, "variance": square, "mean_square": square} for mode, square in SQUARES.items()}
    entropy = {"per_sequence": 28.0, "per_sequence_se": 1.2, "per_token": 0.92, "per_token_se": 0.03}
    rounds = [{"round": index, "advantage": advantage, "entropy": entropy} for index in range(count)]
    return [FinishedRound.from_json(entry) for entry in rounds]


def set_in(result: dict[str, Any], dotted: str, value: Any) -> None:
    """Set what a dotted path of keys leads to."""
    *path, last = dotted.split(".")
    for key in path:
        result = result[key]
    result[last] = value
