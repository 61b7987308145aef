"""A comparison's rollout: what it sends and sums, on real models in this process."""

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
from support.adapters import write_adapter
from support.models import character_tokenizer, save_checkpoint, tiny_gpt2, tiny_llama
from support.runs import GROUP, POLICY, TEXTS, OtherScorer, plan_of, processor_of, settings, untimed

from ray_probe.checkpoints import swap
from ray_probe.config import ProbeConfig
from ray_probe.config.loading import config_from_dict, to_dict
from ray_probe.controller.local_backend import LocalBackend
from ray_probe.core.estimator.change_sums import ROW, ChangeSums
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.records import Record
from ray_probe.errors import CheckpointError, ParityError, ShardError
from ray_probe.fitter.fitter import Fitter
from ray_probe.gradient.along_update import GradientAlongUpdate
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.rollout import builder as builder_module
from ray_probe.rollout.builder import RolloutBuilder, moved_share
from ray_probe.rollout.comparison import Comparison
from ray_probe.rollout.midpoint import Midpoint
from ray_probe.run.comparison.estimates import change_estimate
from ray_probe.run.directory import RunDirectory
from ray_probe.run.messages import Receipt
from ray_probe.run.preparation.plan import PromptRef, Shard
from ray_probe.run.preparation.prepared import baseline_rule
from ray_probe.run.progress import Progress
from ray_probe.sequence_processor import SequenceProcessor


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("compared")
    models = (tiny_llama(8, seed=0), tiny_llama(8, seed=1))
    a, b = (save_checkpoint(directory / name, model, "abcdef") for name, model in zip("ab", models, strict=True))
    return a, b


def config_of(a: Path, b: Path, group: int = 4, **sections: dict[str, object]) -> ProbeConfig:
    config = settings(b, **sections)
    batch = config.batch.model_copy(update={"responses_per_prompt": group})
    compare = config.compare.model_copy(update={"against": str(a)})
    return config.model_copy(update={"batch": batch, "compare": compare})


def asking_for_parts(config: ProbeConfig) -> ProbeConfig:
    return config.model_copy(update={"compare": config.compare.model_copy(update={"parts": True})})


def comparison_of(config: ProbeConfig) -> Comparison:
    places = [(Path(str(config.compare.against)), None), (Path(config.model.path), None)]
    return RolloutBuilder().compare(config, places, POLICY)


def change_of(config: ProbeConfig, comparison: Comparison, fitter: Fitter | None = None) -> ChangeSums:
    """The sums of the first round."""
    fitter = fitter or Fitter(baseline_rule(config), POLICY)
    shards = plan_of(config).round(0)
    comparison.begin(GROUP)
    for shard in shards:
        comparison.acknowledge(shard, fitter.accept(comparison.collect(shard).delivery))
    fit = fitter.close_round(0, [shard.index for shard in shards]).for_broadcast()
    reports = [comparison.accumulate(shard, fit) for shard in shards]
    total = ChangeSums.zero(config.generation.max_new_tokens, 8)
    for report in reports:
        assert report.sums.change is not None and report.own_left_out and report.gradient_norm_sq == 0.0
        total = total + report.sums.change
    assert comparison.gradient_report(GROUP).shards == tuple(shard.key for shard in shards)
    assert comparison.gradient_report("another").shards == ()
    return total


def test_a_record_has_both_targets_and_the_same_bits_each_time(checkpoints: tuple[Path, Path]):
    config = config_of(*checkpoints)
    first, other = comparison_of(config), comparison_of(config)
    shard = plan_of(config).round(0)[1]
    for comparison in (first, other):
        comparison.begin(GROUP)
    sent = [comparison.collect(shard).delivery.packed.tobytes() for comparison in (first, first, other)]
    assert len(set(sent)) == 1
    report = first.collect(shard)
    record = Record.unpack(report.delivery.packed)
    assert record.shape.targets == 2 and record.sequences == len(shard.prompts) * 4
    assert record.tokens == report.tokens == report.parity.tokens


