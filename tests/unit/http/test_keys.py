"""A write with an idempotency key is done once, also over a restart of the server."""

import threading
from pathlib import Path

import pytest

from ray_probe.errors import ConfigError, StateError
from ray_probe.http import keys
from ray_probe.http.keys import IdempotencyKeys


def never() -> str:
    raise AssertionError("it was written before")


def test_a_key_outlives_the_process_in_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    assert IdempotencyKeys(path).once("k", {"a": 1}, lambda: "m0001") == "m0001"
    assert path.stat().st_mode & 0o777 == 0o600
    assert IdempotencyKeys(path).once("k", {"a": 1}, never) == "m0001"
    with pytest.raises(ConfigError, match=r"^Idempotency-Key: got 'k'; it came with another request; take a new key"):
        IdempotencyKeys(path).once("k", {"a": 2}, never)


def test_a_write_whose_process_died_is_not_repeated(tmp_path: Path) -> None:
    path, died = tmp_path / "keys.json", IdempotencyKeys(tmp_path / "keys.json")

    def die() -> str:
        with pytest.raises(StateError, match=r"the server died during its first request; look into /v1/results"):
            IdempotencyKeys(path).once("k", 1, never)  # another process, as this one would be dead
        return "m0001"

    assert died.once("k", 1, die) == "m0001"


def test_a_write_that_fails_leaves_its_key_free(tmp_path: Path) -> None:
    known = IdempotencyKeys(tmp_path / "keys.json")

    def refuse() -> str:
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        known.once("k", 1, refuse)
    assert known.once("k", 2, lambda: "m0001") == "m0001"


def test_a_repetition_during_the_first_request_is_refused() -> None:
    known, begun, go_on = IdempotencyKeys(None), threading.Event(), threading.Event()
    found: list[str] = []

    def slow() -> str:
        begun.set()
        assert go_on.wait(10)
        return "m0001"

    thread = threading.Thread(target=lambda: found.append(known.once("k", 1, slow)))
    thread.start()
    assert begun.wait(10)
    with pytest.raises(StateError, match="its first request is still at work; repeat this one later"):
        known.once("k", 1, never)
    go_on.set()
    thread.join(10)
    assert found == ["m0001"] == [known.once("k", 1, never)]


def test_only_the_newest_keys_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "KEPT", 2)
    known = IdempotencyKeys(None)
    for number in range(3):
        known.once(f"k{number}", 1, lambda n=number: f"m{n}")  # type: ignore[misc]
    assert known.once("k2", 1, never) == "m2" and known.once("k0", 1, lambda: "again") == "again"
