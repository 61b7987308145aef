"""Rollouts, fitter and run without a cluster: one answer however shards are dealt, and nothing half done counts."""

import dataclasses
import gc
import json
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import (
    GROUP,
    POLICY,
    Job,
    a_checkpoint,
    by_name,
    collected,
    components_of,
    flat,
    held_of,
    misscoring_rollout,
    plan_of,
    processor_of,
    rollout_of,
    settings,
    untimed,
)

from ray_probe.cluster.actors.rollout import RolloutActor
from ray_probe.core.estimator.baselines import MODES
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.records import Record
from ray_probe.core.estimator.ridge import normal_equations
from ray_probe.core.policy import differentiable_scores
from ray_probe.errors import NonFiniteError, ParityError, ShardError
from ray_probe.fitter.fitter import Fitter
from ray_probe.model.sequences import pack_sequences
from ray_probe.rollout import rollout as rollout_module
from ray_probe.rollout.rollout import Rollout
from ray_probe.run.messages import GradientReport
from ray_probe.run.preparation.plan import Shard
from ray_probe.run.preparation.prepared import baseline_rule
from ray_probe.run.progress import Progress
from ray_probe.sequence_processor import SequenceProcessor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_checkpoint(tmp_path_factory.mktemp("rollout"))


# One answer


def test_the_number_of_rollouts_changes_neither_beta_nor_counts_and_gradients_by_rounding_only(
    checkpoint: Path, tmp_path: Path
):
    config = settings(checkpoint)
    jobs = [Job.of(config, tmp_path / f"run{n}", n) for n in (1, 2, 3)]
    first, *others = [job.run() for job in jobs]
    assert first["beta"]["values"] and first["beta"]["fallback"] is None
    assert first["counts"]["shards"] == 9 and first["counts"]["sequences"] == 30
    for job, result in zip(jobs[1:], others, strict=True):
        assert result["beta"] == first["beta"], "bit for bit"
        assert {**result["counts"], "actors": 1} == first["counts"]
        assert result["entropy"] == first["entropy"]
        distance = np.linalg.norm(job.gradient - jobs[0].gradient)
        assert distance <= 1e-5 * np.linalg.norm(jobs[0].gradient)


def test_the_run_is_the_same_run_again_from_the_same_seed_and_another_from_another(checkpoint: Path, tmp_path: Path):
    results = [Job.of(settings(checkpoint), tmp_path / name).run() for name in ("a", "b")]
    assert untimed(results[0]) == untimed(results[1])
    other = settings(checkpoint)
    other = other.model_copy(update={"data": other.data.model_copy(update={"seed": 5})})
    assert Job.of(other, tmp_path / "c").run()["beta"]["values"] != results[0]["beta"]["values"]


@pytest.mark.parametrize("estimator", ["rb_residual", "naive"])
@pytest.mark.parametrize("fit", ["leave_one_out", "in_sample", "lagged"])
def test_every_fit_and_mode_runs_and_writes_its_advantages_round_by_round(
    checkpoint: Path, tmp_path: Path, fit: str, estimator: str
):
    gradients = {}
    for mode in MODES:
        config = settings(checkpoint, mode, fit, estimator={"x_estimator_mode": estimator})
        job = Job.of(config, tmp_path / mode)
        result = job.run()
        assert [line["round"] for line in job.lines] == [0, 1, 2]
        for line in job.lines:
            for name in MODES:
                values = line["advantage"][name]
                assert values["mean"] is not None and values["variance"] >= 0, "mean of G_j - b_j, and its variance"
                assert values["mean_square"] == pytest.approx(values["variance"] + values["mean"] ** 2)
        assert result["gradient"]["norm_raw"] > 0 and result["partial"] is False
        assert result["counts"]["unfitted_shards"] == (3 if fit == "lagged" else 0)
        gradients[mode] = job.gradient
    for left, right in ((a, b) for a in MODES for b in MODES if a < b):
        assert np.linalg.norm(gradients[left] - gradients[right]) > 1e-4 * np.linalg.norm(gradients[left])


