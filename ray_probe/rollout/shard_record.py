"""Records and parity of a shard's scored responses."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.parity import ParityStats
from ray_probe.core.estimator.records import Record, record_of_tokens, with_prompts
from ray_probe.core.estimator.targets import Estimator, baseline_target
from ray_probe.errors import NonFiniteError
from ray_probe.model.micro_batches import to_float64
from ray_probe.model.sequences import BatchedSequences, LogprobResults


def record_of_results(
    results: LogprobResults, prompt_ids_P: npt.NDArray[np.int64], estimator: Estimator, cap: int
) -> Record:
    """Returns the record of a shard's scored responses.

    Args:
        results: the shard's responses, [b][g], scored with `compute_rb` and `return_baseline_features`.
        prompt_ids_P: id of each prompt b.
        estimator: decides the baseline's target.
        cap: max_new_tokens.

    Raises:
        NonFiniteError: a feature or target is NaN or infinite.
    """
    assert results.rb_entropies is not None and results.baseline_feats_torch is not None
    pairs = zip(_flat(results.rb_entropies), _flat(results.entropies), strict=True)
    targets = [baseline_target(h, s, estimator)[:, None] for h, s in pairs]
    phi_TD = to_float64(torch.cat(_flat(results.baseline_feats_torch)))
    return record_of_responses(phi_TD, targets, results.rb_entropies, prompt_ids_P, cap)


def record_of_responses(
    phi_TD: Array, targets: Sequence[Array], entropies: Sequence[Sequence[Array]],
    prompt_ids_P: npt.NDArray[np.int64], cap: int,
) -> Record:  # fmt: skip
    """Returns the record of a shard's responses.

    Args:
        phi_TD: columns of all their tokens.
        targets: of each response, by place [T, K].
        entropies: H of each token of each response under its sampler [b][g], nats.
        prompt_ids_P: id of each prompt b.
        cap: max_new_tokens.

    Raises:
        NonFiniteError: a feature or target is NaN or infinite.
    """
    target_TK = np.concatenate(targets)
    if not (np.isfinite(phi_TD).all() and np.isfinite(target_TK).all()):
        raise NonFiniteError("features: NaN or infinity in a shard's statistics; it was not sent")
    position_T = np.concatenate([np.arange(len(one_TK)) for one_TK in targets])
    rows = [(len(group), sum(h.sum() for h in group), sum(len(h) for h in group)) for group in entropies]
    return with_prompts(record_of_tokens(phi_TD, target_TK, position_T, cap), prompt_ids_P, np.array(rows))


def parity_of(sequences: BatchedSequences, results: LogprobResults) -> ParityStats:
    """Returns how far log q when sampled and log q when scored differ."""
    assert sequences.sample_logprobs is not None
    return ParityStats.of(
        np.concatenate(_flat(sequences.sample_logprobs)),
        -np.concatenate(_flat(results.entropies)),
        np.concatenate(_flat(results.outside_nucleus)),
    )


def _flat(nested: list[list]) -> list:  # type: ignore[type-arg]
    return [item for group in nested for item in group]
