"""The parts of an update add up to the midpoint's gradient along it, without bias to 1e-9, and leave both models alone.

A shard holds one use of a prompt with two midpoint responses. Its baseline is fitted on responses of A and B, with the
shard's own record left out, and the mean over all pairs of responses is compared with the enumerated gradient.
"""

import copy
import functools
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from support.enumeration import enumerate_policy
from support.models import processor, tiny_gpt2, tiny_model

from ray_probe.core.columns import recommended
from ray_probe.core.estimator.baselines import BaselineRule, ShardBaseline
from ray_probe.core.estimator.change import ENTROPY
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.records import Record, position_bins
from ray_probe.errors import ConfigError
from ray_probe.gradient.along_update import GradientAlongUpdate
from ray_probe.gradient.parameter_groups import parameter_groups
from ray_probe.model.midpoint import check_same_tensors, replace_by_midpoint
from ray_probe.model.sequences import pack_sequences
from ray_probe.probe_components import ProbeComponents
from ray_probe.rollout.comparison import Comparison, compared
from ray_probe.rollout.midpoint import Midpoint
from ray_probe.rollout.policies import PairOrMidpoint
from ray_probe.run.messages import ShardSums
from ray_probe.run.preparation.plan import PromptRef, Shard
from ray_probe.run.totals import Totals, summed

CAP, VOCABULARY, GROUP = 2, 3, 2
PROMPT = (1, 2)
COLUMNS = recommended(GROUP)
RULE = BaselineRule("regression", "leave_one_out", 1e-3, 0.9, COLUMNS, CAP, targets=2)
POLICY = {
    "top_p": 0.85, "temperature": 1.3, "max_new_tokens": CAP, "tf_batch_size": 4096, "tf_batch_tokens": 1 << 20,
}  # fmt: skip
TOLERANCE = 1e-9


def processor_of(model: Any, **changes: Any) -> Any:
    return processor(model, "ab", features=COLUMNS, **POLICY | changes)


@functools.cache
def models() -> tuple[Any, Any]:
    return tiny_gpt2(VOCABULARY, seed=0), tiny_gpt2(VOCABULARY, seed=2)


def midpoint(a: Any, b: Any, **changes: Any) -> tuple[Midpoint, GradientAlongUpdate, Any]:
    """The midpoint of two models, which are only read."""
    middle, update = copy.deepcopy(a), copy.deepcopy(b)
    replace_by_midpoint(middle, update)
    along = GradientAlongUpdate(middle, update)
    return Midpoint(processor_of(middle, **changes), along), along, middle


def in_turns(a: Any, b: Any, **changes: Any) -> tuple[PairOrMidpoint, list[Any]]:
    """The pair and its midpoint in the memory of two models, which "loading" fills with A and B again."""
    places = [copy.deepcopy(a), copy.deepcopy(b)]

    def bring_in(side: int) -> Any:
        places[side].load_state_dict((a, b)[side].state_dict())
        return processor_of(places[side], **changes)

    def halve(first: Any, second: Any) -> Midpoint:
        replace_by_midpoint(first.model, second.model)
        return Midpoint(processor_of(first.model, **changes), GradientAlongUpdate(first.model, second.model))

    return PairOrMidpoint(bring_in, halve), places


def update_of(a: Any, b: Any) -> torch.Tensor:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return torch.cat([(q.detach().double() - p.detach().double()).flatten() for p, q in pairs])


def record_of(*responses: tuple[int, ...]) -> Record:
    """The record of a use of the prompt: the first half of the responses is of A."""
    pair = tuple(processor_of(model) for model in models())
    return compared(pair, pack_sequences([PROMPT], [list(responses)])).record(np.array([0]), CAP)


def baselines() -> list[ShardBaseline]:
    """Fits on other shards alone, with an own record that is left out; the last has no record left."""
    own, empty = record_of((1, 2), (2, 0), (1, 1), (0,)), PublishedFit.empty(RULE, "toy")
    others = [record_of((1, 1), (2, 2), (2, 1), (1, 0)), record_of((2, 0), (0,), (1, 1), (2, 2))]
    sums = [own + others[0], own + others[0] + others[1], own]
    return [empty.after_round(record).for_shard(own, ENTROPY) for record in sums]


def test_the_mean_over_all_responses_is_the_gradient_along_the_update():
    a, b = models()
    halfway, along, middle = midpoint(a, b)
    exact = enumerate_policy(middle, PROMPT, CAP, POLICY["temperature"], POLICY["top_p"])
    expected = float(exact.gradient @ update_of(a, b))
    assert abs(expected) > 1e-2
    probability = dict(zip(exact.responses, exact.probabilities, strict=True))
    uses = {use: halfway.scored(sampled([list(use)])) for use in product(probability, repeat=GROUP)}
    for baseline in baselines():
        mean_G = np.zeros(len(along.groups))
        for use, held in uses.items():
            found = halfway.parts(held, baseline)
            assert found.responses_S.tolist() == [GROUP]
            mean_G += probability[use[0]] * probability[use[1]] * found.product_SG[0] / GROUP
        assert abs(mean_G.sum() - expected) < TOLERANCE * max(1.0, abs(expected))


