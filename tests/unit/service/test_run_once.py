"""A run's driver reports the end of the run to sinks and notifications."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.replies import an_info
from support.results import a_result

from ray_probe.config.loading import config_from_dict
from ray_probe.errors import ClusterError
from ray_probe.run.progress import Progress
from ray_probe.run.result import Result
from ray_probe.service import run_once
from ray_probe.service.run_once import Notes, _report

RESULT = Result.from_json(a_result())


@pytest.fixture
def reported(tmp_path: Path) -> Callable[..., list[str]]:
    """Reports the end of a measurement; returns the messages, and leaves `ran` and `metrics.jsonl`."""
    command = f"sh -c 'echo $RAY_PROBE_STATE >> {tmp_path}/ran; echo no >&2; exit 3'"
    raw = {"model": {"path": "m"}, "data": {"prompts": "p"}, "notify": {"command": command}}

    def report(result: Result | None = RESULT, error: Exception | None = None, **fields: Any) -> list[str]:
        info = replace(an_info(), directory=str(tmp_path), step=7, **fields)

        def measured(identity: str) -> tuple[Any, Result | None]:
            if error is not None:
                raise error
            return info, result

        said: list[Progress] = []
        client: Any = SimpleNamespace(name="mine", head_lost=False, measured=measured)
        _report(client, info.id, config_from_dict(raw), Notes(said.append))
        return [str(one.note) for one in said]

    return report


def test_the_end_is_recorded_and_notified_and_a_failing_program_is_one_warning(
    reported: Callable[..., list[str]], tmp_path: Path
):
    (said,) = reported(state="done", finished="2026-05-01T13:00:00+00:00")
    assert said.startswith("warning: notify: RuntimeError: m0003: notify.command: exit code 3: no; measurements go on")
    (line,) = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (line["service"], line["step"], line["probe/snr"]) == ("mine", 7, 3.37)
    assert (tmp_path / "ran").read_text() == "done\n"


def test_a_run_that_failed_is_notified_and_gives_no_figures(reported: Callable[..., list[str]], tmp_path: Path):
    reported(None, state="failed", finished="2026-05-01T13:00:00+00:00")
    assert (tmp_path / "ran").read_text() == "failed\n" and not (tmp_path / "metrics.jsonl").exists()


def test_a_run_that_has_not_ended_or_is_interrupted_or_lost_is_not_reported(
    reported: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reported(state="running", finished=None)
    reported(error=ClusterError("it is gone"))
    monkeypatch.setattr(run_once, "interrupted", lambda: True)
    reported(state="cancelled", finished="2026-05-01T13:00:00+00:00")
    assert not (tmp_path / "ran").exists()