def test_the_written_advantages_are_those_of_the_scored_responses(checkpoint: Path, tmp_path: Path):
    """Mean of G_j - b_j under the configured fit, formed here from results, features and the published fit alone."""
    config = settings(checkpoint, fit="in_sample")
    job = Job.of(config, tmp_path / "run")
    job.run()
    rollout, shards, fit = collected(config)
    advantages: dict[str, list[float]] = {"none": [], "constant": [], "residual_mu": [], "regression": []}
    for shard in shards:
        results = processor_of(rollout).teacher_force_logprobs(
            held_of(rollout)[shard.key].sequences, compute_rb=True, return_baseline_features=True
        )
        for group, features in zip(results.rb_entropies, results.baseline_feats_torch, strict=True):
            for entropy, phi in zip(group, features, strict=True):
                residual = np.cumsum(entropy[::-1])[::-1] - entropy
                total = fit.total
                by_position = np.divide(
                    total.bin_sum_BK[:, 0], total.bin_weight_B, where=total.bin_weight_B > 0, out=np.zeros(8)
                )
                advantages["none"] += list(residual)
                advantages["constant"] += list(residual - total.target_sum_K[0] / total.weight)
                advantages["residual_mu"] += list(residual - by_position[: len(entropy)])
                *beta_D, coefficient = fit.ridge.beta_EK[:, 0]
                mean = by_position[: len(entropy)]  # position_mean has the bins of residual_mu for a cap of 8
                advantages["regression"] += list(residual - phi.double().numpy() @ beta_D - coefficient * mean)
    written = job.lines[0]["advantage"]
    for mode, values in advantages.items():
        assert written[mode]["mean"] == pytest.approx(np.mean(values), abs=1e-9)
        assert written[mode]["variance"] == pytest.approx(np.var(values), rel=1e-9)
    assert written["regression"]["variance"] < written["residual_mu"]["variance"] < written["none"]["variance"]


# Once, whole, and only what was collected


def test_a_shard_that_is_accumulated_twice_counts_once(checkpoint: Path):
    rollout, shards, fit = collected(settings(checkpoint))
    first = [rollout.accumulate(shard, fit) for shard in shards]
    once = flat(rollout)
    assert all(rollout.accumulate(shard, fit) is report for shard, report in zip(shards, first, strict=True))
    assert rollout.gradient_report(GROUP) == GradientReport(((0, 0), (0, 1), (0, 2)), ())
    np.testing.assert_array_equal(once, flat(rollout))
    assert all(report.own_left_out and report.fitted and report.version == 1 for report in first)


def test_a_shard_collected_again_gives_the_same_record_to_the_bit(checkpoint: Path):
    config = settings(checkpoint)
    rollout, shard = rollout_of(config), plan_of(config).round(0)[1]
    packed = [
        rollout_of(config).collect(shard).delivery.packed,
        *(rollout.collect(shard).delivery.packed for _ in "ab"),
    ]
    for other in packed[1:]:
        np.testing.assert_array_equal(packed[0], other)


def test_a_shard_that_was_not_collected_here_is_refused(checkpoint: Path):
    config = settings(checkpoint)
    rollout, shards, fit = collected(config)
    with pytest.raises(ShardError, match=r"^shard 1 of round 1: was not collected here; collect it first$"):
        rollout_of(config).accumulate(shards[1], fit)
    later = plan_of(config).round(1)[0]
    with pytest.raises(ShardError, match=r"^shard 0 of round 2"):
        rollout.accumulate(later, fit)


