import dataclasses
import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from ray_probe.report.progress_display import PLAIN_EVERY_S, ProgressDisplay
from ray_probe.run.progress import Progress


def a_snapshot(**changes: Any) -> Progress:
    start = Progress(
        round=0, rounds=2, shards=4, collected=2, accumulated=1, tokens=5000, elapsed_s=4.0, actors_asked=3,
        actors_alive=2, version=1, variance_ratio=0.0432,
    )  # fmt: skip
    return replace(start, **changes)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain_display() -> tuple[ProgressDisplay, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return ProgressDisplay(Console(file=stream, force_terminal=True), clock), stream, clock


def test_a_round_that_ends_gets_one_plain_line_with_all_of_it() -> None:
    display, stream, _ = plain_display()
    with display as show:
        show(a_snapshot())
        assert stream.getvalue() == ""
        show(a_snapshot(collected=4, accumulated=4))
        show(a_snapshot(collected=4, accumulated=4))
        show(a_snapshot(round=1, collected=0, accumulated=0))
        show(a_snapshot(round=1, collected=4, accumulated=4, version=0, variance_ratio=None, elapsed_s=0.0))
    first, second = stream.getvalue().splitlines()
    for expected in ("round 1/2 done", "records 4/4, gradients 4/4", "50 % of the run", "1,250 tokens/s", "beta v1",
                     "variance ratio 0.0432", "actors 2/3", "4 s"):  # fmt: skip
        assert expected in first
    for expected in ("round 2/2 done", "100 % of the run", "n/a tokens/s", "no beta yet", "variance ratio n/a"):
        assert expected in second


def test_a_comparison_counts_changes_and_no_gradients() -> None:
    display, stream, _ = plain_display()
    with display as show:
        show(a_snapshot(collected=4, accumulated=4, summed="changes"))
    assert "records 4/4, changes 4/4" in stream.getvalue() and "gradient" not in stream.getvalue()


def test_a_round_that_lost_shards_gets_its_line_when_the_next_begins() -> None:
    display, stream, _ = plain_display()
    with display as show:
        show(a_snapshot(collected=4, accumulated=3))
        show(a_snapshot(round=1, collected=0, accumulated=0))
        assert stream.getvalue().startswith("round 1/2 done: records 4/4, gradients 3/4")


def test_between_rounds_there_is_a_line_in_ten_seconds_at_most_and_notes_at_once() -> None:
    display, stream, clock = plain_display()
    with display as show:
        for _ in range(1000):
            clock.now += 2.5 * PLAIN_EVERY_S / 1000
            show(a_snapshot())
        assert stream.getvalue().count("round 1/2: ") == 2
        show(a_snapshot(note="shard 3 retried: [actor lost]"))
        show(a_snapshot(note="shard 2 retried"))
        clock.now += PLAIN_EVERY_S / 2
        show(a_snapshot())
    lines = stream.getvalue().splitlines()
    assert lines[2:4] == ["round 1/2: shard 3 retried: [actor lost]", "round 1/2: shard 2 retried"]
    assert lines[4].startswith("round 1/2: ")
    assert lines[5].startswith("round 1/2 done: ")
    assert len(lines) == 6


def test_a_run_that_breaks_says_how_far_it_came() -> None:
    display, stream, _ = plain_display()
    with pytest.raises(KeyboardInterrupt), display as show:
        show(a_snapshot())
        raise KeyboardInterrupt
    assert stream.getvalue().startswith("round 1/2 stopped: records 2/4")


def test_a_closed_stream_does_not_end_the_run() -> None:
    display, stream, _ = plain_display()
    with display as show:
        stream.close()
        show(a_snapshot(note="unheard"))


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_terminal_gets_a_live_bar_and_is_restored_however_it_ends(error: type[BaseException] | None) -> None:
    stream = Terminal()
    console = Console(file=stream, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    expected = pytest.raises(error) if error else pytest.MonkeyPatch.context()
    with expected, ProgressDisplay(console) as show:
        show(a_snapshot(note="shard 3 [retried]"))
        show(a_snapshot(collected=4, accumulated=4))
        if error:
            raise error
    text = stream.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    assert text.index("\x1b[?25l") < text.index("\x1b[?25h")
    assert text.index("round 1/2: shard 3 [retried]") < text.rindex("round 1/2")
    for piece in ("50%", "1,250 tok/s", "beta v1", "var ratio 0.0432", "actors 2/3"):
        assert piece in text


def test_a_note_of_no_round_is_a_line_alone_and_moves_nothing() -> None:
    display, stream, _ = plain_display()
    with display as show:
        show(dataclasses.replace(a_snapshot(note="starting Ray on this machine"), rounds=0))
    assert stream.getvalue() == "starting Ray on this machine\n"


@pytest.mark.parametrize(
    ("width", "there"),
    [
        (100, {"1,250 tok/s", "beta v1", "var ratio 0.0432", "actors 2/3"}),
        (76, {"1,250 tok/s", "var ratio 0.0432", "actors 2/3"}),
        (60, {"1,250 tok/s", "actors 2/3"}),
        (40, {"actors 2/3"}),
    ],
)
def test_a_narrow_terminal_gets_fewer_numbers_and_none_that_is_cut(width: int, there: set[str]) -> None:
    stream = Terminal()
    console = Console(file=stream, force_terminal=True, width=width, _environ={"TERM": "xterm"}, color_system=None)
    with ProgressDisplay(console) as show:
        show(a_snapshot())
    last = [line for line in stream.getvalue().splitlines() if "round 1/2" in line][-1]
    everything = {"1,250 tok/s", "beta v1", "var ratio 0.0432", "actors 2/3"}
    assert {text for text in everything if text in last} == there, last
    assert "…" not in last and "round 1/2" in last
