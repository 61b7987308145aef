"""Fingerprints of checkpoints and adapters, and NaN found in the same read."""

import hashlib
import platform
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from ray_probe.checkpoints.files import ADAPTER_FILES, CHECKPOINT_FILES, matching_files, unusable
from ray_probe.checkpoints.weight_scan import WeightScan

_BLOCK_BYTES = 1 << 20  # stays in a core's cache for the digest and the scan


@dataclass(frozen=True)
class Contents:
    """The outcome of reading every byte of a directory.

    Attributes:
        fingerprint: sha256 over names and contents of its files, hexadecimal.
        not_finite: names of the tensors that hold NaN or infinity.
    """

    fingerprint: str
    not_finite: tuple[str, ...]


def read_through(directory: Path, patterns: Iterable[str], weights: Collection[Path] = ()) -> Contents:
    """Read the matching files once.

    Args:
        directory: that holds the files.
        patterns: of their names.
        weights: safetensors files among them to search for NaN and infinity; their headers must be sound.
    """
    digest, not_finite = hashlib.sha256(), []
    for file in matching_files(directory, patterns):
        scan = WeightScan(file) if file in weights else None
        digest.update(file.name.encode() + b"\0" + _sha256(file, scan))
        not_finite += [] if scan is None else scan.not_finite
    return Contents(digest.hexdigest(), tuple(not_finite))


def fingerprint(directory: Path, patterns: Iterable[str] = CHECKPOINT_FILES) -> str:
    """Return the sha256 over names and contents of the matching files, hexadecimal."""
    return read_through(directory, patterns).fingerprint


def adapter_fingerprint(directory: Path) -> str:
    """Return the sha256 of an adapter's files, hexadecimal."""
    return fingerprint(directory, ADAPTER_FILES)


def check_fingerprint(directory: Path, expected: str, adapter: Path | None = None, adapter_expected: str = "") -> None:
    """Refuse files that differ from those that the run measures.

    Raises:
        CheckpointError: they were overwritten, or are another node's copy.
    """
    found = [("model.path", directory, fingerprint(directory), expected)]
    if adapter is not None:
        found.append(("model.adapter", adapter, adapter_fingerprint(adapter), adapter_expected))
    for field, place, there, wanted in found:
        if there != wanted:
            problem = f"its files on node {platform.node()} have the fingerprint {there[:12]}, the run measures"
            raise unusable(
                place, f"{problem} {wanted[:12]}", "keep a checkpoint as it is while it is measured", field
            )


def _sha256(file: Path, scan: WeightScan | None) -> bytes:
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(block[:count])
            if scan is not None:
                scan.feed(block[:count])
    return digest.digest()
