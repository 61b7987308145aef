"""Try a model on a few tokens at load.

A response must get the same numbers when it is sampled from a cache, padded and beside other responses, as when it is
scored in one pass. The trials find out whether a model does that before anything is sampled. Features that it lacks
are not used, and a model that cannot be measured is refused.

Shape suffixes: N rows, L positions, P positions of the first pass, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import cache_utils

from ray_probe.core.estimator.parity import TOLERANCE_NATS
from ray_probe.core.policy.logits import Buffer
from ray_probe.errors import CheckpointError, ParityError, bad_value
from ray_probe.model.agreement import BROKEN, ROUNDING, gap_in_spreads, is_wide, tried_ids
from ray_probe.model.model_call import call_model
from ray_probe.model.sequences import TokenRow

if TYPE_CHECKING:
    from ray_probe.model.forward import Forward

MEASURED_TOKENS = 64
ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Types that models of transformers raise for inputs that they cannot take."""
# Caches whose every layer is of one of these exact types keep all state of a row in its keys and values.
_ROW_WISE = tuple(
    getattr(cache_utils, name)
    for name in ("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer")
    if hasattr(cache_utils, name)  # transformers before 5.20 has no DynamicIndexedLayer
)


class Traits(NamedTuple):
    """The outcome of the trials.

    Attributes:
        takes_padding: prompts of different length can share a batch, padded on the left.
        drops_rows: rows that have ended can be removed from the cache.
        cache_gap: mean gap of log p between steps from the cache and one pass over the same tokens, nats; 0.0 if it
            is only rounding.
    """

    takes_padding: bool
    drops_rows: bool
    cache_gap: float


@torch.no_grad()
def try_model(forward: "Forward") -> Traits:
    """Try a model on a few tokens.

    Raises:
        CheckpointError: its logits depend on later tokens or on other rows, its positions do not count from 0, or it
            cannot continue from its cache.
    """
    trial = Trial(forward)
    if not torch.isfinite(trial.whole_LV).all():
        return Traits(takes_padding=True, drops_rows=False, cache_gap=0.0)  # sampling raises NonFiniteError
    trial.check_scoring()
    if len(trial.ids_L) == 1:  # with a context of one token the cache is never used
        return Traits(takes_padding=False, drops_rows=False, cache_gap=0.0)
    return Traits(cache_gap=trial.cache_gap(), takes_padding=trial.takes_padding(), drops_rows=trial.drops_rows())


