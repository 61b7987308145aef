"""With the seven features of logits, a round has the record and the beta that version 0.1.1 made of it.

`tests/data/round_of_0_1_1.npz` holds, for each shard of a round of the demo checkpoint: Phi, R, positions, lengths and
prompts, and the packed record that 0.1.1 sent. It also holds beta, the betas without each shard, and the kind of CPU.
"""

from pathlib import Path

import numpy as np
import pytest

from ray_probe.core.columns import LOGIT_COLUMNS
from ray_probe.core.estimator.baselines import BaselineRule
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.records import Record, record_of_tokens, total, with_prompts
from ray_probe.system.versions import made_on

CAP, SHARDS, GROUP = 64, 4, 4
RULE = BaselineRule("regression", "leave_one_out", 1e-3, 0.9, LOGIT_COLUMNS, CAP)
ROUND = np.load(Path(__file__).parents[2] / "data" / "round_of_0_1_1.npz")


def record_of(shard: int) -> Record:
    phi_TD, r_T, position_T = (ROUND[f"{name}_{shard}"] for name in ("phi", "r", "position"))
    lengths, entropy = (ROUND[f"{name}_{shard}"].reshape(-1, GROUP) for name in ("lengths", "entropy"))
    rows_P3 = np.array([(GROUP, sum(e), sum(n)) for e, n in zip(entropy, lengths, strict=True)])
    return with_prompts(record_of_tokens(phi_TD, r_T[:, None], position_T, CAP), ROUND[f"prompts_{shard}"], rows_P3)


def assert_equal(now: np.ndarray, then: np.ndarray) -> None:
    if made_on("cpu", 1) == str(ROUND["made_on"]):
        np.testing.assert_array_equal(now, then)
    else:
        np.testing.assert_allclose(now, then, rtol=1e-12, atol=1e-12 * np.abs(then).max())


@pytest.mark.parametrize("shard", range(SHARDS))
def test_the_record_is_that_of_0_1_1(shard: int):
    record, then = record_of(shard), ROUND[f"record_{shard}"]
    sums = (
        [record.sequences, record.tokens, record.weight], record.gram_DD, record.cross_DK, record.target_sum_K,
        record.target_gram_KK, record.bin_sum_BK, record.bin_weight_B, record.prompt_ids_P, record.prompt_rows_P3,
    )  # fmt: skip
    assert_equal(np.concatenate([np.ravel(part) for part in sums]), then[5:])


def test_beta_is_that_of_0_1_1_with_and_without_each_shard():
    records = [record_of(shard) for shard in range(SHARDS)]
    fit = PublishedFit.empty(RULE, "policy").after_round(total(records, RULE.shape))
    assert fit.ridge is not None
    assert_equal(fit.ridge.beta_EK[:, 0], ROUND["beta"])
    assert_equal(np.stack([fit.for_shard(record).beta_E for record in records]), ROUND["left_out"])