def test_a_shard_that_fails_half_way_leaves_the_sum_untouched_and_can_be_done_again(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    config = settings(checkpoint)
    rollout, shards, fit = collected(config)
    rollout.accumulate(shards[0], fit)
    before = flat(rollout)
    scoring = SequenceProcessor._score

    def fails_at_the_second_micro_batch() -> Callable[..., Any]:
        calls = iter([None])

        def score(*arguments: Any, **options: Any) -> Any:
            if next(calls, "over") == "over":
                raise NonFiniteError("logits: broken on purpose")
            return scoring(*arguments, **options)

        return score

    monkeypatch.setattr(SequenceProcessor, "_score", fails_at_the_second_micro_batch())
    with pytest.raises(NonFiniteError):
        rollout.accumulate(shards[1], fit)
    monkeypatch.undo()
    assert rollout.gradient_report(GROUP).shards == ((0, 0),)
    np.testing.assert_array_equal(flat(rollout), before)
    for shard in shards[1:]:
        rollout.accumulate(shard, fit)
    other, _, _ = collected(config)
    for shard in shards:
        other.accumulate(shard, fit)
    np.testing.assert_array_equal(flat(rollout), flat(other))


def test_the_sum_goes_on_over_the_rounds_of_a_group_and_a_new_group_starts_empty(checkpoint: Path):
    config = settings(checkpoint, "none")
    rollout, shards, fit = collected(config)
    rollout.accumulate(shards[0], fit)
    first = flat(rollout)
    later = plan_of(config).round(1)[0]
    rollout.begin(GROUP)
    rollout.collect(later)
    rollout.accumulate(later, fit)
    assert rollout.gradient_report(GROUP).shards == ((0, 0), (1, 0))
    assert rollout.gradient_report("other rounds").shards == ()
    alone = rollout_of(config)
    alone.begin(GROUP)
    alone.collect(later)
    alone.accumulate(later, fit)
    np.testing.assert_allclose(flat(rollout), first + flat(alone), rtol=1e-5, atol=1e-5)
    rollout.begin("the rounds after")
    assert rollout.gradient_report("the rounds after").shards == () and not flat(rollout).any()
    with pytest.raises(ShardError, match=r"^shard 1 of round 1: was not collected here"):
        rollout.accumulate(shards[1], fit)


def test_what_is_needed_to_form_a_gradient_is_let_go_once_it_is_in(checkpoint: Path):
    rollout, shards, fit = collected(settings(checkpoint))
    assert set(held_of(rollout)) == {shard.key for shard in shards}
    for shard in shards:
        rollout.accumulate(shard, fit)
    assert not held_of(rollout)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fit", ["leave_one_out", "in_sample"])
def test_what_a_broadcast_leaves_out_changes_no_bit(checkpoint: Path, mode: str, fit: str):
    config = settings(checkpoint, mode, fit)
    sums = []
    for strip in (False, True):
        rollout, shards, published = collected(config)
        sent = published.for_broadcast() if strip else published
        assert len(sent.total.prompt_ids_P) == (0 if strip else 5)
        reports = [rollout.accumulate(shard, sent) for shard in shards]
        sums.append((flat(rollout), reports))
    np.testing.assert_array_equal(sums[0][0], sums[1][0])
    for left, right in zip(sums[0][1], sums[1][1], strict=True):
        assert left.gradient_norm_sq == right.gradient_norm_sq
        for name in left.sums.advantage:
            np.testing.assert_array_equal(left.sums.advantage[name], right.sums.advantage[name])


def test_no_gradient_and_no_graph_is_held_between_shards(checkpoint: Path):
    rollout, shards, fit = collected(settings(checkpoint))
    rollout.accumulate(shards[0], fit)
    assert all(parameter.grad is None for parameter in processor_of(rollout).model.parameters())


def test_the_record_that_counts_is_the_one_left_out(checkpoint: Path):
    config = settings(checkpoint)
    rollout, fitter, shards = rollout_of(config), Fitter(baseline_rule(config), POLICY), plan_of(config).round(0)
    came_first = rollout_of(config).collect(dataclasses.replace(shards[0], seed=9)).delivery
    fitter.accept(came_first)
    receipts = [fitter.accept(rollout.collect(shard).delivery) for shard in shards]
    assert [receipt.status for receipt in receipts] == ["different", "accepted", "accepted"]
    for shard, receipt in zip(shards, receipts, strict=True):
        rollout.acknowledge(shard, receipt)
    records = [held_of(rollout)[shard.key].record for shard in shards]
    first = Record.unpack(came_first.packed).without_prompts()
    np.testing.assert_array_equal(records[0].pack(), first.pack())
    rest = records[1] + records[2]
    gram_EE, cross_E = normal_equations(rest, 0)
    beta = np.linalg.solve(gram_EE + 1e-3 * np.eye(11), cross_E)
    fit = fitter.close_round(0, [0, 1, 2])
    np.testing.assert_allclose(fit.for_shard(records[0]).beta_E, beta, rtol=1e-6)


# The parity gate, and going on with a run


def test_a_scorer_with_another_temperature_trips_the_parity_gate_after_the_round_is_committed(
    checkpoint: Path, tmp_path: Path
):
    config = settings(checkpoint)
    job = Job.of(config, tmp_path / "run", rollouts=0)
    job.rollouts.append(misscoring_rollout(config))
    with pytest.raises(ParityError, match=r"parity_tolerance: got a mean gap of .*1 rounds are kept") as caught:
        job.run()
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)
    assert [line["round"] for line in job.lines] == [0]
    result = json.loads((job.path / "result.json").read_text())
    assert result["parity"]["mean_gap"] > 1e-3 and result["counts"]["rounds"] == 1
    with pytest.raises(ParityError, match="1 rounds are kept"):
        Job(config, job.path, job.rollouts).run()
    assert [line["round"] for line in job.lines] == [0], "going on does not open the gate, and works no round before it"


