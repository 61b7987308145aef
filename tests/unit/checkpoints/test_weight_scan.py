"""NaN and infinity are found in a file, for any dtype and block size."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.models import save_checkpoint, tiny_llama

from ray_probe.checkpoints.files import CHECKPOINT_FILES
from ray_probe.checkpoints.fingerprint import fingerprint, read_through
from ray_probe.checkpoints.weight_scan import WeightScan

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def scanned(file: Path, block: int) -> list[str]:
    scan, data = WeightScan(file), memoryview(file.read_bytes())
    for start in range(0, len(data), block):
        scan.feed(data[start : start + block])
    return scan.not_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_not_finite_is_found_at_either_end(tmp_path: Path, dtype: torch.dtype, value: float):
    for place in (0, 6):
        tensors = {name: torch.full((7,), torch.finfo(dtype).max, dtype=dtype) for name in "abc"}
        tensors["b"][place] = value
        safetensors.torch.save_file(tensors, tmp_path / "t.safetensors")
        for block in (1, 3, 8, 1000):
            assert scanned(tmp_path / "t.safetensors", block) == ["b"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_numbers_of_any_size_pass(tmp_path: Path, dtype: torch.dtype):
    limits = torch.finfo(dtype)
    numbers = torch.tensor([limits.max, limits.min, limits.tiny, limits.smallest_normal, 0.0, -0.0], dtype=dtype)
    safetensors.torch.save_file({"a": numbers}, tmp_path / "t.safetensors")
    assert scanned(tmp_path / "t.safetensors", 5) == []


def test_types_can_be_mixed_and_integers_are_no_floating_point_numbers(tmp_path: Path):
    tensors = {
        "odd": torch.ones(3, dtype=torch.int8), "empty": torch.ones(0), "half": torch.ones(3, dtype=torch.bfloat16),
        "wide": torch.tensor([1.0, torch.nan, torch.inf]), "whole": torch.full((2,), -1, dtype=torch.int64),
        "last": torch.tensor([-torch.inf], dtype=torch.float16),
    }  # fmt: skip
    safetensors.torch.save_file(tensors, tmp_path / "t.safetensors")
    for block in (1, 2, 7, 64):
        assert sorted(scanned(tmp_path / "t.safetensors", block)) == ["last", "wide"]


def test_looking_changes_no_fingerprint_and_only_the_weights_that_are_loaded_are_looked_at(tmp_path: Path):
    checkpoint = save_checkpoint(tmp_path / "c", tiny_llama(8), "abcdef")
    weights = checkpoint / "model.safetensors"
    safetensors.torch.save_file({"other": torch.tensor([torch.nan])}, checkpoint / "other.safetensors")
    contents = read_through(checkpoint, CHECKPOINT_FILES, [weights])
    assert contents.not_finite == () and contents.fingerprint == fingerprint(checkpoint)
    assert read_through(checkpoint, CHECKPOINT_FILES, [checkpoint / "other.safetensors"]).not_finite == ("other",)
