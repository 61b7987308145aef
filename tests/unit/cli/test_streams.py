"""Output that cannot be written is one line and never a traceback; signs that cannot be written become plain ones."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
from support.replies import a_beta, a_status, a_variance, an_info
from support.results import a_result

from ray_probe.cli import main as cli
from ray_probe.cli import streams
from ray_probe.controller.replies import Scaled
from ray_probe.doctor.checks import Check
from ray_probe.errors import OutputError
from ray_probe.report.signs import ENCODING_ERRORS, spelled
from ray_probe.run.result import Result
from ray_probe.service.client import ProbeClient

LAUNCH = Path(__file__).parents[3] / "launch.py"
RESULT = a_result() | {"schema_version": 1}


class Client:
    """Answers as a service would."""

    name = "demo"

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def status(self) -> Any:
        return a_status()

    def beta(self, version: int | None, measurement: str | None) -> Any:
        return a_beta()

    def variance(self, measurement: str | None) -> Any:
        return a_variance()

    def results(self) -> Any:
        return (an_info(),)

    def measured(self, measurement: str | None) -> Any:
        return an_info(), Result.from_json(RESULT)

    def logs(self, measurement: str | None, lines: int) -> Any:
        return ("a line ± 1",)

    def scale(self, actors: int) -> Any:
        return Scaled(actors, actors, actors, ())

    def cancel(self, measurement: str) -> Any:
        return an_info()

    def drain(self, on: bool) -> None:
        pass

    def probe(self, *asked: Any) -> str:
        return "m0003"

    def ended(self, *asked: Any) -> Any:
        return Result.from_json(RESULT)


COMMANDS: dict[str, tuple[str, ...]] = {
    "run": ("run", "{dir}/run.yaml"), "run as JSON": ("run", "{dir}/run.yaml", "--json"),
    "finished run": ("results", "{dir}"), "finished run as CSV": ("results", "{dir}", "--format", "csv"),
    "finished run as Markdown": ("results", "{dir}", "--format", "md"),
    "finished run as JSON": ("results", "{dir}", "--format", "json"),
    "status": ("status",), "status as JSON": ("status", "--json"), "beta": ("beta",), "variance": ("variance",),
    "results": ("results",), "results as CSV": ("results", "--format", "csv"),
    "results as Markdown": ("results", "--format", "md"), "one result": ("results", "m0003"), "logs": ("logs",),
    "scale": ("scale", "2"), "cancel": ("cancel", "m0003"), "drain": ("drain",),
    "probe": ("probe", "{dir}", "--wait"), "doctor": ("doctor",), "doctor as JSON": ("doctor", "--json"),
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run; and every command of `COMMANDS` answers without a cluster."""
    (tmp_path / "result.json").write_text(json.dumps(RESULT))

    def execute(request: Any, listener: Any, state: Any) -> Any:
        state.directory = tmp_path
        return Result.from_json(RESULT)

    def diagnose(*asked: Any, **named: Any) -> Iterator[Check]:
        yield from (Check("versions", "ok", "torch ± 1"), Check("disk", "failed", "full", "make room", 1))

    monkeypatch.setattr("ray_probe.service.run_once.execute", execute)
    monkeypatch.setattr("ray_probe.doctor.diagnosis.diagnose", diagnose)
    monkeypatch.setattr(ProbeClient, "connect", classmethod(lambda cls, *where: Client()))
    monkeypatch.setattr("ray_probe.cli.service.SCALE_S", 0.0)
    return tmp_path


def called(monkeypatch: pytest.MonkeyPatch, name: str, run: Path, stdout: TextIO | None) -> tuple[int, str]:
    """Exit code and stderr of a command whose stdout is this."""
    arguments = [argument.format(dir=run) for argument in COMMANDS[name]]
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["ray-probe", *arguments])
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code, stderr.getvalue()


def a_place(name: str, run: Path) -> str:
    return an_info().directory if name == "probe" else str(run)


def full() -> TextIO:
    return open("/dev/full", "w", encoding="utf-8")


def without_reader() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8")


