"""A checkpoint is measured as it was when it was queued, or not at all."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.adapters import write_adapter
from support.checkpoints import raw_config, write_checkpoint
from support.runs import untimed
from support.services import Service, until

from ray_probe.checkpoints.fingerprint import fingerprint
from ray_probe.config.loading import config_from_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.controller import pins
from ray_probe.controller.queue import Measurement
from ray_probe.errors import CheckpointError, ConfigError, OutputError
from ray_probe.report import plots

TIMES = r"queued at \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00.*: at \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"


@pytest.fixture(scope="module", autouse=True)
def no_plots() -> Iterator[None]:
    """Plots take most of the time of a measurement as small as these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "write_plots", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("snapshots")


@pytest.fixture(scope="module")
def config(files: Path) -> ProbeConfig:
    return config_from_dict(raw_config(files, batch={"rounds": 1, "prompts_per_round": 3}))


@pytest.fixture(scope="module")
def steps(files: Path) -> list[Path]:
    """Three checkpoints of one training, of which tests take copies."""
    return [write_checkpoint(files / f"step-{number}", seed=20 + number) for number in range(3)]


@pytest.fixture
def latest(tmp_path: Path, steps: list[Path]) -> Path:
    """A directory that a trainer keeps its newest checkpoint in."""
    return shutil.copytree(steps[0], tmp_path / "latest")


@pytest.fixture
def service(tmp_path: Path, config: ProbeConfig) -> Iterator[Service]:
    """A service busy with its own checkpoint until `gate` is set."""
    made = held_up(Service(tmp_path / "demo", config))
    yield made
    made.workers.gate.set()
    made.controller.close(30.0)


def held_up(service: Service) -> Service:
    service.workers.gate.clear()
    service.begin()
    service.take()
    until(service.workers.in_round.is_set)
    return service


def item(service: Service, identity: str) -> Measurement:
    return service.controller.state.queue.get(identity)


def fingerprinted(service: Service, identity: str) -> None:
    until(lambda: all(source.fingerprint for source in item(service, identity).sources))


def pinned(service: Service) -> list[Path]:
    return sorted(path for path in (service.directory / pins.PINS).rglob("*") if path.is_file())


def no_pin_is_left(service: Service) -> bool:
    return not list((service.directory / pins.PINS).glob("*"))


def save_anew(directory: Path, step: Path) -> None:
    """As a trainer that removes the old files and saves the new ones."""
    shutil.rmtree(directory)
    shutil.copytree(step, directory)


def save_over(directory: Path, step: Path) -> None:
    """As a trainer that writes into the files which are there."""
    for file in step.iterdir():
        with (directory / file.name).open("r+b") as target:
            target.write(file.read_bytes())
            target.truncate()


def save_over_unseen(directory: Path, step: Path) -> None:
    """The same, with the times of the files put back, as a copying tool may do."""
    times = {file.name: file.stat().st_mtime_ns for file in directory.iterdir()}
    save_over(directory, step)
    for name, time_ns in times.items():
        os.utime(directory / name, ns=(time_ns, time_ns))


def change_tokenizer(directory: Path, step: Path) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))


def measured_of(config: ProbeConfig, step: Path, directory: Path) -> dict[str, Any]:
    """The result of a step that nobody touches, in a service of its own."""
    service = Service(directory, config).begin()
    try:
        identity = service.take(model__path=str(step))
        assert service.ended(identity).state == "done"
        return answer(service, identity)
    finally:
        service.controller.close(30.0)


def answer(service: Service, identity: str) -> dict[str, Any]:
    _, result = service.answers.result(identity)
    assert result is not None
    return {key: value for key, value in untimed(result.to_json()).items() if key != "config"}


@pytest.fixture(scope="module")
def expected(config: ProbeConfig, steps: list[Path], files: Path) -> list[dict[str, Any]]:
    answers = [measured_of(config, step, files / f"service-{number}") for number, step in enumerate(steps)]
    assert answers[0]["entropy"] != answers[1]["entropy"]
    return answers


