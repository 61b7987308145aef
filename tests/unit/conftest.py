"""Unit tests start no Ray and wait for no clock: both belong to tests/integration and tests/faults."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def neither_ray_nor_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a unit test that calls `time.sleep` itself, or anything that starts or joins Ray in this process."""
    monkeypatch.setattr(time, "sleep", _refused_here(time.sleep))
    if (ray := sys.modules.get("ray")) is not None:
        monkeypatch.setattr(ray, "init", _refused)


def _refused(*args: Any, **options: Any) -> None:
    raise AssertionError("a unit test calls ray.init: move it to tests/integration")


def _refused_here(sleep: Callable[[float], None]) -> Callable[[float], None]:
    def checked(seconds: float) -> None:
        caller = sys._getframe(1).f_code.co_filename
        assert not caller.startswith(HERE), "a unit test calls time.sleep: give it an event, or a clock of its own"
        sleep(seconds)

    return checked