def test_half_of_the_responses_come_from_each_checkpoint_with_seeds_of_its_own(checkpoints: tuple[Path, Path]):
    config = config_of(*checkpoints)
    shard = plan_of(config).round(0)[0]
    seeds = [seed for side in (0, 1) for group in shard.response_seeds(side) for seed in group]
    assert len(set(seeds)) == len(seeds) == len(shard.prompts) * 4
    assert not set(seeds) & {seed for group in shard.response_seeds() for seed in group}
    total = change_of(config, comparison_of(config))
    assert {row[ROW.index("responses")] for row in total.rows.values()} == {4.0}
    assert (total.tokens_2 > 0).all()
    assert total.parity[0].tokens == total.tokens_2[0] and total.parity[1].tokens == total.tokens_2[1]
    assert max(part.mean_gap for part in total.parity) < 1e-5


def test_a_retry_returns_the_same_sums_and_a_shard_of_elsewhere_is_refused(checkpoints: tuple[Path, Path]):
    config = config_of(*checkpoints)
    comparison, fitter = comparison_of(config), Fitter(baseline_rule(config), POLICY)
    shards = plan_of(config).round(0)
    comparison.begin(GROUP)
    for shard in shards[:2]:
        comparison.acknowledge(shard, fitter.accept(comparison.collect(shard).delivery))
    fit = fitter.close_round(0, [0, 1]).for_broadcast()
    report = comparison.accumulate(shards[0], fit)
    assert comparison.accumulate(shards[0], fit) is report
    with pytest.raises(ShardError, match="was not collected here"):
        comparison.accumulate(shards[2], fit)
    comparison.begin("next")
    assert comparison.gradient_report("next").shards == ()


def test_the_record_that_the_fitter_kept_is_left_out(checkpoints: tuple[Path, Path]):
    config = config_of(*checkpoints)
    shards = plan_of(config).round(0)[:2]
    found = []
    for kept in (False, True):
        comparison, fitter = comparison_of(config), Fitter(baseline_rule(config), POLICY)
        comparison.begin(GROUP)
        reports = [comparison.collect(shard) for shard in shards]
        for report in reports:
            fitter.accept(report.delivery)
        if kept:
            comparison.acknowledge(shards[0], Receipt("different", reports[1].delivery.packed))
        fit = fitter.close_round(0, [0, 1]).for_broadcast()
        found.append(comparison.accumulate(shards[0], fit).sums.advantage["regression"].tolist())
    assert found[0] != found[1]


def test_one_model_at_a_time_gives_the_same_bits(checkpoints: tuple[Path, Path]):
    config = config_of(*checkpoints)
    places = [(Path(str(config.compare.against)), None), (Path(config.model.path), None)]
    builder = RolloutBuilder()
    turns = builder.compare(config, places, POLICY, in_turns=True)
    both = comparison_of(config)
    shard = plan_of(config).round(0)[0]
    for comparison in (turns, both):
        comparison.begin(GROUP)
    sent = [one.collect(shard).delivery.packed.tobytes() for one in (turns, both)]
    assert sent[0] == sent[1] and builder.way == "swapped"
    assert change_of(config, turns).to_json() == change_of(config, both).to_json()
    assert (turns.moved_share, both.moved_share) == (None, both.moved_share) and both.moved_share > 0.9
    assert (turns.eos_ids, turns.takes_padding, turns.cache_gap) == (both.eos_ids, both.takes_padding, both.cache_gap)


@pytest.fixture
def adapted(checkpoints: tuple[Path, Path], tmp_path: Path) -> list[tuple[Path, Path | None]]:
    """Two adapters of one kind on one base."""
    return [(checkpoints[0], write_adapter(tmp_path / str(n), checkpoints[0], seed=n)) for n in (1, 2)]


def adapted_config(adapted: list[tuple[Path, Path | None]]) -> ProbeConfig:
    config = config_of(adapted[0][0], adapted[1][0])
    compare = config.compare.model_copy(update={"adapter": str(adapted[0][1])})
    model = config.model.model_copy(update={"adapter": str(adapted[1][1])})
    return config.model_copy(update={"compare": compare, "model": model})


