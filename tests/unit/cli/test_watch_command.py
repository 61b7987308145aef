"""The lines of a watch: one for each new state, in 80 columns, commands whole."""

import io
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ray_probe.cli.main import app
from ray_probe.cli.watch import REPEAT_S, WIDTH, Lines, line_of
from ray_probe.errors import ConfigError
from ray_probe.watch.entries import Entry

NOW = datetime(2026, 11, 29, 16, 0, 5, tzinfo=UTC)


@pytest.mark.parametrize(("entry", "line"), [
    (Entry("/out/checkpoint-5", "queued", step=5, comparison="m0001", gradient="m0002"),
     "16:00:05  checkpoint-5: queued as m0001, m0002\n"),
    (Entry("/out/best", "measured", step=5, gradient="m0002"), "16:00:05  best, step 5: measured as m0002\n"),
    (Entry("/out/checkpoint-5", "waiting", "trainer_state.json", 5),
     "16:00:05  checkpoint-5: waiting for trainer_state.json\n"),
    (Entry("/out/checkpoint-5", "queued", "to be compared with the next", 5),
     "16:00:05  checkpoint-5: queued, to be compared with the next\n"),
    (Entry("/out/checkpoint-5", "skipped", "--every 3", 5), "16:00:05  checkpoint-5: skipped, --every 3\n"),
    (Entry("/out/checkpoint-5", "vanished", "it was deleted before it was pinned", 5),
     "16:00:05  checkpoint-5: vanished, it was deleted before it was pinned\n"),
])  # fmt: skip
def test_a_line_says_state_measurements_and_reason(entry: Entry, line: str) -> None:
    assert line_of(entry, NOW) == line


def test_a_long_reason_is_wrapped_and_a_command_is_not() -> None:
    text = line_of(Entry("/out/checkpoint-5", "skipped", "a reason of many words, " * 9, 5), NOW)
    assert max(map(len, text.splitlines())) <= WIDTH and text.splitlines()[1].startswith(" " * 10)
    command = "python -m verl.model_merger merge --backend fsdp --local_dir /a/long/path/to/actor --target_dir /b"
    text = line_of(Entry("/out/global_step_5", "needs conversion", command, 5), NOW)
    assert text == f"16:00:05  global_step_5: needs conversion\n    {command}\n"


def test_a_new_state_is_shown_at_once_and_a_new_reason_after_a_while() -> None:
    now, out = [0.0], io.StringIO()
    lines = Lines(out, lambda: now[0])

    def say(state: str, why: str = "") -> list[str]:
        lines.say(Entry("/out/checkpoint-5", state, why, 5))  # type: ignore[arg-type]
        return shown()

    def shown() -> list[str]:
        found = out.getvalue().splitlines()
        out.seek(0)
        out.truncate()
        return [line[10:] for line in found]

    assert say("waiting", "config.json") == ["checkpoint-5: waiting for config.json"]
    assert say("waiting", "the rest of x (1 of 9 bytes)") == say("waiting", "the rest of x (5 of 9 bytes)") == []
    lines.flush(REPEAT_S)
    assert shown() == []
    now[0] = REPEAT_S
    lines.flush(REPEAT_S)
    lines.flush(0.0)
    assert shown() == ["checkpoint-5: waiting for the rest of x (5 of 9 bytes)"]
    say("waiting", "trainer_state.json")
    assert say("queued") == ["checkpoint-5: queued"]
    lines.flush(0.0)
    assert shown() == [], "a reason of the state before is not shown after it"


@pytest.mark.parametrize(("arguments", "said"), [
    (["c.yaml", "--url", "http://127.0.0.1:1/#token=secret"],
     "--url: got 'http://127.0.0.1:1/'; CONFIG starts a service; give one of the two"),
    (["--on-result", "cat"], "--on-result: got 'cat'; it is of the service: give it to `up`, or add CONFIG"),
])  # fmt: skip
def test_options_of_another_service_are_refused_in_one_line(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        CliRunner().invoke(app, ["watch", str(tmp_path), *arguments], catch_exceptions=False, standalone_mode=False)
    field, _, remedy = said.partition("; ")
    assert str(refused.value).startswith(field) and remedy in str(refused.value)
    assert "secret" not in str(refused.value)