def test_the_same_policy_passes_the_parity_gate_with_room_to_spare(checkpoint: Path, tmp_path: Path):
    parity = Job.of(settings(checkpoint), tmp_path / "run").run()["parity"]
    assert parity["mean_gap"] < 1e-5 and parity["outside_nucleus"] == 0


@pytest.mark.parametrize("fit", ["leave_one_out", "lagged"])
@pytest.mark.parametrize("mode", ["regression", "residual_mu"])
def test_a_run_stopped_in_a_round_and_resumed_ends_as_one_that_was_not(
    checkpoint: Path, tmp_path: Path, mode: str, fit: str
):
    config = settings(checkpoint, mode, fit)
    whole = Job.of(config, tmp_path / "whole")
    expected = whole.run()
    stopped = Job.of(config, tmp_path / "stopped", rollouts=2)

    def stop_in_round_1(progress: Progress) -> None:
        if progress.round == 1 and progress.collected == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run(stop_in_round_1)
    assert stopped.probe.finished_rounds == 1
    resumed = Job(config, stopped.path, [rollout_of(config)])
    result = resumed.run()
    assert result["beta"] == expected["beta"], "bit for bit"
    same, other = untimed(result), untimed(expected)
    gradients = [part.pop("gradient") for part in (same, other)]
    assert same == other
    for name, value in gradients[1].items():
        assert gradients[0][name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
    np.testing.assert_allclose(resumed.gradient, whole.gradient, rtol=0, atol=1e-5 * np.linalg.norm(whole.gradient))
    assert [line["beta"] for line in resumed.lines] == [line["beta"] for line in whole.lines]


# Precision


def summed_apart(rollout: Rollout, shards: Iterable[Shard]) -> np.ndarray:
    """Gradients of single responses, added in float64."""
    components, total = components_of(rollout), np.zeros(rollout.layout.size)
    parameters = list(processor_of(rollout).model.parameters())
    for shard in shards:
        sequences = held_of(rollout)[shard.key].sequences
        for b, g in np.ndindex(*sequences.shape):
            prompt, tokens = sequences.tokens(b, g)
            response = pack_sequences([prompt.tolist()], [[tokens.tolist()]])
            for parameter in parameters:
                parameter.grad = None
            components.accumulate_sum_X(response, None)
            total += torch.cat([p.grad.flatten() for p in parameters]).double().numpy()
    return total


def test_gradients_of_bfloat16_weights_add_up_in_float32(checkpoint: Path):
    config = settings(checkpoint, "none", model={"dtype": "bfloat16"}, generation={"tf_batch_size": 1})
    config = config.model_copy(update={"batch": config.batch.model_copy(update={"prompts_per_round": 60})})
    rollout, shards, fit = collected(config)
    model = processor_of(rollout).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    held, apart = dict(held_of(rollout)), summed_apart(rollout, shards)
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    for shard in shards:
        rollout.accumulate(shard, fit)
    vector = flat(rollout)
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector - apart) < 1e-6 * np.linalg.norm(apart), "bfloat16 sums would be off by 1e-3"

    wide = settings(checkpoint, "none")
    reference = rollout_of(wide)
    processor_of(reference).model.load_state_dict(model.state_dict())
    held_of(reference).update(held)
    exact = summed_apart(reference, shards)
    assert np.linalg.norm(vector - exact) < 0.1 * np.linalg.norm(exact)


