"""Finds the nuclei of a chunk of rows without sorting the vocabulary.

The search is a ladder. Its first rung takes a row's largest tokens from the blocks of the vocabulary with the largest
maxima. Where they may not hold the whole nucleus, the next rung takes more of them. A row whose nucleus is too wide for
the last rung goes to the histogram. Every rung decides by masses in float64 of scaled logits in float32 (or wider), so
the nucleus does not depend on the rung that finds it.

Shape suffixes: R rows of the chunk, V vocabulary, N some rows, K candidates of a row.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ray_probe.core.policy.logits import SamplingRule, quick_exponentials, tiles
from ray_probe.core.policy.nucleus.block_maxima import BlockMaxima
from ray_probe.core.policy.nucleus.candidates import Candidates, NucleusScratch
from ray_probe.core.policy.nucleus.histogram import wide_nuclei
from ray_probe.core.policy.nucleus.rungs import Rung

RUNGS = (32, 512, 4096)  # candidates of a row
RUNG_SHARE = 8  # a later rung is used where it holds at most 1/8 of the vocabulary
_SHORT = 512  # a vocabulary up to this size is sorted whole


def find_nuclei(logits_RV: Tensor, rule: SamplingRule, scratch: NucleusScratch) -> Iterator[Candidates]:
    """Yield the nuclei of a chunk for `top_p < 1`, each row once, in any order.

    S is every token such that the total mass of strictly more probable tokens is at most `top_p`, so S is a level
    set and ties stay together (docs/specification.md, "Sampling policy").

    Args:
        logits_RV: raw logits, float32 or wider; -inf marks a token that cannot occur.
        rule: temperature and top_p.
        scratch: memory for tables.
    """
    rows, vocabulary = logits_RV.shape
    rows_R = torch.arange(rows, device=logits_RV.device)
    if vocabulary <= _SHORT:
        values_RV, columns_RV = logits_RV.topk(vocabulary, dim=-1)
        rung = Rung(rows_R, columns_RV, values_RV, values_RV[:, :1], None, rule)
        yield rung.closed(values_RV[:, :1], rung.second_N)
        return
    blocks = BlockMaxima(logits_RV, scratch.maxima)
    largest_R1 = blocks.maxima_RM.amax(dim=-1, keepdim=True)
    weight_RV = scratch.weight.like(logits_RV)
    for tile in tiles(rows, vocabulary, logits_RV.device):
        quick_exponentials(logits_RV[:, tile], largest_R1, rule.temperature, weight_RV[:, tile])
    rungs = [size for size in RUNGS if size == RUNGS[0] or size * RUNG_SHARE <= vocabulary]
    open_N, wide, second_R = rows_R, [], torch.empty(0)
    for size, following in zip(rungs, (*rungs[1:], None), strict=True):
        columns_NK, values_NK = blocks.largest(open_N, size)
        rung = Rung(open_N, columns_NK, values_NK, largest_R1[open_N], weight_RV, rule)
        second_R = rung.second_N if size == RUNGS[0] else second_R
        if rung.closed_N.any():
            yield rung.closed(largest_R1, second_R)
        reach_N = rung.within_reach(following)
        wide.append(open_N[~rung.closed_N & ~reach_N])
        open_N = open_N[reach_N]
        if len(open_N) == 0:
            break
    yield from wide_nuclei(logits_RV, largest_R1, second_R, torch.cat(wide), rule, scratch)
