"""Scoring a table of logits makes no table larger than a chunk but the gradient."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.token_scores import score, some_logits
from torch.utils._python_dispatch import TorchDispatchMode

from ray_probe.core.policy import sampling
from ray_probe.core.policy.features import DEFAULT_FEATURES
from ray_probe.core.policy.logits import SamplingRule


class LargeTables(TorchDispatchMode):
    """Collects tables of more than `elements` elements that operations create."""

    def __init__(self, elements: int, known: torch.Tensor) -> None:
        super().__init__()
        self.elements = elements
        self.known = {known.untyped_storage().data_ptr()}
        self.found: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.elements:
                address = tensor.untyped_storage().data_ptr()
                if address not in self.known:
                    self.found[address] = tensor
        return output


@contextmanager
def large_tables(elements: int, known: torch.Tensor) -> Iterator[dict[int, torch.Tensor]]:
    with LargeTables(elements, known) as mode:
        yield mode.found


@pytest.mark.parametrize("top_p", [0.8, 1.0])
def test_no_table_is_larger_than_a_chunk_save_the_gradient_itself(monkeypatch: pytest.MonkeyPatch, top_p: float):
    rows, vocabulary = 64, 50
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", 4 * vocabulary)
    logits = some_logits(rows, vocabulary).requires_grad_()
    with large_tables(4 * vocabulary, logits) as forward:
        statistics = score(logits, torch.arange(rows) % vocabulary, SamplingRule(0.7, top_p))
    assert not forward
    loss = (statistics.log_q_T + statistics.entropy_T).sum()
    with large_tables(4 * vocabulary, logits) as backward:
        torch.autograd.grad(loss, logits)
    assert [tensor.shape for tensor in backward.values()] == [logits.shape]


def test_what_is_kept_for_backward_is_the_logits_and_a_few_numbers_a_token():
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    logits = some_logits(64, 50).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        score(logits, torch.arange(64) % 50, SamplingRule(0.7, 0.8), DEFAULT_FEATURES)
    tables = [tensor for tensor in saved if tensor.numel() > 64]
    assert [tensor.data_ptr() for tensor in tables] == [logits.data_ptr()]
