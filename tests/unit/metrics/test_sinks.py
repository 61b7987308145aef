"""Sinks: what they write is read back, and one that is broken stops nothing."""

import builtins
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.results import a_result, typed
from support.services import until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ray_probe.config.reporting import MetricsConfig
from ray_probe.metrics.json_lines import FILE, JsonLines
from ray_probe.metrics.recorder import Recorder, sinks_of
from ray_probe.metrics.sink import SinkRun, figures
from ray_probe.metrics.tensorboard import TensorBoard
from ray_probe.run.comparison.change import Change, ChangeFigure, Figure
from ray_probe.run.result import Result

RESULT = Result.from_json(a_result())


def a_run(directory: Path, **changes: Any) -> SinkRun:
    directory.mkdir(exist_ok=True)
    fields = {"series": "grpo", "step": 40, "tags": {"lr": "1e-5"}} | changes
    return SinkRun("demo", "m0003", "/checkpoints/40", directory, **fields)


def test_every_figure_has_its_error_beside_it_and_none_is_missing():
    found = figures(RESULT)
    assert found["probe/entropy_per_response"] == 28.412 and found["probe/entropy_per_response_se"] == 0.618
    assert found["probe/entropy_per_token"] == 0.9213 and found["probe/entropy_per_token_se"] == 0.0131
    assert found["probe/length"] == 81234 / 2048 and found["probe/truncated"] == 61 / 2048
    assert found["probe/snr"] == 3.37 and found["probe/gradient_norm"] == 2.8144
    assert "probe/snr" not in figures(typed(gradient__snr=None)), "what cannot be formed is left out"


def test_a_comparison_gives_its_change_under_names_of_its_own():
    change = Change(total=ChangeFigure(-0.5, 0.1), pathwise=ChangeFigure(-0.4, 0.05), entropy_b=Figure(27.0, 0.7))
    found = figures(Result(change=change))
    assert (found["probe/change"], found["probe/change_se"]) == (-0.5, 0.1)
    assert (found["probe/change_pathwise"], found["probe/change_pathwise_se"]) == (-0.4, 0.05)
    assert found["probe/compared_entropy_per_response"] == 27.0
    assert not set(found) & (set(figures(RESULT)) - {"probe/parity_gap", "probe/responses", "probe/rounds"})


def test_a_line_of_json_is_written_for_the_run_and_for_the_service(tmp_path: Path):
    sink = JsonLines(tmp_path)
    for step in (40, None):
        sink.open(a_run(tmp_path / "m0003", step=step))
        sink.write(7, figures(RESULT))
    for directory in (tmp_path, tmp_path / "m0003"):
        lines = [json.loads(line) for line in (directory / FILE).read_text().splitlines()]
        assert [line["step"] for line in lines] == [40, None]
        assert lines[0]["measurement"] == "m0003" and lines[0]["tags"] == {"lr": "1e-5"}
        assert lines[0]["probe/entropy_per_response_se"] == 0.618
        assert (directory / FILE).stat().st_mode & 0o777 == 0o600


def test_tensorboard_shows_the_figures_at_the_trainers_steps_beside_the_trainers_own(tmp_path: Path):
    from tensorboardX import SummaryWriter

    board = tmp_path / "grpo"
    trainer = SummaryWriter(str(board))
    trainer.add_scalar("train/loss", 1.5, 40)
    trainer.close()
    sink = TensorBoard(str(tmp_path / "{series}"))
    for step in (40, 20):  # a late checkpoint may be measured first
        sink.open(a_run(tmp_path / "m0003", step=step))
        sink.write(step, figures(RESULT))
    events = EventAccumulator(str(board)).Reload()
    assert [(one.step, one.value) for one in events.Scalars("train/loss")] == [(40, 1.5)]
    written = [(one.step, one.value) for one in events.Scalars("probe/entropy_per_response_se")]
    assert written == [(40, pytest.approx(0.618)), (20, pytest.approx(0.618))]
    assert set(events.Tags()["scalars"]) == {"train/loss", *figures(RESULT)}
    assert any(".ray_probe" in path.name for path in board.iterdir())


class Broken:
    """Fails in one of its methods, or hangs until it is let on."""

    def __init__(self, fails: str) -> None:
        self.fails, self.calls, self.go_on = fails, 0, threading.Event()

    def open(self, run: SinkRun) -> None:
        self.calls += 1
        if self.fails == "open":
            raise OSError(28, "No space left on device")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self.fails == "exit":
            raise SystemExit(1)
        if self.fails == "hangs":
            self.go_on.wait(30.0)


@pytest.mark.parametrize(
    ("fails", "said"),
    [("open", "OSError: [Errno 28] No space left"), ("exit", "SystemExit: 1"), ("hangs", "hangs for 0.05 s")],
)
def test_a_broken_sink_warns_once_and_holds_up_neither_the_others_nor_the_work(
    tmp_path: Path, fails: str, said: str
):
    warnings: list[str] = []
    broken = Broken(fails)
    recorder = Recorder({"mine": broken, "lines": JsonLines(None)}, warnings.append, hangs_s=0.05)
    for number in range(3):
        recorder.record(a_run(tmp_path / "m0003", step=number), RESULT)
    until(lambda: recorder.idle)
    broken.go_on.set()
    until(lambda: broken.calls == 3)
    assert len((tmp_path / "m0003" / FILE).read_text().splitlines()) == 3
    assert len(warnings) == 1 and warnings[0].startswith(f"mine: {said}"), warnings
    assert "measurements go on" in warnings[0] and len(warnings[0].splitlines()) == 1


def test_a_library_that_is_not_installed_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(builtins, "__import__", _without("tensorboardX", builtins.__import__))
    warnings: list[str] = []
    recorder = Recorder(sinks_of(MetricsConfig(tensorboard=str(tmp_path)), None), warnings.append)
    for _ in range(2):
        recorder.record(a_run(tmp_path / "m0003"), RESULT)
    until(lambda: recorder.idle)
    assert len(warnings) == 1 and "No module named 'tensorboardX'" in warnings[0]
    assert "pip install 'ray-probe[tensorboard]'" in warnings[0]


def _without(name: str, import_: Callable[..., Any]) -> Callable[..., Any]:
    def missing(wanted: str, *arguments: Any, **options: Any) -> Any:
        if wanted == name:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return import_(wanted, *arguments, **options)

    return missing


def test_the_number_of_a_measurement_stands_for_a_step_that_is_not_known(tmp_path: Path):
    steps: list[int] = []

    class Steps(Broken):
        def write(self, step: int, values: Mapping[str, float]) -> None:
            steps.append(step)

    recorder = Recorder({"steps": Steps("")}, print)
    for step in (40, 0, None):
        recorder.record(a_run(tmp_path / "m0003", step=step), RESULT)
    until(lambda: recorder.idle)
    assert steps == [40, 0, 3]


def test_the_configured_sinks_are_made(tmp_path: Path):
    raw = {"tensorboard": str(tmp_path), "wandb": {"run": "r", "project": "p"}}
    assert list(sinks_of(MetricsConfig.model_validate(raw), tmp_path)) == [
        "metrics.jsonl", "metrics.tensorboard", "metrics.wandb",
    ]  # fmt: skip
    assert list(sinks_of(MetricsConfig(), None)) == ["metrics.jsonl"]
