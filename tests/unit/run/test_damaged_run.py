"""Whatever bit flips in whatever file of a run, a resume gives the same result or refuses the file by its name."""

import json
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.light import light_config, light_prepared
from support.light_workers import LightWorkers
from support.runs import untimed

from ray_probe.config import ProbeConfig
from ray_probe.controller.measurement import Job, measure
from ray_probe.errors import InputError
from ray_probe.report import plots
from ray_probe.run.backend import Stopped
from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation import prepare
from ray_probe.run.preparation.prepared import PreparedRun
from ray_probe.run.progress import Progress
from ray_probe.service import run_once, run_request
from ray_probe.system.digests import SUMS, chained, sha256_of

ROUNDS, GROUP = 5, 2
ENDED = ("finished", "stopped")
FLIPS = 12
UNREAD = ("log.txt", "lock", "result.json", "report.html", SUMS)
"""Never read by a resume, or written again where damage shows; SHA256SUMS where its line of result.json is hit."""

Spoil = Callable[[bytes], bytes | None]


def prepared_of(config: ProbeConfig, created: datetime | None = None) -> PreparedRun:
    return light_prepared(config)


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "prepare", prepared_of)
    monkeypatch.setattr(plots, "write_plots", lambda *_: None)


def resumed(path: Path) -> dict[str, Any]:
    """What `run --resume` does, but for Ray: everything that it refuses here it refuses before Ray is started."""
    notes = run_once.Notes(lambda progress: None)
    config, directory = run_request.resolve(run_request.RunRequest(None, path, ()))
    assert directory is not None
    prepared = run_once.prepared_run(config, directory, notes)
    if (result := run_once.finished_result(directory, prepared, notes)) is not None:
        return result.to_json()
    return measure(Job(prepared, resume=True), LightWorkers(), lambda progress: None, lambda: False).to_json()


class Ended:
    """A run that was ended, put back as it was before each resume; and the result of one that nothing happened to."""

    def __init__(self, home: Path, how: str) -> None:
        config = light_config(home, batch={"rounds": ROUNDS}, output={"name": how, "commit_rounds": GROUP})
        self.path, self._kept = home / how, home / "kept"
        self._start(config, lambda progress: False)
        self.result, self.gradient = untimed(resumed(self.path)), self.state()
        if how == "stopped":
            shutil.rmtree(self.path)
            with pytest.raises(Stopped):  # in the fourth round, the second after the first commit
                self._start(config, lambda progress: progress.round == 3 and progress.collected >= 3)
            assert untimed(resumed(self.path)) == self.result and self.state() == self.gradient
            shutil.rmtree(self.path)
            with pytest.raises(Stopped):
                self._start(config, lambda progress: progress.round == 3 and progress.collected >= 3)
        shutil.copytree(self.path, self._kept)

    def _start(self, config: ProbeConfig, until: Callable[[Progress], bool]) -> None:
        seen: list[Progress] = []
        measure(Job(prepared_of(config), False), LightWorkers(), seen.append, lambda: bool(seen) and until(seen[-1]))

    def state(self) -> bytes:
        return (self.path / "state" / f"gradient-{ROUNDS - 1:06d}.npy").read_bytes()

    @property
    def files(self) -> dict[str, bytes]:
        paths = sorted(path for path in self._kept.rglob("*") if path.is_file())
        return {str(path.relative_to(self._kept)): path.read_bytes() for path in paths}

    def with_file(self, name: str, data: bytes | None) -> None:
        """The directory as it was ended, but for this file."""
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self._kept, self.path)
        (self.path / name).unlink()
        if data is not None:
            (self.path / name).write_bytes(data)

    def check(self, name: str, what: str) -> bool:
        """Resume, and hold the result to the promise; returns whether it was refused."""
        try:
            result = resumed(self.path)
        except InputError as error:
            told = str(error)
            assert error.exit_code == 2 and "\n" not in told
            assert Path(name).name in told, f"{what} of {name}: {told}"
            return True
        assert untimed(result) == self.result, f"{what} of {name}"
        assert self.state() == self.gradient, f"{what} of {name}"
        return False


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damage")


