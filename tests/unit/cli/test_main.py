"""What the command line refuses: one line on stderr that names field, value and remedy, and the exit code."""

import contextlib
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.checkpoints import raw_config
from support.replies import a_status

from ray_probe.cli import main as cli
from ray_probe.cli import service
from ray_probe.controller.replies import Scaled, Status
from ray_probe.run.directory import RunDirectory
from ray_probe.run.result import Result


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli")
    (directory / "run.yaml").write_text(yaml.safe_dump(raw_config(directory)))
    return directory


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ray-probe", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    assert isinstance(code, int)
    return code


REFUSED = [
    pytest.param(["run"], ["CONFIG", "--resume"], id="neither config nor resume"),
    pytest.param(["run", "{dir}/run.yaml", "--resume", "{dir}"], ["CONFIG", "--resume"], id="both"),
    pytest.param(["run", "{dir}/none.yaml"], ["none.yaml"], id="no such config"),
    pytest.param(["run", "{dir}"], ["{dir}"], id="config is a directory"),
    pytest.param(["run", "{dir}/run.yaml", "--set", "batch.rounds"], ["batch.rounds", "="], id="--set without a value"),
    pytest.param(
        ["run", "{dir}/run.yaml", "--set", "batch.round=1"], ["batch.round", "batch.rounds"], id="unknown key"
    ),
    pytest.param(["doctor", "--load"], ["--load", "give CONFIG"], id="nothing to load"),
    pytest.param(["run", "{dir}/run.yaml", "--set", "batch.rounds=-1"], ["batch.rounds", "-1", ">= 1"], id="range"),
    pytest.param(["run", "{dir}/run.yaml", "--actors", "0"], ["cluster.actors", "0", ">= 1"], id="no actors"),
    pytest.param(
        ["run", "{dir}/run.yaml", "--actors", "two"], ["cluster.actors", "two", ">= 1"], id="actors not a number"
    ),
    pytest.param(["run", "{dir}/run.yaml", "--address", "nowhere"], ["cluster.address", "nowhere"], id="address"),
    pytest.param(["run", "{dir}/run.yaml", "--frobnicate"], ["--frobnicate"], id="unknown option"),
    pytest.param(["frobnicate"], ["frobnicate"], id="unknown command"),
    pytest.param(["run", "{dir}/run.yaml", "--set", "model.path={dir}/nowhere"], ["model.path", "nowhere"], id="model"),
    pytest.param(["run", "{dir}/run.yaml", "--set", "data.prompts={dir}/no.jsonl"], ["no.jsonl"], id="prompts"),
    pytest.param(
        ["run", "{dir}/run.yaml", "--set", "generation.max_new_tokens=60"],
        ["prompts.jsonl:", "context", "data.on_long"],
        id="prompt and cap beyond the context",
    ),
    pytest.param(
        ["run", "{dir}/run.yaml", "--set", "data.repeat=false", "--set", "batch.rounds=90"],
        ["data.repeat", "540", "24"],
        id="too few prompts",
    ),
    pytest.param(["run", "--resume", "{dir}"], ["--resume", "{dir}", "config.yaml"], id="resume of no run"),
    pytest.param(
        ["run", "--resume", "{dir}", "--set", "data.seed=1"], ["--set", "data.seed=1", "cluster"], id="resume other"
    ),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_a_wrong_request_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: Path,
    arguments: list[str],
    words: list[str],
) -> None:
    code = call(monkeypatch, *(argument.format(dir=files) for argument in arguments))
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert said.err.count("\n") == 1 and said.err.startswith("error: ")
    for word in words:
        assert word.format(dir=files) in said.err
    assert not (files / "runs").exists(), "a refused run leaves nothing"


def test_an_unreachable_cluster_is_told_within_3_seconds_with_exit_code_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], files: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        code = call(monkeypatch, "run", files / "run.yaml", "--address", address)
    assert code == 4
    assert time.monotonic() - started < 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cluster.address" in error and address in error


def test_a_run_name_that_exists_is_refused_with_the_way_to_go_on(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, "mine")
    with pytest.raises(Exception, match="--resume") as refused:
        RunDirectory.create(tmp_path, "mine")
    assert getattr(refused.value, "exit_code", None) == 2


@pytest.mark.parametrize(
    ("conflicts", "partial", "code"), [([], False, 0), ([], ["0/1"], 3), (["0/1"], False, 1), (["0/1"], ["0/2"], 1)]
)
def test_exit_codes_of_a_finished_run(conflicts: list[str], partial: object, code: int) -> None:
    assert Result.from_json({"conflicts": conflicts, "partial": partial}).exit_code == code


@pytest.mark.parametrize("module", ["ray_probe", "ray_probe.cli.main"])
def test_as_a_module_it_is_the_same_command_line(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "run"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: CONFIG: give either a config file or --resume RUN_DIR\n"


class Asked:
    """A client that answers `status` with these, the last for ever."""

    def __init__(self, *answers: Status) -> None:
        self._answers = list(answers)
        self.asked = 0

    def scale(self, number: int) -> Scaled:
        return Scaled(number, 3, 4, ())

    def status(self) -> Status:
        self.asked += 1
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def scaled_status(asked: int, alive: int, starting: int = 0, leaving: int = 0, measuring: bool = True) -> Status:
    measurement = a_status().measurement if measuring else None
    return replace(
        a_status(), actors_asked=asked, actors_alive=alive, actors_starting=starting, actors_leaving=leaving,
        measurement=measurement,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("statuses", "number", "said", "code"),
    [
        ([scaled_status(1, 1, leaving=2)], 1, "asked 1, have 3: 2 leave once what they have done is committed", 0),
        ([scaled_status(1, 1, leaving=2, measuring=False), scaled_status(1, 1)], 1, "asked 1, have 1", 0),
        ([scaled_status(3, 1, starting=2)], 3, "asked 3, have 1, 2 loading", 4),
        (
            [scaled_status(4, 2, starting=1)], 4,
            "asked 4, have 2, 1 loading: the request stands, and is met when there is room", 4,
        ),
    ],
)  # fmt: skip
def test_scale_says_what_there_is_with_those_that_leave_and_load(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    statuses: list[Status],
    number: int,
    said: str,
    code: int,
) -> None:
    client = Asked(*statuses)
    monkeypatch.setattr(service, "SCALE_S", 0.5)
    monkeypatch.setattr(service, "connected", lambda *where, **more: contextlib.nullcontext(client))
    assert service.scale(number) == code
    assert capsys.readouterr().out == f"{said}\n"
    assert client.asked >= len(statuses)


def test_help_names_the_command_and_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", "--help") == 0
    said = capsys.readouterr().out
    assert all(option in said for option in ("--set", "--actors", "--address", "--out", "--resume"))
