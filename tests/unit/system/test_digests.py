"""Digests find every changed bit, and are those that other tools compute."""

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ray_probe.cluster.controller_actor import SERVICE_CONFIG
from ray_probe.config.loading import config_from_dict
from ray_probe.errors import ConfigError
from ray_probe.service.service_directory import write_config
from ray_probe.system.digests import (
    SUMS,
    FileDigest,
    chained,
    check_recorded,
    lost_its_end,
    record,
    recorded,
    sealed,
    sha256_of,
    unchained,
    unsealed,
)

FILES = {"a.json": b'{"a": 1}\n', "b.yaml": b"b: 2\n"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    record(tmp_path, FILES)
    return tmp_path


def flips(data: bytes) -> list[bytes]:
    """The data with each bit flipped in turn."""
    return [
        data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]
        for place in range(len(data))
        for bit in range(8)
    ]


def test_what_is_on_record_is_what_sha256sum_checks(directory: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "a.json: OK\nb.yaml: OK\n"


def test_a_file_or_its_record_with_a_flipped_bit_is_refused_by_name(directory: Path) -> None:
    for name, data in FILES.items():
        check_recorded(directory, name, data)
        for flipped in flips(data):
            with pytest.raises(ConfigError, match=rf"{name}: is damaged or was edited: it does not match {SUMS}"):
                check_recorded(directory, name, flipped)
    whole = (directory / SUMS).read_bytes()
    for flipped in flips(whole):
        (directory / SUMS).write_bytes(flipped)
        refused = 0
        for name, data in FILES.items():
            try:
                check_recorded(directory, name, data)
            except ConfigError as error:
                assert SUMS in str(error) and "\n" not in str(error)
                refused += 1
        assert refused in (1, 2), "what holds of one file says nothing of the other"


def test_another_file_is_put_on_record_beside_those_that_are_there(directory: Path) -> None:
    record(directory, {"c.json": b"{}"})
    record(directory, {"a.json": b"new"})
    now = FILES | {"a.json": b"new", "c.json": b"{}"}
    assert recorded(directory) == {name: hashlib.sha256(data).hexdigest() for name, data in now.items()}
    assert recorded(directory / "elsewhere") is None
    check_recorded(directory / "elsewhere", "a.json", b"a directory without a record says nothing")


def test_a_line_with_a_flipped_bit_or_in_another_place_does_not_fit() -> None:
    first, chain = chained(json.dumps({"round": 0, "x": 0.1}), 0)
    second, end = chained(json.dumps({"round": 1}), chain)
    assert json.loads(second) == {"round": 1, "crc": f"{end:08x}"}
    assert unchained(first, 0) == ({"round": 0, "x": 0.1}, chain) and unchained(second, chain) == ({"round": 1}, end)
    for flipped in flips(second):
        with pytest.raises(ValueError, match="checksum"):
            unchained(flipped, chain)
    for place in (0, end):
        with pytest.raises(ValueError, match="checksum does not fit"):
            unchained(second, place)


def test_a_line_that_was_cut_off_is_told_from_one_whose_line_break_was_damaged() -> None:
    line, _ = chained(json.dumps({"round": 0}), 0)
    assert not any(lost_its_end(line[:end], 0) for end in range(len(line)))
    assert all(lost_its_end(flipped, 0) for flipped in flips(line)[-8:])


def test_sealed_json_is_json_and_any_flipped_bit_breaks_the_seal() -> None:
    value = {"draining": False, "measurements": [{"id": "m0001", "x": 0.1}], "é": None}
    data = sealed(value)
    assert unsealed(data) == value and list(json.loads(data)) == [*value, "sha256"]
    for spoilt in (*flips(data), data[:-1], b"", data + b"\n", json.dumps(value).encode()):
        with pytest.raises(ValueError, match="sha256 does not fit"):
            unsealed(spoilt)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("taken", [0, 3, 10])
def test_the_digest_of_a_file_is_the_same_in_whatever_order_its_pieces_came(
    tmp_path: Path, order: int, taken: int
) -> None:
    data = np.random.default_rng(0).bytes(1000)
    path = tmp_path / "file"
    path.write_bytes(data)
    digest = FileDigest()
    digest.take(0, data[:8])
    pieces = [(8 + 100 * number, data[8 + 100 * number : 108 + 100 * number]) for number in range(10)][::order]
    for offset, piece in pieces[:taken]:
        digest.take(offset, memoryview(piece))
    assert digest.finish(path) == sha256_of(path) == hashlib.sha256(data).hexdigest()


def test_a_services_configuration_is_on_record_and_written_anew_over_a_damaged_one(tmp_path: Path) -> None:
    config = config_from_dict({"model": {"path": "m"}, "data": {"prompts": "p.jsonl"}})
    for _ in range(2):
        write_config(config, tmp_path)
        data = (tmp_path / SERVICE_CONFIG).read_bytes()
        check_recorded(tmp_path, SERVICE_CONFIG, data)
        with pytest.raises(ConfigError, match=r"service\.yaml: is damaged .*; up again"):
            check_recorded(tmp_path, SERVICE_CONFIG, data.replace(b"top_p: 0.95", b"top_p: 0.85"), "up again")
        (tmp_path / SUMS).write_bytes(b"damaged")
