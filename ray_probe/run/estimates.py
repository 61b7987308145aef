"""Builds results from the totals of the committed rounds.

Shape suffixes: S shards, P prompts, B position bins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_probe.checkpoints.tokenizer.eos import Eos
from ray_probe.config.loading import config_from_dict, load_config, without_secrets
from ray_probe.core.arrays import Array
from ray_probe.core.columns import COLUMNS
from ray_probe.core.estimator.intervals import NORMAL_PROMPTS, NORMAL_SHARDS, interval
from ray_probe.core.estimator.modes import MODES, Mode
from ray_probe.core.estimator.parity import ParityStats
from ray_probe.core.estimator.variance import clustered_ratio, errors_within, gradient_noise, noise_of_products
from ray_probe.errors import ConfigError
from ray_probe.run.comparison.change import Change
from ray_probe.run.comparison.estimates import change_estimate
from ray_probe.run.directory import RunDirectory
from ray_probe.run.gradient_products import GradientProducts
from ray_probe.run.result import (
    FEW_SHARDS,
    Beta,
    Counts,
    Entropy,
    Estimate,
    Gradient,
    PairedDifference,
    Parity,
    Positions,
    Result,
    Timing,
)
from ray_probe.run.rounds_file import Advantage, FinishedRound
from ray_probe.run.totals import PAIRS, Totals, as_number, merged

RELEASE_S = 0.5
"""For a killed controller to release its lock."""


def entropy_estimate(totals: Totals) -> Entropy:
    """Return the entropy: errors for prompts like these, and for these very prompts.

    The first take prompts as clusters, the second the scatter within uses of a prompt.
    """
    rows_P3 = np.array(list(totals.prompts.values())).reshape(-1, 3)
    if len(rows_P3) == 0:
        return Entropy()
    clusters, (responses, entropy, tokens) = len(rows_P3), rows_P3.sum(axis=0)
    sequence, sequence_se = map(as_number, clustered_ratio(rows_P3[:, 1], rows_P3[:, 0]))
    token, token_se = map(as_number, clustered_ratio(rows_P3[:, 1], rows_P3[:, 2]))
    sequence_within, token_within = map(as_number, errors_within(totals.within_3, entropy, responses, tokens))
    return Entropy(
        sequence, sequence_se, token, token_se, sequence_within, token_within,
        interval(sequence, sequence_se, clusters, NORMAL_PROMPTS), interval(token, token_se, clusters, NORMAL_PROMPTS),
        clusters,
    )  # fmt: skip


def advantage_by_mode(totals: Totals) -> dict[Mode, Advantage]:
    """Return the statistics of the advantage per token, by baseline."""
    result = {}
    for index, mode in enumerate(MODES):
        total, squares = totals.advantage_SM2[:, index].sum(axis=0)
        mean, mean_square = (total / totals.tokens, squares / totals.tokens) if totals.tokens else (np.nan, np.nan)
        result[mode] = Advantage(as_number(mean), as_number(mean_square - mean**2), as_number(mean_square))
    return result


def round_summary(
    number: int, totals: Totals, fit: Beta, records: Sequence[int], by_actor: Mapping[int, Sequence[int]]
) -> FinishedRound:
    """Return the line of a round in rounds.jsonl.

    Args:
        number: round in the plan.
        totals: of the round.
        fit: the global fit after it.
        records: shards whose record the fit holds.
        by_actor: actor and the shards whose gradient it computed.
    """
    counts = totals.counts
    return FinishedRound(
        round=number,
        shards=len(totals.shards),
        sequences=totals.sequences,
        tokens=totals.tokens,
        eos_only=counts["eos_only"],
        truncated=counts["truncated"],
        shards_retried=counts["shards_retried"],
        given_up=tuple(totals.given_up),
        records=tuple(records),
        shards_by_actor={str(actor): tuple(shards) for actor, shards in by_actor.items()},
        beta_version=fit.version,
        beta=fit.values,
        fit=fit,
        advantage=advantage_by_mode(totals),
        entropy=entropy_estimate(totals),
        parity=_parity(totals.parity),
        seconds=totals.seconds["seconds"],
    )


def gradient_estimate(config: Mapping[str, Any], totals: Totals, products: GradientProducts, repeated: int) -> Gradient:
    """Return the gradient's norm and noise.

    All pairs of shards count where no fit holds a shard of the same round, otherwise pairs of commits.

    Args:
        config: the resolved configuration.
        totals: everything that counts.
        products: of the commits.
        repeated: prompts that were used more than once.
    """
    baseline = config["estimator"]["baseline"]
    if totals.change is not None:
        return Gradient(why_null="is not measured by a comparison")
    if (baseline["fit"] == "lagged" or baseline["mode"] == "none") and not repeated:
        noise = gradient_noise(products.norm_sq, totals.sizes_S3[:, 2], totals.sizes_S3[:, 0])
        needed = "needs two shards"
    else:
        noise = noise_of_products(products.norm_sq, float(totals.sequences), products.cross, products.pairs)
        needed = "needs two commits that share no prompt" if repeated else "needs two commits"
    return Gradient(**vars(noise), why_null=needed if noise.trace_cov is None else None)


def build_result(
    config: Mapping[str, Any], beta: Beta, totals: Totals, products: GradientProducts, actors: int,
    eos: Eos | None = None, moved_share: float | None = None,
) -> Result:  # fmt: skip
    """Return the result of a run.

    Args:
        config: the resolved configuration.
        beta: the fitter's global fit.
        totals: everything that counts.
        products: of the gradients of the commits.
        actors: rollout actors requested.
        eos: the ids that end a response; None: the result leaves them out.
        moved_share: of a comparison (see `Change`).
    """
    repeated = totals.repeated_prompts(config["batch"]["responses_per_prompt"])
    # Shards that share a prompt are not independent, and an error of few shards is too small.
    independent = not repeated and len(totals.shards) >= FEW_SHARDS
    by_mode, tokens_S = advantage_by_mode(totals), totals.sizes_S3[:, 1]
    squares = {mode: totals.advantage_SM2[:, index, 1] for index, mode in enumerate(MODES)}
    seconds = totals.seconds
    return Result(
        config=config,
        beta=beta,
        advantage_variance={mode: advantage.variance for mode, advantage in by_mode.items()},
        advantage_mean_square={mode: advantage.mean_square for mode, advantage in by_mode.items()},
        advantage_mean_square_se={mode: _ratio(squares[mode], tokens_S, independent).se for mode in MODES},
        advantage_mean_square_ratio={mode: _ratio(squares[mode], squares["none"], independent) for mode in MODES},
        advantage_paired=tuple(
            PairedDifference(mode, against, difference.value, difference.se, difference.interval)
            for mode, against in PAIRS
            for difference in [_ratio(squares[mode] - squares[against], tokens_S, independent)]
        ),
        entropy=entropy_estimate(totals),
        gradient=gradient_estimate(config, totals, products, repeated),
        parity=_parity(totals.parity),
        positions=_positions(totals, config["generation"]["max_new_tokens"]),
        counts=Counts(
            rounds=totals.rounds, shards=len(totals.shards), sequences=totals.sequences, tokens=totals.tokens,
            repeated_prompts=repeated, actors=actors, **totals.counts,
        ),
        partial=tuple(totals.given_up) or False,
        conflicts=tuple(totals.conflicts),
        timing=Timing(
            **seconds, tokens_per_second=totals.tokens / seconds["seconds"] if seconds["seconds"] else None
        ),
        eos=eos,
        change=_change(config, totals, moved_share, independent),
    )  # fmt: skip


def _change(
    config: Mapping[str, Any], totals: Totals, moved_share: float | None, independent_shards: bool
) -> Change | None:
    """Return what a comparison found; None for a gradient."""
    if totals.change is None:
        return None
    columns = config_from_dict(config).columns
    shared = config["estimator"]["baseline"]["mode"] == "regression" and any(
        COLUMNS[name].reads == "siblings" for name in columns
    )
    cap = config["generation"]["max_new_tokens"]
    return change_estimate(totals.change, cap, shared, moved_share, independent_shards)


def write_kept_result(path: Path) -> None:
    """Write result.json of the finished rounds of a run whose controller is gone.

    Does nothing where no round is finished, or result.json holds all of them. A damaged result.json is replaced.

    Args:
        path: of the run directory.

    Raises:
        ConfigError: another process drives the run, or other files of it are damaged.
        OutputError: the file cannot be written.
    """
    directory = RunDirectory.open(path)
    with directory.held(RELEASE_S):
        rounds = directory.finished_rounds()
        if not rounds or rounds[-1].actors is None or _has_result(directory, len(rounds)):
            return
        totals, actors = merged(directory.restore(len(rounds))), rounds[-1].actors
        config = without_secrets(load_config(directory.config))
        result = build_result(config, rounds[-1].fit, totals, GradientProducts.of(rounds), actors)
        whole = config["batch"]["rounds"] == len(rounds)
        directory.write_result(replace(result, stopped_by="rounds" if whole else None))


def _has_result(directory: RunDirectory, rounds: int) -> bool:
    try:
        result = directory.result()
    except ConfigError:
        return False
    return result is not None and result.counts.rounds == rounds


def _ratio(numerator_S: Array, denominator_S: Array, independent: bool) -> Estimate:
    """Ratio of sums, with a standard error where shards are independent clusters."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value, error = clustered_ratio(numerator_S, denominator_S)
    found, shards = (as_number(value), as_number(error) if independent else None), len(numerator_S)
    return Estimate(*found, interval(*found, shards, NORMAL_SHARDS))


def _positions(totals: Totals, cap: int) -> Positions:
    weight_B, target_B, mu_hat_B = totals.bins_3B
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (target_B / weight_B, mu_hat_B / weight_B)
    target_mean, mu_hat_mean = (tuple(as_number(value) for value in mean_B) for mean_B in means)
    edges_B1 = np.linspace(0, cap, len(weight_B) + 1)
    return Positions(tuple(edges_B1.tolist()), tuple(weight_B.tolist()), target_mean, mu_hat_mean)


def _parity(parity: ParityStats) -> Parity:
    return Parity(parity.mean_gap, parity.quantile(0.99), parity.gap_max, parity.outside_share)