BROKEN: dict[str, tuple[Callable[[], TextIO | None], str]] = {
    "closed": (lambda: None, "Bad file descriptor"),
    "full": (full, "No space left on device"),
    "no reader": (without_reader, "Broken pipe"),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_stdout_that_takes_nothing_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, run: Path, name: str, how: str
) -> None:
    make, reason = BROKEN[how]
    stdout = make()
    code, said = called(monkeypatch, name, run, stdout)
    error = said.splitlines()[-1]
    assert code == 1
    assert error.startswith(f"error: stdout: cannot be written ({reason})")
    assert "Traceback" not in said and said.count("error:") == 1
    if name in ("run", "run as JSON", "finished run", "finished run as CSV", "probe"):
        assert error.endswith(f"; results, plots and log: {a_place(name, run)}"), "where the results are"
    if name in ("scale", "cancel", "drain"):
        assert "; " in error, "what was done"
    if stdout is not None:
        stdout.close()  # nothing is left in it that could not be written


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("name", COMMANDS)
def test_signs_that_cannot_be_written_become_plain_ones_and_the_exit_code_stays(
    monkeypatch: pytest.MonkeyPatch, run: Path, name: str, encoding: str
) -> None:
    kept = io.BytesIO()
    code, said = called(monkeypatch, name, run, io.TextIOWrapper(kept, encoding=encoding))
    text = kept.getvalue().decode(encoding)
    assert code == (1 if name.startswith("doctor") else 0), said
    assert text.endswith("\n") and "?" not in text and "\\u" not in text.replace("\\u00b1", "")
    if name in ("run", "finished run", "results", "logs", "doctor", "variance"):
        assert (" +- " if encoding == "ascii" else " ± ") in text


def test_a_partial_run_keeps_its_exit_code_where_the_table_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    (run / "result.json").write_text(json.dumps(RESULT | {"partial": ["0/3"]}))
    with full() as stdout:
        assert called(monkeypatch, "finished run", run, stdout)[0] == 3


def test_what_no_encoding_has_is_escaped_and_not_lost() -> None:
    assert spelled("28.4 ± 0.6 nats² …", "ascii") == "28.4 +- 0.6 nats^2 ..."
    assert spelled("± ² ─", "latin-1") == "± ² -"
    assert spelled("/data/modèle-模", "ascii") == "/data/mod\\xe8le-\\u6a21"
    assert spelled("/data/\udce9", "utf-8") == "/data/\\udce9"
    assert spelled("± ² ─ 模", "utf-8") == "± ² ─ 模"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", ENCODING_ERRORS)


def test_words_for_a_stderr_that_takes_nothing_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    with full() as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        streams.tell("unheard")
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    streams.tell("unheard")
    with pytest.raises(OutputError, match="closed file"):
        streams.write("text", closed)


def shell(script: str, directory: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = f"{sys.executable} {LAUNCH} results {directory}"
    return subprocess.run(
        ["bash", "-c", script.replace("CMD", command)], env=os.environ | environment, capture_output=True, text=True,
        check=False, encoding="utf-8",
    )  # fmt: skip


PLACES = {
    "CMD >&-": (1, "Bad file descriptor"),
    "CMD >/dev/full": (1, "No space left on device"),
    "CMD | true; exit ${PIPESTATUS[0]}": (1, "Broken pipe"),
    "CMD >/dev/full 2>/dev/full": (1, ""),
    "CMD >&- 2>&- <&-": (1, ""),
    "CMD --help >/dev/full": (1, "No space left on device"),
    "PYTHONUNBUFFERED=1 CMD --help >/dev/full": (1, "No space left on device"),
    "CMD/nowhere 2>/dev/full": (2, ""),
}


@pytest.mark.parametrize("script", PLACES)
def test_a_process_of_its_own_says_the_same(tmp_path: Path, script: str) -> None:
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    code, reason = PLACES[script]
    done = shell(script, tmp_path, PYTHONUNBUFFERED="")
    assert done.returncode == code
    assert (reason in done.stderr) and done.stderr.count("\n") == (1 if reason else 0), done.stderr


def test_an_ascii_process_of_its_own_prints_the_whole_table(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shell("CMD --verbose", tmp_path, **ascii_only)
    assert (done.returncode, done.stderr) == (0, "")
    assert "28.41 +- 0.62 nats" in done.stdout and "17.91 +- 0.38" in done.stdout and "nats^2" in done.stdout
    assert done.stdout.isascii() and str(tmp_path) in done.stdout.splitlines()[-1]