def test_two_adapters_of_one_base_load_the_base_once(
    adapted: list[tuple[Path, Path | None]], monkeypatch: pytest.MonkeyPatch
):
    loads, copies = [], []
    load, copy_base = swap.load_model, swap._copy
    monkeypatch.setattr(swap, "load_model", lambda *given: loads.append(given) or load(*given))
    monkeypatch.setattr(swap, "_copy", lambda *given: copies.append(given) or copy_base(*given))
    config = adapted_config(adapted)
    together = RolloutBuilder().compare(config, adapted, POLICY)
    total = change_of(config, together)
    assert len(loads) == 1 and not copies, "the adapters alone are swapped"
    apart = [RolloutBuilder().load(config, *place, POLICY) for place in adapted]
    processors = [processor_of(one) for one in apart]
    separate = Comparison((processors[0], processors[1]), baseline_rule(config), POLICY, together._made_on)
    assert total.to_json() == change_of(config, separate).to_json()
    assert any(row[ROW.index("pathwise")] for row in total.rows.values())


def test_files_that_change_while_one_model_is_held_at_a_time_are_refused(
    checkpoints: tuple[Path, Path], tmp_path: Path
):
    places = [(Path(shutil.copytree(one, tmp_path / str(n))), None) for n, one in enumerate(checkpoints)]
    config = config_of(places[0][0], places[1][0])
    turns = RolloutBuilder().compare(config, places, POLICY, in_turns=True)
    turns.begin(GROUP)
    turns.collect(plan_of(config).round(0)[0])
    os.utime(places[0][0] / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="its files have changed while it was compared"):
        turns.collect(plan_of(config).round(0)[1])


def test_the_demo_against_itself_changes_by_exactly_nothing(tmp_path: Path):
    demo = Path(__file__).parents[3] / "configs" / "models" / "tiny"
    raw = to_dict(config_of(demo, demo, generation={"max_new_tokens": 24, "top_p": 0.95}))
    raw["data"]["prompts"] = ["17+5=", "3-1+12=", "9+9+9="]
    raw["batch"] |= {"prompts_per_round": 3, "rounds": 1}
    config = config_from_dict(raw)
    comparison = comparison_of(config)
    shard = Shard(0, 0, tuple(PromptRef(n, 0, text) for n, text in enumerate(raw["data"]["prompts"])), 0, 4)
    comparison.begin(GROUP)
    comparison.collect(shard)
    fit = PublishedFit.empty(baseline_rule(config), POLICY)
    change = comparison.accumulate(shard, fit).sums.change
    assert change is not None and change.tokens_2.sum() > 100
    found = change_estimate(change, 24, shares_baselines=True)
    assert (found.total.value, found.total.se, found.per_token.change.value, found.js) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_against_itself_changes_by_exactly_nothing(checkpoints: tuple[Path, Path], dtype: str):
    config = config_of(checkpoints[0], checkpoints[0], model={"dtype": dtype})
    total = change_of(config, comparison_of(config))
    for row in total.rows.values():
        assert not row[[ROW.index(name) for name in ("pathwise", "visitation", "length")]].any()
        assert not row[len(ROW) :].any()
    assert not total.within_4.any() and total.js == 0.0 and not total.impossible_2.any()


def test_a_bfloat16_pair_is_near_the_float32_pair(checkpoints: tuple[Path, Path]):
    totals = []
    for dtype in ("float32", "bfloat16"):
        config = config_of(*checkpoints, model={"dtype": dtype}, generation={"top_p": 1.0})
        total = change_of(config, comparison_of(config))
        assert total.parity[0].mean_gap < 0.05
        totals.append(sum(row[ROW.index("pathwise")] for row in total.rows.values()) / (4 * len(total.rows)))
    assert totals[0] == pytest.approx(totals[1], abs=0.3) and totals[0] != totals[1]


def test_different_architectures_over_the_same_tokens_are_compared(checkpoints: tuple[Path, Path], tmp_path: Path):
    other = save_checkpoint(tmp_path / "gpt2", tiny_gpt2(8, torch.float32), "abcdef")
    comparison = comparison_of(config_of(other, checkpoints[1]))
    assert comparison.moved_share is None
    total = change_of(config_of(other, checkpoints[1]), comparison)
    assert any(row[ROW.index("pathwise")] for row in total.rows.values())