def test_control_a_baseline_that_reads_the_own_responses_is_biased():
    a, b = models()
    halfway, _, middle = midpoint(a, b)
    exact = enumerate_policy(middle, PROMPT, CAP, POLICY["temperature"], POLICY["top_p"])
    expected, mean = float(exact.gradient @ update_of(a, b)), 0.0
    probability = dict(zip(exact.responses, exact.probabilities, strict=True))
    pair = (halfway.processor, halfway.processor)
    for use in product(probability, repeat=GROUP):
        own = compared(pair, pack_sequences([PROMPT], [[*use, *use]])).record(np.array([0]), CAP)
        baseline = PublishedFit.empty(RULE, "toy").after_round(own).for_shard(None, ENTROPY)
        held = halfway.scored(sampled([list(use)]))
        mean += probability[use[0]] * probability[use[1]] * halfway.parts(held, baseline).product_SG.sum() / GROUP
    assert abs(mean - expected) > 1e-3 * abs(expected)


def sampled(responses: list[list[tuple[int, ...]]]) -> Any:
    """Responses with a log q when sampled, which parity needs and the parts do not."""
    return pack_sequences(
        [PROMPT] * len(responses), responses, [[np.zeros(len(y)) for y in group] for group in responses]
    )


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "llama_tied"])
def test_the_groups_add_up_to_the_product_of_the_whole_gradient(architecture: str):
    a, b = (tiny_model(architecture, VOCABULARY, seed).double() for seed in (0, 1))
    with torch.no_grad():
        for parameter in b.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms and biases are equal as they are made
    halfway, along, middle = midpoint(a, b, tf_batch_size=2, top_p=1.0)
    held = halfway.scored(sampled([[(1, 2), (2, 0)], [(1, 1), (0,)]]))
    baseline = baselines()[0]
    found_G = halfway.parts(held, baseline).product_SG[0]
    plain = copy.deepcopy(middle)
    ProbeComponents(processor_of(plain, tf_batch_size=2, top_p=1.0)).accumulate_sum_X(
        held.sequences, baseline, (), held.entropies
    )
    groups, expected = parameter_groups(plain), dict.fromkeys(along.groups, 0.0)
    for name, parameter in plain.named_parameters():
        update = b.get_parameter(name).detach() - a.get_parameter(name).detach()
        expected[groups[name]] += float((parameter.grad * update).sum())
    np.testing.assert_allclose(found_G, list(expected.values()), rtol=1e-9, atol=1e-12)
    assert found_G.sum() == pytest.approx(sum(expected.values()), rel=1e-9) and np.all(found_G != 0.0)
    assert all(parameter.grad is None for parameter in middle.parameters())


def test_a_gradient_is_freed_as_soon_as_it_is_ready_and_no_hook_stays():
    """Only an untied head, which adds to its own gradient, is still there after backward."""
    a, b = (tiny_model("llama", VOCABULARY, seed).double() for seed in (0, 1))
    halfway, along, middle = midpoint(a, b, top_p=1.0)
    held = halfway.scored(sampled([[(1, 2), (2, 0)]]))
    left: set[str] = set()

    def backward() -> None:
        halfway._components.accumulate_sum_X(held.sequences, baselines()[0], (), held.entropies)
        left.update(name for name, parameter in middle.named_parameters() if parameter.grad is not None)

    assert along.products(backward).any() and left <= {"lm_head.weight"}
    halfway._components.accumulate_sum_X(held.sequences, baselines()[0], (), held.entropies)
    assert all(parameter.grad is not None for parameter in middle.parameters()), "the hooks are gone"


def test_a_backward_pass_that_fails_leaves_no_gradient_and_no_hook():
    a, b = (tiny_model("llama", VOCABULARY, seed).double() for seed in (0, 1))
    _, along, middle = midpoint(a, b)

    def fails() -> None:
        middle.lm_head.weight.sum().backward()
        middle.model.embed_tokens.weight.grad = torch.ones_like(middle.model.embed_tokens.weight)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        along.products(fails)
    assert all(parameter.grad is None for parameter in middle.parameters())
    middle.lm_head.weight.sum().backward()
    assert middle.lm_head.weight.grad is not None


