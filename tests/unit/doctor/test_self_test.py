"""The self-test passes here, and gives numbers for a broken estimator."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from ray_probe import probe_components
from ray_probe.core.estimator.baselines import ShardBaseline
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.records import Record
from ray_probe.core.policy.features import REGISTRY, PrefixView
from ray_probe.doctor.self_test import CHECKS, TOLERANCE, SelfTestResult, self_test
from ray_probe.model import decoding


def test_what_is_installed_here_is_unbiased_to_1e_9_within_10_s():
    result = self_test()
    assert result.failed == () and result.unfinished == ()
    assert tuple(result.errors) == CHECKS
    assert max(result.errors.values()) < TOLERANCE == 1e-9
    assert 0 < result.seconds < 10


def test_the_judge_shares_no_code_with_what_it_judges():
    names = "' '.join(m for m in sys.modules if m.startswith('ray_probe'))"
    code = f"import sys, ray_probe.doctor.enumeration; print({names})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ray_probe", "ray_probe.doctor", "ray_probe.doctor.enumeration"]


def test_a_loss_of_the_wrong_sign_is_found(monkeypatch: pytest.MonkeyPatch):
    loss = probe_components.response_loss
    monkeypatch.setattr(probe_components, "response_loss", lambda *args: -loss(*args))
    result = self_test(seconds=60.0)
    assert result.failed == ("rb_residual", "naive", "leave_one_out")
    for name in result.failed:
        assert result.errors[name] == pytest.approx(2.0, rel=1e-6), "minus the gradient is off by twice its norm"
    assert result.errors["sampling"] < TOLERANCE


def test_a_feature_that_looks_ahead_is_found(monkeypatch: pytest.MonkeyPatch):
    def realised(view: PrefixView) -> torch.Tensor:
        return view.position_T.to(view.entropy_T.dtype) / (view.position_T.max() + 1)

    monkeypatch.setitem(REGISTRY, "pos_frac", realised)
    result = self_test(seconds=60.0)
    assert {"rb_residual", "naive"} <= set(result.failed)
    assert result.errors["rb_residual"] > 1e-3 and result.errors["naive"] > 1e-3


def test_a_fit_that_keeps_the_own_shard_is_found(monkeypatch: pytest.MonkeyPatch):
    for_shard = PublishedFit.for_shard

    def in_sample(fit: PublishedFit, own: Record | None) -> ShardBaseline:
        return for_shard(fit, None)

    monkeypatch.setattr(PublishedFit, "for_shard", in_sample)
    result = self_test(seconds=60.0)
    assert result.failed == ("leave_one_out",)
    assert result.errors["leave_one_out"] > 1e-3


def test_sampling_from_another_policy_than_the_scored_one_is_found(monkeypatch: pytest.MonkeyPatch):
    sample = decoding.sample_statistics

    def warmer(logits: torch.Tensor, *args: Any) -> Any:
        return sample(0.9 * logits, *args)

    monkeypatch.setattr(decoding, "sample_statistics", warmer)
    result = self_test(seconds=60.0)
    assert result.failed == ("sampling",)


def test_what_there_was_no_time_for_is_named_and_is_not_ok():
    result = self_test(seconds=0.0)
    assert result.unfinished == ("rb_residual", "naive", "leave_one_out")
    assert result.failed == ()


def test_an_error_that_is_no_number_fails():
    assert SelfTestResult({"naive": math.nan}, (), 1.0).failed == ("naive",)


def test_threads_and_random_numbers_of_the_process_are_left_as_they_were():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    self_test(seconds=0.0)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