def test_only_what_is_trainable_is_in_the_gradient(checkpoint: Path):
    config = settings(checkpoint, model={"trainable": r"layers\.1\.mlp"})
    rollout, shards, fit = collected(config)
    rollout.accumulate(shards[0], fit)
    assert len(rollout.layout.names) == 3 and all("layers.1.mlp" in name for name in rollout.layout.names)
    whole, _, _ = collected(settings(checkpoint))
    whole.accumulate(shards[0], fit)
    everything = by_name(whole.layout, flat(whole))
    for name, part in by_name(rollout.layout, flat(rollout)).items():
        np.testing.assert_allclose(part, everything[name], rtol=1e-5, atol=1e-6 * np.abs(everything[name]).max())


# One pass


@pytest.mark.parametrize("room", [10**9, 60, 1])
@pytest.mark.parametrize("mode", ["regression", "none"])
def test_held_graphs_give_the_gradient_and_the_record_of_two_passes(checkpoint: Path, mode: str, room: int):
    config = settings(checkpoint, mode)
    two, shards, fit = collected(config)
    one = rollout_of(config)
    one.begin(GROUP)
    for shard in shards:
        sent = one.collect(shard, held_positions=room).delivery
        again = rollout_of(config).collect(shard).delivery
        assert sent.packed.tobytes() == again.packed.tobytes(), "whether there is a graph or not"
    held = sum(entry.positions for entry in held_of(one).values())
    assert (held > 60) if room == 10**9 else (held <= room)
    for shard in shards:
        for left, right in zip(
            vars(one.accumulate(shard, fit).sums).values(), vars(two.accumulate(shard, fit).sums).values(), strict=True
        ):
            np.testing.assert_equal(left, right)
    assert np.linalg.norm(flat(one) - flat(two)) <= 1e-6 * np.linalg.norm(flat(two))
    assert not held_of(one)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_nuclei_that_there_is_room_for_are_looked_for_once_and_the_others_again(
    checkpoint: Path, share: float, monkeypatch: pytest.MonkeyPatch
):
    config = settings(checkpoint)
    reference, shards, fit = collected(config)
    room = int(share * sum(held.cached_bytes for held in held_of(reference).values()))
    for held in held_of(reference).values():
        held.cached = ()
    monkeypatch.setitem(rollout_module.MAX_CACHED_BYTES, "cpu", room + 1)
    rollout, _, _ = collected(config)
    assert sum(held.cached_bytes for held in held_of(rollout).values()) <= room
    if share == 0.0:
        monkeypatch.setitem(rollout_module.MAX_CACHED_BYTES, "cpu", 0)
        monkeypatch.setattr("ray_probe.sequence_processor.score_and_keep", None)  # not even collected
        rollout, _, _ = collected(config)
    missing = {key: sum(one is None for one in held.cached) for key, held in held_of(rollout).items()}
    parts = sum(len(held.cached) for held in held_of(rollout).values())
    assert {
        1.0: sum(missing.values()) == 0,
        0.5: 0 < sum(missing.values()) < parts,
        0.0: sum(missing.values()) == parts,
    }[share]
    searches: list[int] = []
    search = differentiable_scores.search
    monkeypatch.setattr(differentiable_scores, "search", lambda *rest: searches.append(1) or search(*rest))
    for shard in shards:
        searches.clear()
        sums = rollout.accumulate(shard, fit).sums
        assert len(searches) == missing[shard.key]
        for left, right in zip(vars(sums).values(), vars(reference.accumulate(shard, fit).sums).values(), strict=True):
            np.testing.assert_equal(left, right)
    assert flat(rollout).tobytes() == flat(reference).tobytes()