def test_the_share_of_moved_parameters_counts_single_numbers():
    first = tiny_llama(8)
    second = copy.deepcopy(first)
    assert moved_share(first, second) == 0.0
    with torch.no_grad():
        second.lm_head.weight[0, :3] += 1.0
    assert moved_share(first, second) == pytest.approx(3 / sum(p.numel() for p in first.parameters()))


def run(config: ProbeConfig, path: Path, comparison: Comparison, stop_after: int | None = None):
    if not path.exists():
        RunDirectory.create(path.parent, path.name)
    directory, rounds = RunDirectory(path), []
    backend = LocalBackend([comparison], baseline_rule(config), POLICY, directory)

    def listen(progress: Progress) -> None:
        rounds.append(progress.round)
        assert progress.summed == "changes"

    stop = (lambda: rounds[-1] >= stop_after) if stop_after is not None else (lambda: False)
    return OfflineEntropyProbe(config, plan_of(config), backend, directory, listen, stop).run()


def test_a_resumed_comparison_has_the_result_of_one_that_ran_through(checkpoints: tuple[Path, Path], tmp_path: Path):
    config = config_of(*checkpoints)
    whole = run(config, tmp_path / "whole", comparison_of(config))
    with pytest.raises(Exception, match="stop"):
        run(config, tmp_path / "cut", comparison_of(config), stop_after=1)
    assert len(RunDirectory(tmp_path / "cut").finished_rounds()) == 1
    resumed = run(config, tmp_path / "cut", comparison_of(config))
    assert untimed(resumed.to_json()) == untimed(whole.to_json())
    assert whole.change is not None and whole.change.total.se is not None
    assert whole.gradient.why_null == "is not measured by a comparison" and whole.gradient.norm_raw is None
    assert len(TEXTS) == whole.change.clusters


