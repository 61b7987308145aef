"""Types that are JSON objects are read in several threads of a controller at once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import make_dataclass
from typing import Any

import pydantic
import pytest

from ray_probe.system.json_object import JsonObject


def test_one_thread_at_a_time_has_pydantic_read_a_type(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most, real = [0], [0], pydantic.TypeAdapter

    def slow(kind: type[Any]) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        threading.Event().wait(0.02)
        inside[0] -= 1
        return real(kind)

    monkeypatch.setattr(pydantic, "TypeAdapter", slow)
    kinds = [make_dataclass(f"Kind{n}", [("size", int)], bases=(JsonObject,), frozen=True) for n in range(6)]
    with ThreadPoolExecutor(6) as pool:
        read = list(pool.map(lambda kind: kind.from_json({"size": 3}), kinds))
    assert [one.size for one in read] == [3] * 6
    assert most[0] == 1
