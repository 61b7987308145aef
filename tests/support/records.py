"""Records of shards that no model made, for the fitter, its ledger and its actor."""

from dataclasses import replace

import numpy as np

from ray_probe.core.estimator.baselines import BaselineRule, Fit
from ray_probe.core.estimator.records import Record, record_of_tokens, with_prompts
from ray_probe.fitter.fitter import Fitter
from ray_probe.run.messages import Delivery

CAP = 8
FEATURES = ("H", "top1", "pos_frac")
POLICY = "0123abcd"
MADE_ON = "cpu of a kind"


def rule(fit: Fit = "leave_one_out") -> BaselineRule:
    return BaselineRule("regression", fit, 1e-3, 0.9, FEATURES, CAP)


def some_record(round_number: int, shard: int) -> Record:
    numbers = np.random.default_rng([round_number, shard])
    lengths = numbers.integers(1, CAP + 1, 4)
    phi_TD = numbers.normal(size=(lengths.sum(), len(FEATURES)))
    target_TK = 9.0 + phi_TD @ np.array([[1.0], [-3.0], [0.1]]) + numbers.normal(size=(lengths.sum(), 1))
    position_T = np.concatenate([np.arange(length) for length in lengths])
    rows = np.stack([np.ones(4), numbers.normal(size=4), lengths], axis=1)
    return with_prompts(record_of_tokens(phi_TD, target_TK, position_T, CAP), np.array([shard, shard, 0, 1]), rows)


def delivery(round_number: int, shard: int) -> Delivery:
    return Delivery(POLICY, FEATURES, round_number, shard, some_record(round_number, shard).pack(), MADE_ON)


def other_bytes(round_number: int, shard: int) -> Delivery:
    packed = some_record(round_number, shard).pack()
    packed[-2] += 1e-9
    return replace(delivery(round_number, shard), packed=packed)


def work_rounds(fitter: Fitter, rounds: int, shards: int = 5, first: int = 0) -> None:
    for number in range(first, rounds):
        for shard in range(shards):
            fitter.accept(delivery(number, shard))
        fitter.close_round(number, range(shards))


def bits(fitter: Fitter) -> tuple[object, ...]:
    """Everything that a fitter has learnt, to the bit."""
    fit = fitter.current
    average, ridge = fit.position_average(), fit.ridge
    return (
        fit.version,
        fit.round,
        fit.total.pack().tobytes(),
        fit.latest.pack().tobytes(),
        average.mean_B.tobytes(),
        average.seen_B.tobytes(),
        None if ridge is None else (ridge.beta_EK.tobytes(), ridge.condition_number, ridge.r2_K),
    )