@pytest.mark.parametrize(
    ("save", "first_fingerprinted"),
    [(save_anew, True), (save_anew, False), (save_over, True), (change_tokenizer, False)],
)
def test_a_checkpoint_that_is_overwritten_in_the_queue_fails_its_measurement_alone_with_both_times(
    service: Service, latest: Path, steps: list[Path], expected: list[dict[str, Any]],
    save: Callable[[Path, Path], None], first_fingerprinted: bool,
) -> None:  # fmt: skip
    if not first_fingerprinted:
        service.controller.intake.close()
    before = service.take(model__path=str(latest))
    if first_fingerprinted:
        fingerprinted(service, before)
    save(latest, steps[1])
    after = service.take(model__path=str(latest))
    service.workers.gate.set()
    info = service.ended(before)
    assert (info.state, info.exit_code, info.rounds) == ("failed", 2, 0)
    assert info.cause is not None and "\n" not in info.cause
    assert info.cause.startswith(f"model.path: got '{latest}'; its files have changed since it was queued at ")
    assert re.search(TIMES, info.cause) and info.cause.endswith("or pin it with probe --snapshot")
    if first_fingerprinted:
        assert f"with fingerprint {fingerprint(steps[0])[:12]}" in info.cause
        assert f"their fingerprint is {fingerprint(latest)[:12]}" in info.cause
    assert not (service.directory / before).exists()
    assert service.ended(after).state == "done", "the service goes on"
    if save is not change_tokenizer:
        assert answer(service, after) == expected[1]


def test_other_bytes_with_the_same_times_are_seen_once_the_fingerprint_is_there(
    service: Service, latest: Path, steps: list[Path]
) -> None:
    identity = service.take(model__path=str(latest))
    fingerprinted(service, identity)
    save_over_unseen(latest, steps[1])
    assert item(service, identity).sources[0].stamped() == item(service, identity).sources[0], "nothing shows"
    service.workers.gate.set()
    info = service.ended(identity)
    assert info.exit_code == 2 and re.search(TIMES, info.cause)


def test_the_same_bytes_with_other_times_are_no_change(service: Service, latest: Path) -> None:
    identity = service.take(model__path=str(latest))
    fingerprinted(service, identity)
    for file in latest.iterdir():
        file.touch()
    service.workers.gate.set()
    assert service.ended(identity).state == "done"


@pytest.mark.parametrize("first_fingerprinted", [True, False])
def test_a_checkpoint_that_is_deleted_in_the_queue_fails_its_measurement_with_both_times(
    service: Service, latest: Path, first_fingerprinted: bool
) -> None:
    if not first_fingerprinted:
        service.controller.intake.close()
    identity = service.take(model__path=str(latest))
    if first_fingerprinted:
        fingerprinted(service, identity)
    shutil.rmtree(latest)
    service.workers.gate.set()
    info = service.ended(identity)
    assert info.exit_code == 2 and re.search(TIMES + " their bytes are gone; queue it again", info.cause)


