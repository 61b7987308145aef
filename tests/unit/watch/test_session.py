"""A watch that is open: its request is checked, its series held, and a silent service waited for."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.watching import FakeService, saved

from ray_probe.errors import ClusterError, ConfigError, NoClusterError
from ray_probe.watch.entries import Entry
from ray_probe.watch.layouts import QUIET_S
from ray_probe.watch.session import SILENT_S, Watch, WatchRequest, default_series, opened


class Clock:
    """A clock that waiting moves on, at which things happen."""

    def __init__(self) -> None:
        self.now, self.then = 0.0, lambda: None  # type: ignore[var-annotated]

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.then()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "grpo").mkdir()
    return tmp_path / "grpo"


@pytest.fixture
def service(tmp_path: Path) -> FakeService:
    return FakeService(tmp_path / "service")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opening(tmp_path: Path, root: Path, service: FakeService, clock: Clock) -> Iterator[Callable[..., Watch]]:
    """Opens a watch on the directory; it is closed after the test."""
    with contextlib.ExitStack() as stack:

        def opened_with(**asked: Any) -> Watch:
            request = WatchRequest(root, **asked).checked()
            say: Callable[[Entry], None] = lambda entry: None  # noqa: E731
            return stack.enter_context(opened(request, service, 4, tmp_path / "locks", clock, say, lambda line: None))

        yield opened_with


def test_once_ends_when_all_that_is_there_is_measured(
    root: Path, service: FakeService, clock: Clock, opening: Callable[..., Watch]
) -> None:
    saved(root, 5)
    saved(root, 10)
    watch, clock.then = opening(), service.end_all
    watch.until_end(True, clock, clock.wait, lambda line: None)
    assert watch.code == 0 and {entry.state for entry in watch.entries.items} == {"measured"}


def test_once_waits_for_a_checkpoint_without_a_marker_to_stay_as_it_is(
    root: Path, service: FakeService, clock: Clock, opening: Callable[..., Watch]
) -> None:
    saved(root, 5, "step-{}")
    (root / "step-5" / "trainer_state.json").unlink()
    watch, clock.then = opening(), service.end_all
    watch.until_end(True, clock, clock.wait, lambda line: None)
    assert watch.code == 0 and clock.now > QUIET_S


def test_once_says_by_its_exit_code_that_a_checkpoint_is_not_measured(
    root: Path, service: FakeService, clock: Clock, opening: Callable[..., Watch]
) -> None:
    saved(root, 5)
    (saved(root, 10) / "trainer_state.json").unlink()
    watch, clock.then = opening(), service.end_all
    watch.until_end(True, clock, clock.wait, lambda line: None)
    assert watch.code == 3


def test_the_exit_code_of_a_measurement_that_failed_counts(
    root: Path, service: FakeService, clock: Clock, opening: Callable[..., Watch]
) -> None:
    saved(root, 5)
    watch, clock.then = opening(), lambda: service.end("m0001", "failed", "parity", 5)
    watch.until_end(True, clock, clock.wait, lambda line: None)
    assert watch.code == 5


def test_what_an_option_leaves_out_is_no_failure(
    root: Path, service: FakeService, clock: Clock, opening: Callable[..., Watch]
) -> None:
    for step in (1, 5, 10, 15):
        saved(root, step)
    watch, clock.then = opening(every=2, from_step=5), service.end_all
    watch.until_end(True, clock, clock.wait, lambda line: None)
    assert watch.code == 0 and len(service.asked) == 3


def test_a_silent_service_is_waited_for_while_checkpoints_are_pinned(
    root: Path, service: FakeService, clock: Clock, opening: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, said = opening(), []  # type: ignore[var-annotated]
    saved(root, 5)

    def silent() -> None:
        raise ClusterError("demo: no answer within 20 s")

    def answers_later() -> None:
        if clock.now > SILENT_S / 2:
            monkeypatch.undo()
            service.end_all()

    monkeypatch.setattr(service, "status", silent)
    clock.then = answers_later
    watch.until_end(True, clock, clock.wait, said.append)
    assert watch.code == 0 and said == [
        "demo: no answer within 20 s; checkpoints are pinned all the same, and queued once it answers"
    ]


@pytest.mark.parametrize("error", [ClusterError("silent"), NoClusterError("gone")])
def test_a_service_that_is_gone_ends_the_watch(
    root: Path, service: FakeService, clock: Clock, opening: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch,
    error: ClusterError,
) -> None:  # fmt: skip
    watch = opening()
    saved(root, 5)

    def fails() -> None:
        raise error

    monkeypatch.setattr(service, "status", fails)
    with pytest.raises(type(error)):
        watch.until_end(False, clock, clock.wait, lambda line: None)
    assert (clock.now > SILENT_S) == (type(error) is ClusterError)
    assert [entry.pin is not None for entry in watch.entries.items] == [True]


def test_a_second_watch_on_a_series_is_refused_and_one_on_another_is_not(
    tmp_path: Path, opening: Callable[..., Watch]
) -> None:
    opening()
    with pytest.raises(ConfigError, match=r"^--name: got 'grpo'; process \d+ .* watches this series; end it, or give"):
        opening()
    with pytest.raises(ConfigError, match=r"watches this series"):
        opening(spool=tmp_path / "elsewhere")
    opening(series="other")


def test_a_directory_without_checkpoints_is_refused_at_the_end(root: Path, opening: Callable[..., Watch]) -> None:
    with pytest.raises(ConfigError, match=r"^DIR: got .*; no checkpoint is in it; give the trainer's output"):
        opening().refuse_empty(root)


def test_a_place_that_cannot_be_written_is_one_line(root: Path, opening: Callable[..., Watch]) -> None:
    (root / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^--spool: got '.*file/watch/grpo'; .* cannot be made \(Not a directory\)"):
        opening(spool=root / "file")


@pytest.mark.parametrize(("asked", "said"), [
    ({"every": 0}, "--every: got 0; need an integer >= 1"),
    ({"from_step": -1}, "--from: got -1; need an integer >= 0"),
    ({"series": "My Run"}, "--name: got 'My Run'; need 1 to 63 of a-z"),
    ({"base": Path("/")}, "--base: got '/'; it has no config.json"),
    ({"convert": "x"}, "--convert: got 'x'; need a command with {src} and {dst}"),
])  # fmt: skip
def test_a_wrong_option_is_one_line(root: Path, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        WatchRequest(root, **asked).checked()
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_a_wrong_directory_is_one_line(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"^DIR: got .*none'; no such directory; give the trainer's output"):
        WatchRequest(root / "none").checked()
    with pytest.raises(ConfigError, match=r"^DIR: got .*; it is a checkpoint; give the directory above it$"):
        WatchRequest(saved(root, 5)).checked()


@pytest.mark.parametrize(("path", "name"), [
    ("/runs/GRPO v2", "grpo-v2"), ("/runs/Qwen.1/checkpoints", "qwen-1-checkpoints"), ("/", "series"),
    ("/runs/_" + "x" * 80, "x" * 63), ("/runs/été", "t"),
])  # fmt: skip
def test_a_series_takes_its_name_from_the_directory(path: str, name: str) -> None:
    assert default_series(Path(path)) == name
    assert WatchRequest(Path("/tmp"), name).checked().series == name
