"""The rules that actors and backends rely on, held by the real rollout and the light one of the fault tests."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.light_rollout import LightRollout
from support.runs import GROUP, POLICY, a_checkpoint, flat, plan_of, rollout_of, settings

from ray_probe.config import ProbeConfig
from ray_probe.core.estimator.baselines import ShardBaseline
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.records import Record
from ray_probe.errors import ShardError
from ray_probe.fitter.fitter import Fitter
from ray_probe.rollout.rollout import Rollout
from ray_probe.run.messages import Collected, Receipt
from ray_probe.run.preparation.plan import Shard
from ray_probe.run.preparation.prepared import baseline_rule

METHODS = ("begin", "collect", "hold_no_graphs", "acknowledge", "accumulate", "gradient_report", "bucket")
FEATURES = ["H", "top1", "pos_frac"]
AnyRollout = Rollout | LightRollout
MakesRollout = Callable[[], AnyRollout]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_checkpoint(tmp_path_factory.mktemp("contract"))


@pytest.fixture
def config(checkpoint: Path) -> ProbeConfig:
    return settings(checkpoint, estimator={"baseline": {"features": FEATURES}})


@pytest.fixture(params=["real", "light"])
def made(request: pytest.FixtureRequest, config: ProbeConfig) -> MakesRollout:
    if request.param == "real":
        return lambda: rollout_of(config)
    return lambda: LightRollout(baseline_rule(config), POLICY)


@pytest.fixture
def shards(config: ProbeConfig) -> tuple[Shard, ...]:
    return plan_of(config).round(0)


@pytest.fixture
def fitter(config: ProbeConfig) -> Fitter:
    return Fitter(baseline_rule(config), POLICY)


@dataclasses.dataclass
class WatchedFit:
    """A fit that keeps the records that were left out of it."""

    fit: PublishedFit
    left_out: list[Record | None] = dataclasses.field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fit, name)

    def for_shard(self, own: Record | None) -> ShardBaseline:
        self.left_out.append(own)
        return self.fit.for_shard(own)


def collected(rollout: AnyRollout, fitter: Fitter, shards: tuple[Shard, ...]) -> WatchedFit:
    """Collect a round and hold what the fitter counts; returns the round's fit."""
    rollout.begin(GROUP)
    for shard in shards:
        rollout.acknowledge(shard, fitter.accept(rollout.collect(shard).delivery))
    return WatchedFit(fitter.close_round(shards[0].round, [shard.index for shard in shards]).for_broadcast())


def contents(report: Collected) -> tuple[object, ...]:
    sent = report.delivery
    return sent.policy_id, sent.features, sent.round, sent.shard, sent.packed.tobytes(), report.tokens


def test_the_light_rollout_has_the_methods_of_the_real_one_with_their_arguments() -> None:
    for name in METHODS:
        real, light = (inspect.signature(getattr(kind, name)).parameters.values() for kind in (Rollout, LightRollout))
        assert [(p.name, p.kind, p.default) for p in light] == [(p.name, p.kind, p.default) for p in real], name


def test_collect_reports_the_record_of_the_shard_to_the_bit_each_time(
    made: MakesRollout, fitter: Fitter, shards: tuple[Shard, ...]
) -> None:
    rollout = made()
    rollout.begin(GROUP)
    first, again, elsewhere = (one.collect(shards[1]) for one in (rollout, rollout, made()))
    assert contents(first) == contents(again) == contents(elsewhere)
    record = Record.unpack(first.delivery.packed)
    assert first.tokens == record.tokens == first.parity.tokens > 0
    assert sorted(record.prompt_ids_P) == sorted(ref.index for ref in shards[1].prompts)
    assert fitter.accept(first.delivery).status == "accepted" and fitter.accept(again.delivery).status == "duplicate"


def test_accumulate_adds_a_shard_once_and_reports_what_it_added(
    made: MakesRollout, fitter: Fitter, shards: tuple[Shard, ...]
) -> None:
    rollout = made()
    fit, before = collected(rollout, fitter, shards), flat(rollout)
    assert not before.any()
    for shard in shards:
        report = rollout.accumulate(shard, fit)
        added = (flat(rollout) - before).astype(np.float64)
        assert report.gradient_norm_sq == pytest.approx(float(added @ added), rel=1e-4)
        assert (report.round, report.shard, report.version) == (shard.round, shard.index, 1)
        assert report.own_left_out and report.fitted
        assert list(report.prompt_ids_P) == [ref.index for ref in shard.prompts]
        assert report.sums.sequences == len(shard.prompts) * shard.responses_per_prompt
        before = flat(rollout)
        assert rollout.accumulate(shard, fit) is report
        np.testing.assert_array_equal(flat(rollout), before)
    assert len(fit.left_out) == len(shards), "a retry asks for no baseline"