def test_a_run_with_parts_says_what_one_without_says_and_which_part_did_it(
    checkpoints: tuple[Path, Path], tmp_path: Path
):
    plain = config_of(*checkpoints)
    config = asking_for_parts(plain)
    without, comparison = run(plain, tmp_path / "plain", comparison_of(plain)), comparison_of(config)
    before = [copy.deepcopy(comparison.processors[side].model.state_dict()) for side in (0, 1)]
    with_parts = run(config, tmp_path / "parts", comparison)
    for side, earlier in enumerate(before):
        model = comparison.processors[side].model
        assert all(torch.equal(tensor, earlier[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert without.change is not None and with_parts.change is not None
    assert not without.change.parts and without.change.total == with_parts.change.total
    parts, remainder = with_parts.change.parts, with_parts.change.remainder
    assert [part.group for part in parts][:2] == ["embedding", "layer 0 q"] and parts[-1].group == "head"
    values = [part.value for part in parts if part.value is not None]
    assert len(values) == len(parts) and remainder.value is not None
    assert sum(values) + remainder.value == pytest.approx(with_parts.change.total.value)
    assert with_parts.parity.mean_gap is not None and with_parts.counts.sequences == without.counts.sequences


def parts_of(config: ProbeConfig, comparison: Comparison, order: str) -> list[list[float]]:
    """Products of two shards of the first round, under a fit of both: `c0` collects a shard, `a0` accumulates it."""
    shards, fitter = plan_of(config).round(0)[:2], Fitter(baseline_rule(config), POLICY)
    fit, found = PublishedFit.empty(baseline_rule(config), POLICY), {}
    comparison.begin(GROUP)
    for task, place in zip(order[::2], map(int, order[1::2]), strict=True):
        if task == "c":
            comparison.acknowledge(shards[place], fitter.accept(comparison.collect(shards[place]).delivery))
        else:
            change = comparison.accumulate(shards[place], fit).sums.change
            assert change is not None
            found[place] = change.parts.product_SG[0].tolist()
    return [found[0], found[1]]


def test_parts_load_each_model_once_a_round_and_their_bits_do_not_depend_on_the_order(
    checkpoints: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    config = asking_for_parts(config_of(*checkpoints))
    comparison = comparison_of(config)
    copied, copy_in = [], swap.swap_weights
    monkeypatch.setattr(builder_module, "swap_weights", lambda *given: copied.append(given[1]) or copy_in(*given))
    expected = parts_of(config, comparison, "c0c1a0a1")
    assert not copied, "the pair was loaded at the start"
    comparison.begin("next")
    assert parts_of(config, comparison, "c1c0a1a0") == expected and copied == [*checkpoints]
    comparison.begin("third")
    assert parts_of(config, comparison, "c0a0c1a1") == expected and len(copied) == 6


def test_parts_hold_two_models_and_no_third(checkpoints: tuple[Path, Path]):
    config = asking_for_parts(config_of(*checkpoints))
    comparison = comparison_of(config)
    models = [comparison.processors[side].model for side in (0, 1)]
    places = [parameter.data_ptr() for model in models for parameter in model.parameters()]
    change_of(config, comparison)
    assert comparison._midpoint is not None
    assert comparison._midpoint().processor.model is models[0], "the midpoint stands in A's place"
    comparison.processors[0]
    assert places == [parameter.data_ptr() for model in models for parameter in model.parameters()]


def test_a_midpoint_that_fails_half_way_is_made_again_from_both_checkpoints(
    checkpoints: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    config = asking_for_parts(config_of(*checkpoints))
    expected = parts_of(config, comparison_of(config), "c0c1a0a1")
    comparison, replace = comparison_of(config), builder_module.replace_by_midpoint

    def fails(a: torch.nn.Module, b: torch.nn.Module) -> None:
        monkeypatch.setattr(builder_module, "replace_by_midpoint", replace)
        replace(a, b)
        raise MemoryError

    monkeypatch.setattr(builder_module, "replace_by_midpoint", fails)
    with pytest.raises(MemoryError):
        parts_of(config, comparison, "c0c1a0")
    assert parts_of(config, comparison, "a0a1c0") == expected


def test_a_gradient_after_a_comparison_with_parts_is_that_of_a_fresh_model(checkpoints: tuple[Path, Path]):
    plain = config_of(*checkpoints)
    config = asking_for_parts(plain)
    places, builder = [(path, None) for path in checkpoints], RolloutBuilder()
    parts_of(config, builder.compare(config, places, POLICY), "c0c1a0a1")
    rollout = builder.load(plain, checkpoints[0], None, POLICY)
    fresh = RolloutBuilder().load(plain, checkpoints[0], None, POLICY)
    shard, fit, found = plan_of(plain).round(0)[0], PublishedFit.empty(baseline_rule(plain), POLICY), []
    for one in (rollout, fresh):
        one.begin(GROUP)
        one.collect(shard)
        one.accumulate(shard, fit)
        found.append(one.bucket(0, one.layout.size).tolist())
    assert builder.way == "swapped" and found[0] == found[1] and any(found[0])


def test_the_parity_gate_looks_at_each_policy(checkpoints: tuple[Path, Path], tmp_path: Path):
    config = config_of(*checkpoints)
    for side in (0, 1):
        comparison = comparison_of(config)
        own = comparison.processors[side]
        features = baseline_rule(config).features
        scorer = OtherScorer(own.model, character_tokenizer("abcdef"), config.generation, features)
        pair = list[SequenceProcessor](comparison.processors)
        pair[side] = scorer
        comparison.processors = (pair[0], pair[1])
        with pytest.raises(ParityError):
            run(config, tmp_path / f"side-{side}", comparison)


def test_the_parity_gate_looks_at_the_midpoint_too(
    checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = asking_for_parts(config_of(*checkpoints))
    comparison = comparison_of(config)
    features = baseline_rule(config).features

    def other(processor: SequenceProcessor, along: GradientAlongUpdate) -> Midpoint:
        scorer = OtherScorer(processor.model, character_tokenizer("abcdef"), config.generation, features)
        return Midpoint(scorer, along)

    monkeypatch.setattr(builder_module, "Midpoint", other)
    with pytest.raises(ParityError):
        run(config, tmp_path / "run", comparison)