@pytest.mark.parametrize("architecture", ["llama", "llama_tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_midpoint_takes_the_place_of_a_and_the_update_that_of_b(architecture: str, dtype: torch.dtype):
    a, b = (tiny_model(architecture, VOCABULARY, seed).to(dtype) for seed in (0, 1))
    middle, update = copy.deepcopy(a), copy.deepcopy(b)
    places = [tensor.data_ptr() for model in (middle, update) for tensor in model.parameters()]
    replace_by_midpoint(middle, update)
    assert places == [tensor.data_ptr() for model in (middle, update) for tensor in model.parameters()]
    for name, parameter in middle.named_parameters():
        from_a, from_b = a.get_parameter(name).double(), b.get_parameter(name).double()
        assert parameter.dtype == dtype and torch.equal(parameter, ((from_a + from_b) / 2.0).to(dtype))
        found = update.get_parameter(name)
        assert torch.equal(found, (from_b - from_a).to(dtype))
        near = (from_b / from_a >= 0.5) & (from_b / from_a <= 2.0)
        assert torch.equal(found.double()[near], (from_b - from_a)[near]), "exact for small steps in any dtype"
    tied = middle.get_input_embeddings().weight is middle.get_output_embeddings().weight
    assert tied == (architecture == "llama_tied")


def test_models_of_another_shape_have_no_midpoint():
    with pytest.raises(
        ConfigError, match=r"^compare\.parts: got True; the checkpoints differ in \d+ tensors"
    ) as caught:
        check_same_tensors(tiny_model("llama", 3), tiny_model("gpt2", 3))
    assert "\n" not in str(caught.value) and "set it to false" in str(caught.value)
    with pytest.raises(ConfigError, match="differ in 2 tensors"):
        replace_by_midpoint(tiny_model("llama", 3), tiny_model("llama", 4))


def test_models_that_share_other_weights_have_no_midpoint():
    tied = tiny_model("llama_tied", 3)
    untied = copy.deepcopy(tied)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.clone())
    with pytest.raises(ConfigError, match=r"differ in 1 tensors \(lm_head\.weight\)"):
        check_same_tensors(tied, untied)


def assert_same(before: list[dict[str, torch.Tensor]], *after: Any) -> None:
    for earlier, model in zip(before, after, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(earlier[name], tensor), name


def shard(index: int, group: int = 4) -> Shard:
    refs = tuple(PromptRef(place, 0, text) for place, text in ((2 * index, "ab"), (2 * index + 1, "b")))
    return Shard(0, index, refs, 7, group)


def measured(a: Any, b: Any, with_parts: bool) -> list[ShardSums]:
    """The sums of two shards, without Ray."""
    halfway, places = in_turns(a, b, tf_batch_size=3)
    comparison = Comparison(halfway, RULE, "toy", "cpu", midpoint=halfway.midpoint if with_parts else None)
    comparison.begin("group")
    shards = [shard(0), shard(1)]
    found = [comparison.collect(one) for one in shards]
    records = [Record.unpack(one.delivery.packed) for one in found]
    fit = PublishedFit.empty(RULE, "toy").after_round(records[0] + records[1])
    sums = [comparison.accumulate(one, fit) for one in shards]
    assert comparison.accumulate(shards[0], fit) is sums[0], "a retry adds nothing"
    again = comparison.collect(shards[1])
    assert again.delivery.packed.tobytes() == found[1].delivery.packed.tobytes(), "the pair is loaded again"
    assert_same([a.state_dict(), b.state_dict()], *places)
    assert all(parameter.grad is None for model in places for parameter in model.parameters())
    return sums


def test_a_comparison_measures_parts_beside_its_change_and_changes_no_policy():
    a, b = models()
    with_parts, without = measured(a, b, True), measured(a, b, False)
    totals = summed(with_parts, [], position_bins(CAP))
    assert totals.change is not None and totals.change.parts.responses_S.tolist() == [8.0, 8.0]
    assert totals.change.parts.product_SG.any(axis=1).all()
    assert totals.parity.tokens == totals.change.parts.parity.tokens > 0, "the midpoint's, which no record counts"
    for one, other in zip(with_parts, without, strict=True):
        assert one.sums.change is not None and other.sums.change is not None
        assert not other.sums.change.parts.groups
        ours, theirs = one.sums.change.to_json(), other.sums.change.to_json()
        del ours["parts"], theirs["parts"]
        assert ours == theirs, "the midpoint enters nothing else"
    again = Totals.from_json(totals.to_json())
    assert again.to_json() == totals.to_json()
    assert again.change is not None and again.change.parts.groups == totals.change.parts.groups


def test_the_midpoints_responses_do_not_depend_on_shards_and_have_seeds_of_their_own():
    seeds = {seed for side in range(3) for group in shard(0).response_seeds(side) for seed in group}
    assert len(seeds) == 2 * (2 + 2 + 4)
    assert [[seed[-1] for seed in group] for group in shard(0).response_seeds(2)] == [[2] * 4] * 2