def test_accumulate_refuses_a_shard_that_was_not_collected_here(
    made: MakesRollout, fitter: Fitter, shards: tuple[Shard, ...]
) -> None:
    fit = collected(made(), fitter, shards)
    rollout = made()
    rollout.begin(GROUP)
    with pytest.raises(ShardError, match=r"^shard 1 of round 1: was not collected here; collect it first$"):
        rollout.accumulate(shards[1], fit)
    assert rollout.gradient_report(GROUP).shards == () and not flat(rollout).any()


def test_accumulate_leaves_out_the_own_record_or_the_one_that_the_fitter_kept(
    made: MakesRollout, fitter: Fitter, shards: tuple[Shard, ...]
) -> None:
    other = made().collect(dataclasses.replace(shards[0], seed=9)).delivery
    fitter.accept(other)
    rollout = made()
    own = [rollout.collect(shard).delivery for shard in shards]
    receipts = [fitter.accept(delivery) for delivery in own]
    assert [receipt.status for receipt in receipts] == ["different", "accepted", "accepted"]
    for shard, receipt in zip(shards, receipts, strict=True):
        rollout.acknowledge(shard, receipt)
    fit = WatchedFit(fitter.close_round(0, [0, 1, 2]))
    for shard in shards:
        rollout.accumulate(shard, fit)
    counted = (Record.unpack(sent.packed).without_prompts() for sent in (other, *own[1:]))
    assert [record.pack().tobytes() for record in fit.left_out if record] == [one.pack().tobytes() for one in counted]


def test_accumulate_leaves_nothing_out_of_a_fit_without_the_shard(
    made: MakesRollout, fitter: Fitter, shards: tuple[Shard, ...], config: ProbeConfig
) -> None:
    rollout, later = made(), plan_of(config).round(1)[0]
    fit = collected(rollout, fitter, shards)
    rollout.collect(later)
    rollout.acknowledge(later, Receipt("accepted"))
    report = rollout.accumulate(later, fit)
    assert fit.left_out == [None] and not report.own_left_out and report.round == 1 and report.version == 1


def test_a_commit_group_spans_rounds_and_the_next_one_starts_empty(
    made: MakesRollout, fitter: Fitter, shards: tuple[Shard, ...], config: ProbeConfig
) -> None:
    rollout, later = made(), plan_of(config).round(1)[0]
    places = tuple(range(len(rollout.layout.names)))
    fit = collected(rollout, fitter, shards)
    assert rollout.gradient_report(GROUP).unreached == places
    rollout.accumulate(shards[2], fit)
    rollout.begin(GROUP)
    rollout.collect(later)
    for shard in (later, shards[0]):
        rollout.accumulate(shard, fit)
    report = rollout.gradient_report(GROUP)
    assert (report.shards, report.unreached) == (((0, 0), (0, 2), (1, 0)), ())
    assert rollout.gradient_report("another").shards == ()
    rollout.begin("another")
    assert rollout.gradient_report("another").shards == () and not flat(rollout).any()
    with pytest.raises(ShardError, match="was not collected here"):
        rollout.accumulate(shards[1], fit)


def test_a_bucket_is_a_copy_of_a_range_with_the_same_range_of_others(
    made: MakesRollout, fitter: Fitter, shards: tuple[Shard, ...]
) -> None:
    rollout = made()
    rollout.accumulate(shards[0], collected(rollout, fitter, shards))
    whole, size = flat(rollout), rollout.layout.size
    assert whole.dtype == np.float32 and len(whole) == size
    parts = [rollout.bucket(start, stop) for start, stop in rollout.layout.buckets(1000)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    other = np.arange(10, dtype=np.float32)
    np.testing.assert_array_equal(rollout.bucket(5, 15, other, other), whole[5:15] + other + other)
    rollout.bucket(0, size)[:] = 0.0
    np.testing.assert_array_equal(flat(rollout), whole)
    np.testing.assert_array_equal(other, np.arange(10))