def check_cache_gap(forward: "Forward", tolerance_nats: float | None) -> None:
    """Refuse a model whose cache alone would fail the parity gate.

    Args:
        forward: the model, tried.
        tolerance_nats: largest mean gap that the gate allows; None: the default of the weights' dtype.

    Raises:
        ParityError: with the measured gap.
    """
    dtype = str(forward.model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    allowed = TOLERANCE_NATS.get(dtype, TOLERANCE_NATS["bfloat16"]) if tolerance_nats is None else tolerance_nats
    if forward.cache_gap > allowed:
        raise ParityError(
            f"generation.parity_tolerance: got {allowed:g} nats; steps of {type(forward.model).__name__} from its "
            f"key-value cache are {forward.cache_gap:.2g} nats a token from one pass over the same tokens, so the "
            "scored policy would not be the one that sampled: use a version of transformers, or kernels, without this "
            "gap, or allow it"
        )


def can_select(cache: Any) -> bool:
    """Return whether rows can be removed from a cache: only keys and values, by row."""
    layers = getattr(cache, "layers", ())
    plain = type(cache) in (cache_utils.Cache, cache_utils.DynamicCache)
    return plain and len(layers) > 0 and all(type(layer) in _ROW_WISE for layer in layers)


class Trial:
    """A model and the tokens of its trials.

    Attributes:
        ids_L: the tokens.
        half: number of tokens in the first half.
        whole_LV: the model's own logits of all tokens from one pass.
    """

    def __init__(self, forward: "Forward") -> None:
        self.forward = forward
        self._narrow = not is_wide(forward.model.get_input_embeddings().weight.dtype)
        self.ids_L = tried_ids(forward.model)[0]
        self.half = max(1, len(self.ids_L) // 2)
        self.whole_LV = self._alone(self.ids_L)

    def check_scoring(self) -> None:
        """Refuse a model whose logits depend on other than earlier tokens."""
        half = self.half
        if off := self._broken(self.whole_LV[:half], self._alone(self.ids_L[:half])):
            remedy = f"need a causal language model: with later tokens left out its logits are {off}"
            raise self._refusal(f"{remedy} (an encoder or embedding model?)")
        with self._refused("scoring"):
            scored_LV = self.forward.logits([_scored(self.ids_L)], pad_id=0)
            rows = [_scored(self.ids_L[:half]), _scored(self.ids_L.flip(0))]
            beside_LV = self.forward.logits(rows, pad_id=0)[:half]
        if off := self._broken(self.whole_LV, scored_LV):
            raise self._refusal(f"need a model whose positions count from 0: given them, its logits are {off}")
        if off := self._broken(self.whole_LV[:half], beside_LV):
            raise self._refusal(f"need a model that takes each row by itself: beside another, its logits are {off}")

    def cache_gap(self) -> float:
        """Measure the mean gap of log p of single steps, nats; 0.0 for rounding."""
        if self._same(self.whole_LV[self.half :], self.stepped(self.ids_L)):
            return 0.0
        # The losses of a cache add up, so more tokens are measured.
        ids_L = tried_ids(self.forward.model, MEASURED_TOKENS)[0]
        log_p_LV = torch.log_softmax(self._alone(ids_L)[self.half :].double(), dim=-1)
        gap_LV = (torch.log_softmax(self.stepped(ids_L).double(), dim=-1) - log_p_LV).abs()
        return float((log_p_LV.exp() * gap_LV).sum(dim=-1).mean())

    def stepped(self, ids_L: Tensor) -> Tensor:
        """Return the logits of all tokens after the first `half`, each from its own step."""
        stepped = []
        with self._refused("a step from its key-value cache"):
            _, cache = self._first(ids_L[None, : self.half])
            for place in range(self.half, len(ids_L)):
                logits_1V, cache = self._next(ids_L[None, place : place + 1], place + 1, cache)
                stepped.append(logits_1V)
        return torch.cat(stepped)

    def takes_padding(self) -> bool:
        """Return whether padding on the left keeps the logits, also a step later."""
        ids_L = self.ids_L[:-1]  # leaves room for padding in the context
        first = max(1, len(ids_L) - 1)
        padded_1P = torch.nn.functional.pad(ids_L[None, :first], (1, 0))
        mask_1L = torch.ones_like(self.ids_L)[None]
        mask_1L[0, 0] = 0
        try:
            logits_1V, cache = self.forward.step(padded_1P, mask_1L[:, : first + 1], None, Buffer())
            found = [logits_1V.clone()]
            if first < len(ids_L):
                found.append(self.forward.step(ids_L[None, first:], mask_1L, cache, Buffer())[0])
        except torch.OutOfMemoryError:  # the device is full, which is not about the model
            raise
        except ERRORS:
            return False
        return self._same(self.whole_LV[first - 1 : len(ids_L)], torch.cat(found))

    def drops_rows(self) -> bool:
        """Return whether a row keeps its logits after the row beside it left the cache."""
        other_L = self.ids_L.flip(0)[: self.half + 1]
        try:
            _, cache = self._first(torch.stack([self.ids_L[: self.half], other_L[:-1]]))
            if not can_select(cache):
                return False
            cache.batch_select_indices(torch.tensor([1], device=other_L.device))
            found_1V, _ = self._next(other_L[None, -1:], len(other_L), cache)
        except torch.OutOfMemoryError:  # the device is full, which is not about the model
            raise
        except ERRORS:
            return False
        return self._same(self._alone(other_L)[-1:], found_1V)

    def _alone(self, ids_L: Tensor) -> Tensor:
        with self._refused("a forward pass"):
            logits_LV: Tensor = call_model(self.forward.model, input_ids=ids_L[None], use_cache=False).logits[0]
        return logits_LV

    def _first(self, ids_NP: Tensor) -> tuple[Tensor, Any]:
        return self.forward.step(ids_NP, torch.ones_like(ids_NP), None, Buffer())

    def _next(self, ids_N1: Tensor, length: int, cache: Any) -> tuple[Tensor, Any]:
        return self.forward.step(ids_N1, ids_N1.new_ones((len(ids_N1), length)), cache, Buffer())

    def _same(self, expected_LV: Tensor, found_LV: Tensor) -> bool:
        return gap_in_spreads(expected_LV, found_LV) <= ROUNDING[self._narrow]

    def _broken(self, expected_LV: Tensor, found_LV: Tensor) -> str:
        """Describe a gap too large to measure the model; empty if it is small."""
        gap = gap_in_spreads(expected_LV, found_LV)
        return "" if gap <= BROKEN[self._narrow] else f"{gap:.2g} of their spread off"

    def _refusal(self, remedy: str) -> CheckpointError:
        return CheckpointError(bad_value("model.path", type(self.forward.model).__name__, remedy))

    @contextmanager
    def _refused(self, subject: str) -> Iterator[None]:
        """Turn errors of transformers into one line."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except ERRORS as error:
            text = " ".join(str(error).split())[:200]
            remedy = f"{subject} fails in transformers ({type(error).__name__}: {text})"
            raise self._refusal(f"{remedy}; use a version, or a model.dtype, that can") from error


def _scored(ids_L: Tensor) -> TokenRow:
    """Return a row whose scoring gives the logits after each of these tokens."""
    return ids_L[:1], torch.cat([ids_L[1:], ids_L[:1]])
