"""A table overwrites the previous table of its buffer, and no other."""

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch

from ray_probe.core.policy.full_vocabulary import MomentScratch
from ray_probe.core.policy.logit_gradient import TileScratch
from ray_probe.core.policy.logits import Buffer
from ray_probe.core.policy.nucleus.candidates import NucleusScratch
from ray_probe.core.policy.summarize import SummaryScratch

CPU = torch.device("cpu")


def buffers_of(scratch: Any) -> list[Buffer]:
    found: list[Buffer] = []
    for field in fields(scratch):
        value = getattr(scratch, field.name)
        found += buffers_of(value) if is_dataclass(value) else [value]
    return found


@pytest.mark.parametrize("kind", [NucleusScratch, MomentScratch, TileScratch, SummaryScratch])
def test_no_two_fields_and_no_two_scratches_share_memory(kind: type):
    buffers = [*buffers_of(kind()), *buffers_of(kind())]
    tables = [buffer.table((3, 5), torch.float32, CPU).fill_(k) for k, buffer in enumerate(buffers)]
    assert len(buffers) >= 4
    for k, table in enumerate(tables):
        assert (table == k).all()


def test_a_buffer_keeps_its_memory_until_a_table_is_larger_or_of_another_dtype():
    buffer = Buffer()
    first = buffer.table((4, 6), torch.float32, CPU)
    smaller = buffer.table((2, 3), torch.float32, CPU)
    assert smaller.data_ptr() == first.data_ptr() and smaller.shape == (2, 3) and smaller.is_contiguous()
    larger = buffer.table((5, 6), torch.float32, CPU)
    assert larger.untyped_storage().nbytes() == 5 * 6 * 4 and larger.data_ptr() != first.data_ptr()
    wide = buffer.like(larger, torch.float64)
    assert wide.dtype == torch.float64 and wide.shape == larger.shape and buffer.like(larger).dtype == torch.float32