@pytest.fixture(params=ENDED)
def ended(homes: Path, request: pytest.FixtureRequest) -> Iterator[Ended]:
    home = homes / request.param / "runs"
    home.mkdir(parents=True, exist_ok=True)
    made = Ended(home, request.param)
    yield made
    shutil.rmtree(home)


def places(data: bytes, numbers: np.random.Generator) -> set[int]:
    """The ends of a file, some of its line breaks, and bytes anywhere."""
    breaks = [place for place, byte in enumerate(data) if byte == ord("\n")]
    some = numbers.choice(breaks, min(3, len(breaks)), replace=False).tolist() if breaks else []
    return {0, len(data) - 1, *some, *numbers.integers(len(data), size=FLIPS).tolist()}


def test_a_flipped_bit_in_any_file_is_refused_by_the_files_name_or_changes_nothing(ended: Ended) -> None:
    numbers, refused = np.random.default_rng(7), dict[str, int]()
    for name, data in ended.files.items():
        tried = places(data, numbers) if data else set()
        for place in sorted(tried):
            flipped = bytes([data[place] ^ (1 << int(numbers.integers(8)))])
            ended.with_file(name, data[:place] + flipped + data[place + 1 :])
            refused[name] = refused.get(name, 0) + ended.check(name, f"byte {place}")
        if name not in UNREAD:
            assert refused[name] == len(tried), f"{name}: every flip is refused"
    assert not any(refused[name] for name in ("log.txt", "lock", "result.json"))


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda data: None, id="missing"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[: len(data) // 2], id="cut short"),
        pytest.param(lambda data: data[: data[:-1].rfind(b"\n") + 1], id="without its last line"),
        pytest.param(lambda data: data + data[-20:], id="longer"),
        pytest.param(lambda data: bytes(len(data)), id="zeros"),
    ],
)
def test_a_file_that_is_missing_cut_or_overwritten_is_refused_by_its_name_or_changes_nothing(
    ended: Ended, spoil: Spoil
) -> None:
    for name, data in ended.files.items():
        ended.with_file(name, spoil(data))
        ended.check(name, "damage")


def test_lines_lost_from_the_end_of_the_rounds_are_not_blamed_on_the_gradient(ended: Ended) -> None:
    lines = ended.files["rounds.jsonl"].splitlines(keepends=True)
    committed = len(lines)
    assert committed == (ROUNDS if ended.path.name == "finished" else GROUP)
    for kept in range(committed):
        ended.with_file("rounds.jsonl", b"".join(lines[:kept]))
        assert ended.check("rounds.jsonl", f"{kept} lines"), "the gradient or the ledger says that more was committed"


def test_a_damaged_result_of_a_finished_run_is_written_again(homes: Path) -> None:
    home = homes / "again" / "runs"
    home.mkdir(parents=True)
    made = Ended(home, "finished")
    data = made.files["result.json"]
    for spoilt in (data.replace(b'"norm_raw": ', b'"norm_raw": 9'), None):
        made.with_file("result.json", spoilt)
        assert not made.check("result.json", "another norm")
        again = (made.path / "result.json").read_bytes()
        assert untimed(RunDirectory(made.path).result_json()) == made.result and again != spoilt


def test_a_run_whose_gradient_an_earlier_version_wrote_is_refused_in_one_line(ended: Ended) -> None:
    (state,) = (path for path in (ended.path / "state").iterdir() if path.suffix == ".npy")
    earlier = state.with_suffix(".safetensors")
    save_file({"sum": np.load(state)}, earlier)
    state.unlink()
    lines, chain = b"", 0
    for line in (ended.path / "rounds.jsonl").read_text().splitlines():
        fields = json.loads(line)
        del fields["crc"]
        if fields["sha256"].pop(state.name, None):
            fields["sha256"][earlier.name] = sha256_of(earlier)
        data, chain = chained(json.dumps(fields), chain)
        lines += data
    (ended.path / "rounds.jsonl").write_bytes(lines)
    with pytest.raises(InputError) as refused:
        resumed(ended.path)
    remedy = "is in the format of an earlier ray_probe; resume with that one, or start a new run"
    assert str(refused.value) == f"--resume: got '{ended.path}'; {earlier.name} {remedy}"