def test_prompts_that_are_edited_in_the_queue_fail_its_measurement(service: Service, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{number}+1="}}\n' for number in range(9)))
    identity = service.take(data__prompts=str(prompts))
    prompts.write_text(prompts.read_text().replace("8+1", "8+2"))
    service.workers.gate.set()
    info = service.ended(identity)
    assert info.exit_code == 2 and info.cause.startswith(f"data.prompts: got '{prompts}'; its files have changed")
    assert re.search(TIMES, info.cause)


@pytest.mark.parametrize("how", ["link", "copy"])
def test_a_directory_that_is_rewritten_for_each_step_is_measured_step_by_step(
    service: Service, latest: Path, steps: list[Path], expected: list[dict[str, Any]], how: str
) -> None:
    identities = []
    for step in steps:
        save_anew(latest, step)
        identities.append(service.take(model__path=str(latest), model__snapshot=how))
    linked = sorted(file.stat().st_nlink for file in pinned(service) if file.name == "model.safetensors")
    assert linked == [1, 1, 1 + (how == "link")], "a pin of what was removed is all that is left of it"
    shutil.rmtree(latest)
    service.workers.gate.set()
    for number, identity in enumerate(identities):
        info = service.ended(identity)
        assert (info.state, info.checkpoint) == ("done", str(latest))
        assert answer(service, identity) == expected[number]
        run = service.directory / identity
        about = json.loads((run / "manifest.json").read_text())["checkpoint"]
        assert about["path"] == str(latest) and about["fingerprint"] == fingerprint(steps[number])
        assert f"path: {latest}\n" in (run / "config.yaml").read_text(), "a pin is gone in the end, and nobody's name"
    until(lambda: no_pin_is_left(service))


def test_checkpoints_that_are_rotated_away_are_measured(
    service: Service, tmp_path: Path, steps: list[Path], expected: list[dict[str, Any]]
) -> None:
    """`save_total_limit: 1`: the directory before goes when the next is written."""
    identities = []
    for number, step in enumerate(steps):
        checkpoint = shutil.copytree(step, tmp_path / f"checkpoint-{number}")
        if number:
            shutil.rmtree(tmp_path / f"checkpoint-{number - 1}")
        identities.append(service.take(model__path=str(checkpoint), model__snapshot="link"))
    service.workers.gate.set()
    for number, identity in enumerate(identities):
        assert service.ended(identity).state == "done" and answer(service, identity) == expected[number]


@pytest.mark.parametrize("save", [save_over, save_over_unseen])
def test_what_is_written_through_a_hard_link_fails_and_what_is_copied_does_not(
    service: Service, latest: Path, steps: list[Path], expected: list[dict[str, Any]],
    save: Callable[[Path, Path], None],
) -> None:  # fmt: skip
    linked = service.take(model__path=str(latest), model__snapshot="link")
    copied = service.take(model__path=str(latest), model__snapshot="copy")
    for identity in (linked, copied):
        fingerprinted(service, identity)
    save(latest, steps[1])
    service.workers.gate.set()
    info = service.ended(linked)
    assert info.exit_code == 2 and info.cause.startswith(f"model.path: got '{latest}'; the pinned files have changed")
    assert re.search(TIMES, info.cause) and info.cause.endswith("queue it again with probe --snapshot-copy")
    assert service.ended(copied).state == "done" and answer(service, copied) == expected[0]
    until(lambda: no_pin_is_left(service))


def test_a_config_pins_every_checkpoint(
    tmp_path: Path, config: ProbeConfig, latest: Path, expected: list[dict[str, Any]]
) -> None:
    model = config.model.model_copy(update={"snapshot": "link"})
    service = held_up(Service(tmp_path / "demo", config.model_copy(update={"model": model})))
    try:
        identity = service.take(model__path=str(latest))
        shutil.rmtree(latest)
        service.workers.gate.set()
        assert service.ended(identity).state == "done" and answer(service, identity) == expected[0]
        assert service.ended("m0001").state == "done"
        until(lambda: no_pin_is_left(service))
    finally:
        service.controller.close(30.0)


def test_a_pin_goes_when_its_measurement_is_taken_back_or_fails_or_is_stopped(service: Service, latest: Path) -> None:
    back = service.take(model__path=str(latest), model__snapshot="copy")
    assert pinned(service)
    assert service.controller.cancel(back).state == "cancelled" and no_pin_is_left(service)
    nowhere = service.take(model__path=str(latest), model__snapshot="copy", data__max_prompt_tokens=1)
    stopped = service.take(model__path=str(latest), model__snapshot="copy", batch__rounds=500)
    service.workers.gate.set()
    assert service.ended(nowhere).state == "failed"
    until(lambda: service.answers.result(stopped)[0].rounds >= 1)
    assert pinned(service), "actors that are replaced load it again"
    service.controller.cancel(stopped)
    assert service.ended(stopped).state == "cancelled"
    until(lambda: no_pin_is_left(service))


def test_pins_of_what_waits_outlast_the_service_and_a_copy_that_was_cut_off_does_not(
    tmp_path: Path, config: ProbeConfig, latest: Path, expected: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = held_up(Service(tmp_path / "demo", config))
    running = first.take(model__path=str(latest), model__snapshot="link", batch__rounds=4)
    waiting = first.take(model__path=str(latest), model__snapshot="copy")
    first.workers.gate.set()
    until(lambda: first.answers.result(running)[0].rounds >= 1)
    first.workers.gate.clear()
    first.controller.close(30.0)
    shutil.rmtree(latest)
    half = tmp_path / "demo" / pins.PINS / "0123456789abcdef" / "model" / "latest"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")

    again = Service(tmp_path / "demo", config)
    try:
        assert not half.exists() and {item(again, i).pin for i in (running, waiting)} == {
            str(path) for path in (tmp_path / "demo" / pins.PINS).iterdir()
        }
        again.begin()
        assert again.ended(running).state == again.ended(waiting).state == "done", again.answers.results()
        assert again.answers.result(running)[0].rounds == 4
        assert answer(again, waiting) == expected[0]
        until(lambda: no_pin_is_left(again))
    finally:
        again.controller.close(30.0)


def test_adapter_and_base_are_both_held_to_what_was_queued(
    service: Service, latest: Path, steps: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(tmp_path / "adapter", steps[0])
    other = write_adapter(tmp_path / "other", steps[0], seed=5)
    unpinned = service.take(model__path=str(latest), model__adapter=str(adapter))
    of_base = service.take(model__path=str(latest), model__adapter=str(other), model__trainable="adapter")
    copied = service.take(model__path=str(latest), model__adapter=str(adapter), model__snapshot="copy")
    assert [source.how for source in item(service, copied).sources[:2]] == ["link", "copy"], "nobody writes to a base"
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(os, "link", across_file_systems)
        beside = service.take(model__path=str(steps[0]), model__adapter=str(adapter), model__snapshot="copy")
        with pytest.raises(ConfigError, match=r"model\.snapshot: got 'link'; .*adapter cannot be hard-linked"):
            service.take(model__path=str(steps[0]), model__adapter=str(adapter), model__snapshot="link")
    assert [source.how for source in item(service, beside).sources[:2]] == [None, "copy"]
    assert len(list((service.directory / pins.PINS).iterdir())) == 2, "what was refused leaves nothing"
    save_over(adapter, other)
    save_anew(latest, steps[1])
    service.workers.gate.set()
    assert service.ended(unpinned).exit_code == 2
    info = service.ended(of_base)
    assert info.exit_code == 2 and info.cause.startswith(f"model.path: got '{latest}'; its files have changed")
    assert service.ended(copied).state == service.ended(beside).state == "done", service.answers.results()
    assert answer(service, copied)["entropy"] == answer(service, beside)["entropy"]
    until(lambda: no_pin_is_left(service))


def test_an_adapter_that_is_overwritten_in_the_queue_fails_its_measurement(
    service: Service, steps: list[Path], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", steps[0])
    identity = service.take(model__path=str(steps[0]), model__adapter=str(adapter))
    save_over(adapter, write_adapter(tmp_path / "other", steps[0], seed=5))
    service.workers.gate.set()
    info = service.ended(identity)
    assert info.exit_code == 2 and info.cause.startswith(f"model.adapter: got '{adapter}'; its files have changed")


def across_file_systems(*_: object, **__: object) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("how", "broken", "told"),
    [
        ("link", "link", r"^model\.snapshot: got 'link'; .* cannot be hard-linked .*another file system.*snapshot-c"),
        ("copy", "fsync", r"^output\.dir: got .*a checkpoint cannot be pinned there \(No space left .*\); make room"),
    ],
)  # fmt: skip
def test_what_cannot_be_pinned_is_refused_in_one_line_and_leaves_nothing(
    service: Service, latest: Path, how: str, broken: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(service.answers.results())
    with monkeypatch.context() as patch:
        patch.setattr(os, broken, {"link": across_file_systems, "fsync": full}[broken])
        with pytest.raises((ConfigError, OutputError), match=told) as refused:
            service.take(model__path=str(latest), model__snapshot=how)
    assert "\n" not in str(refused.value)
    assert no_pin_is_left(service) and len(service.answers.results()) == before


@pytest.mark.parametrize("how", ["link", "copy"])
def test_files_that_move_while_they_are_pinned_are_refused(
    service: Service, latest: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def removing(*arguments: Any) -> Any:
        for file in latest.glob("*.safetensors"):
            file.unlink()
        return original(*arguments)

    name = {"link": "_link", "copy": "copy_file"}[how]
    original = getattr(pins, name)
    monkeypatch.setattr(pins, name, removing)
    with pytest.raises(CheckpointError, match=r"model\.path: got .*latest'; its files vanished while they were pinned"):
        service.take(model__path=str(latest), model__snapshot=how)
    assert no_pin_is_left(service)


def test_a_file_that_is_written_while_it_is_copied_is_refused(
    service: Service, latest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writing(file: Path, target: Path) -> None:
        copy(file, target)
        with file.open("ab") as stream:
            stream.write(b" ")

    copy = pins.copy_file
    monkeypatch.setattr(pins, "copy_file", writing)
    with pytest.raises(CheckpointError, match="its files changed while they were pinned; probe it again once it is"):
        service.take(model__path=str(latest), model__snapshot="copy")
    assert no_pin_is_left(service)


def test_what_is_not_queued_leaves_no_pin(service: Service, latest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unkept() -> None:
        raise OutputError("service.json: cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(service.controller.state, "save", unkept)
        with pytest.raises(OutputError):
            service.take(model__path=str(latest), model__snapshot="copy")
    assert no_pin_is_left(service)
    service.controller.drain(True)
    with pytest.raises(ConfigError, match="drain --undo"):
        service.take(model__path=str(latest), model__snapshot="copy")
    assert no_pin_is_left(service)