def test_what_was_found_of_other_micro_batches_is_not_taken(checkpoint: Path):
    config = settings(checkpoint)
    rollout, (shard, *_), _ = collected(config)
    held, processor = held_of(rollout)[shard.key], processor_of(rollout)
    assert len(held.cached) > 1
    with pytest.raises(ValueError, match="shorter"):
        list(processor.score_parts(held.sequences, True, True, cached=held.cached[:-1]))
    if len({len(one.log_q_T) for one in held.cached if one is not None}) > 1:
        with pytest.raises(AssertionError, match="another micro-batch"):
            list(processor.score_parts(held.sequences, True, True, cached=held.cached[::-1]))


def test_a_graph_that_failed_half_way_is_not_used_again(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    config = settings(checkpoint)
    two, shards, fit = collected(config)
    one = rollout_of(config)
    one.begin(GROUP)
    one.collect(shards[0], held_positions=10**9)
    backward = torch.Tensor.backward
    calls = iter([False, True])

    def fails_once(self: torch.Tensor) -> None:
        if next(calls, False):
            raise RuntimeError("out of memory, say")
        backward(self)

    monkeypatch.setattr(torch.Tensor, "backward", fails_once)
    with pytest.raises(RuntimeError):
        one.accumulate(shards[0], fit)
    one.accumulate(shards[0], fit)
    two.accumulate(shards[0], fit)
    assert np.linalg.norm(flat(one) - flat(two)) <= 1e-6 * np.linalg.norm(flat(two))


def test_a_backward_pass_on_held_graphs_is_told_as_progress(checkpoint: Path):
    config = settings(checkpoint)
    rollout, (shard, *_), fit = rollout_of(config), plan_of(config).round(0), collected(config)[2]
    rollout.begin(GROUP)
    tokens = rollout.collect(shard, held_positions=10**9).tokens
    told: list[int] = []
    processor_of(rollout).on_progress = told.append
    rollout.accumulate(shard, fit)
    assert sum(told) == tokens and len(told) > 1, "long shards are not taken for stuck"


def test_where_there_is_no_room_for_graphs_one_is_there_at_a_time(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    config = settings(checkpoint)
    rollout, (shard, *_) = rollout_of(config), plan_of(config).round(0)
    rollout.begin(GROUP)
    graphs: list[Any] = []
    score = SequenceProcessor._score

    def watched(*arguments: Any) -> Any:
        assert sum(reference() is not None for reference in graphs) <= 1, "that of the part before, at most"
        rows, found = score(*arguments)
        graphs.append(weakref.ref(rows[0].log_q_T))
        return rows, found

    monkeypatch.setattr(SequenceProcessor, "_score", watched)
    rollout.collect(shard, held_positions=1)
    gc.collect()
    assert len(graphs) > 1 and not any(reference() for reference in graphs)


def holding(checkpoint: Path) -> tuple[RolloutActor, Rollout, list[Shard], PublishedFit, Rollout]:
    """An actor that holds graphs of two shards, its rollout, all shards, their fit, and a rollout that holds none."""
    config = settings(checkpoint)
    two, shards, fit = collected(config)
    actor = RolloutActor()
    actor._rollout = one = rollout_of(config)
    one.begin(GROUP)
    for shard in shards[:2]:
        one.collect(shard, held_positions=10**9)
    return actor, one, shards, fit, two


def test_once_memory_has_run_out_no_graph_is_held_and_the_gradient_stays(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    actor, one, shards, fit, two = holding(checkpoint)

    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(components_of(one), "accumulate_parts", full)
        actor.accumulate(shards[0], fit)
    one.collect(shards[2], held_positions=10**9)
    assert not any(held.parts for held in held_of(one).values())
    one.collect(shards[2])
    assert not any(held.cached_bytes for held in held_of(one).values())
    for shard in shards[:3]:
        actor.accumulate(shard, fit)
        two.accumulate(shard, fit)
    assert np.linalg.norm(flat(one) - flat(two)) <= 1e-6 * np.linalg.norm(flat(two))


def test_another_error_than_of_memory_leaves_the_other_shards_graphs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    actor, one, shards, fit, _ = holding(checkpoint)

    def broken(*arguments: Any) -> None:
        raise RuntimeError("something else")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(components_of(one), "accumulate_parts", broken)
        actor.accumulate(shards[0], fit)
    assert held_of(one)[shards[1].key].parts is not None
