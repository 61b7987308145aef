"""Builds `result.json` from the totals of the committed rounds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.baselines import MODES
from ray_probe.core.estimator.parity import ParityStats
from ray_probe.core.estimator.variance import GradientNoise, clustered_ratio, gradient_noise
from ray_probe.run.totals import PAIRS, Totals, as_number


def entropy_estimate(totals: Totals) -> dict[str, float | None]:
    """Entropy per sequence and per token with errors clustered by prompt, nats."""
    rows_P3 = np.array(list(totals.prompts.values())).reshape(-1, 3)
    if len(rows_P3) == 0:
        return dict.fromkeys(("per_sequence", "per_sequence_se", "per_token", "per_token_se"))
    sequence, sequence_se = clustered_ratio(rows_P3[:, 1], rows_P3[:, 0])
    token, token_se = clustered_ratio(rows_P3[:, 1], rows_P3[:, 2])
    return {
        "per_sequence": as_number(sequence),
        "per_sequence_se": as_number(sequence_se),
        "per_token": as_number(token),
        "per_token_se": as_number(token_se),
    }


def advantage_by_mode(totals: Totals) -> dict[str, dict[str, float | None]]:
    """Mean (nats), centred variance and mean square (nats^2) of the advantage per token, by mode."""
    result: dict[str, dict[str, float | None]] = {}
    for index, mode in enumerate(MODES):
        total, squares = totals.advantage_SM2[:, index].sum(axis=0)
        mean, mean_square = (total / totals.tokens, squares / totals.tokens) if totals.tokens else (np.nan, np.nan)
        result[mode] = {
            "mean": as_number(mean),
            "variance": as_number(mean_square - mean**2),
            "mean_square": as_number(mean_square),
        }
    return result


def _estimate(
    numerator_S: Array, denominator_S: Array, independent: bool, key: str = "value"
) -> dict[str, float | None]:
    with np.errstate(invalid="ignore", divide="ignore"):
        value, error = clustered_ratio(numerator_S, denominator_S)
    return {key: as_number(value), "se": as_number(error) if independent else None}


def _advantage_sections(totals: Totals, independent: bool) -> dict[str, Any]:
    """Advantages by mode; their errors take shards for clusters, so there are none unless those are independent."""
    by_mode = advantage_by_mode(totals)
    tokens_S = totals.sizes_S3[:, 1]
    squares: dict[str, Array] = {mode: totals.advantage_SM2[:, index, 1] for index, mode in enumerate(MODES)}
    return {
        "advantage_variance": {mode: values["variance"] for mode, values in by_mode.items()},
        "advantage_mean_square": {mode: values["mean_square"] for mode, values in by_mode.items()},
        "advantage_mean_square_se": {mode: _estimate(squares[mode], tokens_S, independent)["se"] for mode in MODES},
        "advantage_mean_square_ratio": {mode: _estimate(squares[mode], squares["none"], independent) for mode in MODES},
        "advantage_paired": [
            {"mode": mode, "against": against}
            | _estimate(squares[mode] - squares[against], tokens_S, independent, "difference")
            for mode, against in PAIRS
        ],
    }


def _positions(totals: Totals, cap: int) -> dict[str, list[float | None]]:
    weight_B, target_B, mu_hat_B = totals.bins_3B
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (target_B / weight_B, mu_hat_B / weight_B)
    return {
        "edges": np.linspace(0, cap, len(weight_B) + 1).tolist(),
        "tokens": weight_B.tolist(),
        "target_mean": [as_number(x) for x in means[0]],
        "mu_hat_mean": [as_number(x) for x in means[1]],
    }


def round_summary(
    number: int,
    totals: Totals,
    fit: dict[str, Any],
    records: Sequence[int],
    by_actor: Mapping[int, Sequence[int]],
) -> dict[str, Any]:
    """One line of rounds.jsonl; `records` are the shards whose record the fit holds."""
    return {
        "round": number,
        "shards": len(totals.shards),
        "sequences": totals.sequences,
        "tokens": totals.tokens,
        "eos_only": totals.counts["eos_only"],
        "truncated": totals.counts["truncated"],
        "shards_retried": totals.counts["shards_retried"],
        "given_up": totals.given_up,
        "records": list(records),
        "shards_by_actor": {str(actor): list(shards) for actor, shards in by_actor.items()},
        "beta_version": fit["version"],
        "beta": fit["values"],
        "fit": fit,
        "advantage": advantage_by_mode(totals),
        "entropy": entropy_estimate(totals),
        "parity": _parity(totals.parity),
        "seconds": totals.seconds["seconds"],
    }


def _parity(parity: ParityStats) -> dict[str, float]:
    return {
        "mean_gap": parity.mean_gap,
        "p99_gap": parity.quantile(0.99),
        "max_gap": parity.gap_max,
        "outside_nucleus": parity.outside_share,
    }


def build_result(
    config: dict[str, Any], beta: dict[str, Any], totals: Totals, gradient_norm_sq: float, actors: int
) -> dict[str, Any]:
    """The object of result.json (spec section 9).

    Args:
        config: the resolved configuration.
        beta: the fitter's global fit.
        totals: everything that counts.
        gradient_norm_sq: squared norm of the gradient summed over all responses.
        actors: rollout actors asked for.
    """
    repeated = totals.repeated_prompts(config["batch"]["responses_per_prompt"])
    noise = gradient_noise(gradient_norm_sq, totals.sizes_S3[:, 2], totals.sizes_S3[:, 0])
    if repeated:  # shards that share a prompt are not independent, and no shard figure can tell how much
        noise = GradientNoise(noise.norm_raw, None, None, None, None)
    seconds = totals.seconds
    return {
        "schema_version": 1,
        "config": config,
        "beta": beta,
        **_advantage_sections(totals, independent=not repeated),
        "entropy": entropy_estimate(totals),
        "gradient": vars(noise),
        "parity": _parity(totals.parity),
        "positions": _positions(totals, config["generation"]["max_new_tokens"]),
        "counts": {
            "rounds": totals.rounds,
            "shards": len(totals.shards),
            "sequences": totals.sequences,
            "tokens": totals.tokens,
            **totals.counts,
            "repeated_prompts": repeated,
            "actors": actors,
        },
        "partial": totals.given_up or False,
        "conflicts": totals.conflicts,
        "timing": seconds | {"tokens_per_second": totals.tokens / seconds["seconds"] if seconds["seconds"] else None},
    }
