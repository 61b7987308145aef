"""The controller without Ray: queue, queries and resume, on a real checkpoint."""

import gc
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import raw_config, write_checkpoint
from support.services import Service, until

from ray_probe.config.loading import config_from_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.controller.measurement_config import measurement_config
from ray_probe.errors import ConfigError, OutputError
from ray_probe.report.caveats import caveats
from ray_probe.run.directory import RunDirectory
from ray_probe.run.estimates import advantage_by_mode
from ray_probe.run.preparation.prepare import prepare
from ray_probe.run.preparation.prepared import PreparedRun
from ray_probe.run.result import Result
from ray_probe.run.totals import merged

ROUNDS = 3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("controller")


@pytest.fixture(scope="module")
def config(files: Path) -> ProbeConfig:
    return config_from_dict(raw_config(files, batch={"rounds": ROUNDS}))


@pytest.fixture(scope="module")
def other(files: Path) -> Path:
    """A second checkpoint of the same architecture."""
    return write_checkpoint(files / "other", seed=7)


@pytest.fixture
def service(tmp_path: Path, config: ProbeConfig) -> Iterator[Service]:
    made = Service(tmp_path / "demo", config)
    yield made
    made.workers.gate.set()
    made.controller.close(30.0)


def test_each_measurement_leaves_a_whole_run_directory_and_the_checkpoint_is_swapped_in(
    service: Service, other: Path
) -> None:
    service.begin()
    first, second = service.probe(), service.probe(model__path=str(other))
    info = service.ended(second)
    assert (first, second) == ("m0001", "m0002")
    assert service.workers.ways == ["loaded", "swapped", "swapped"]
    assert [item.state for item in service.answers.results()] == ["done", "done"]
    assert info.exit_code == 0 and info.rounds == ROUNDS and info.checkpoint == str(other)
    for identity in (first, second):
        run = service.directory / identity
        left = {path.name for path in run.iterdir()}
        assert {"config.yaml", "manifest.json", "ledger.jsonl", "rounds.jsonl", "log.txt"} <= left
        assert {"result.json", "report.html"} <= left
        assert json.loads((run / "result.json").read_text())["counts"]["rounds"] == ROUNDS
        assert run.stat().st_mode & 0o777 == 0o700
    policies = {json.loads((service.directory / i / "manifest.json").read_text())["policy_id"] for i in (first, second)}
    assert len(policies) == 2, "another checkpoint is another policy"


def test_what_is_asked_while_it_works_is_what_the_run_writes_for_that_version(service: Service) -> None:
    service.workers.gate.clear()
    service.begin()
    identity = service.probe(output__save_gradient=True)
    seen = []
    for rounds in range(ROUNDS):
        until(service.workers.in_round.is_set)
        service.workers.in_round.clear()
        variance = service.answers.variance(None)
        assert variance.rounds == rounds
        if rounds:
            beta = service.answers.beta(None, None)
            assert beta.version == variance.beta_version == variance.in_sample_version == rounds
            seen.append((beta, variance))
        service.workers.gate.set()
        threading.Event().wait(0.02)  # long enough for one round to pass the gate
        service.workers.gate.clear()
    service.workers.gate.set()
    service.ended(identity)
    directory = RunDirectory.open(service.directory / identity)
    for beta, variance in seen:
        written = directory.finished_rounds()[beta.version - 1]
        assert beta.values == written.beta
        assert service.answers.beta(beta.version, identity) == beta, "an earlier version can be asked for later"
        so_far = advantage_by_mode(merged(directory.restore(beta.version)))
        assert variance.advantage_mean_square == {mode: values.mean_square for mode, values in so_far.items()}
        assert variance.advantage_variance == {mode: values.variance for mode, values in so_far.items()}
    result = directory.read_json("result.json")
    final = service.answers.variance(identity)
    assert final.advantage_mean_square == result["advantage_mean_square"]
    assert final.advantage_variance == result["advantage_variance"]
    assert final.gradient is not None and final.gradient.to_json() == result["gradient"]
    with pytest.raises(ConfigError, match="versions 1 to 3"):
        service.answers.beta(9, identity)


def test_sources_that_differ_about_the_end_are_reported_in_log_result_and_table(service: Service, files: Path) -> None:
    """LlamaConfig's class default is written into config.json beside the generation_config.json of the training."""
    directory = write_checkpoint(files / "two ends", seed=9)
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"eos_token_id": 2}))
    service.begin()
    silent, texts = service.probe(model__path=str(directory)), ["1+2=", "3+4=2<eos>"] * 12
    decided = service.probe(model__path=str(directory), generation__eos_token_ids=[0], data__prompts=texts)
    for identity in (silent, decided):
        assert service.ended(identity).state == "done"
    run = RunDirectory.open(service.directory / silent)
    result, log = run.read_json("result.json"), (run.path / "log.txt").read_text()
    assert log.count("responses end at 0 '<eos>' (generation_config.json)") == 1
    assert log.count("config.json names 2 '1'; not used, generation.eos_token_ids decides") == 1
    assert "end with an EOS token" not in log
    assert result["eos"] == {
        "ids": [0], "source": "generation_config.json", "others": {"config.json": [2]},
        "texts": {"0": "<eos>", "2": "1"},
    }  # fmt: skip
    found = caveats(Result.from_json(result))
    assert sum(caveat.startswith("EOS: responses end at 0 '<eos>' (gene") for caveat in found) == 1
    about = run.read_json("manifest.json")
    assert (about["eos_token_ids"], about["eos_source"]) == ([0], "generation_config.json")
    other = RunDirectory.open(service.directory / decided)
    assert not any(caveat.startswith("EOS: ") for caveat in caveats(Result.from_json(other.read_json("result.json"))))
    assert "12 prompts end with an EOS token: their responses begin after" in (other.path / "log.txt").read_text()


def test_what_is_warned_of_while_actors_load_reaches_who_follows(service: Service) -> None:
    load, said = service.workers.load, "actors: 1 of 1 wait for room: each asks for 1 CPU, free are 0 CPU"

    def busy(*arguments: Any) -> None:
        logging.getLogger("ray_probe").warning(said)
        load(*arguments)

    service.workers.load = busy  # type: ignore[method-assign]
    service.begin()
    identity = service.probe()
    service.ended(identity)
    assert [event.note for event in service.answers.follow(identity, 0).events].count(said) == 1


def test_a_controller_that_is_closed_says_so_to_who_follows(service: Service) -> None:
    service.workers.gate.clear()
    service.begin()
    identity = service.probe()
    until(service.workers.in_round.is_set)
    assert not service.answers.follow(identity, 0).closing
    assert service.controller.close(30.0)
    followed = service.answers.follow(identity, 0)
    assert followed.closing and followed.info.state == "queued" and followed.info.finished is None


def test_a_checkpoint_that_is_refused_fails_alone(service: Service, files: Path) -> None:
    broken = write_checkpoint(files / "broken", seed=8)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    service.begin()
    bad, good = service.probe(model__path=str(broken)), service.probe()
    assert service.ended(good).state == "done"
    info = service.ended(bad)
    assert info.state == "failed" and info.exit_code == 2
    assert "model.path" in info.cause and "model.safetensors" in info.cause
    assert not (service.directory / bad).exists()


def test_a_cancelled_measurement_keeps_its_whole_rounds_and_the_next_goes_on(service: Service) -> None:
    service.begin()
    running, waiting, last = service.probe(batch__rounds=500), service.probe(), service.probe(batch__rounds=1)
    until(lambda: service.answers.result(running)[0].rounds >= 1)
    assert service.controller.cancel(waiting).state == "cancelled"
    service.controller.cancel(running)
    stopped = service.ended(running)
    assert stopped.state == "cancelled" and 1 <= stopped.rounds < 500 and stopped.exit_code == 130
    assert service.ended(last).state == "done"
    assert not (service.directory / waiting).exists()
    with pytest.raises(ConfigError, match="it is cancelled"):
        service.controller.cancel(waiting)


def test_a_lost_service_goes_on_with_queue_counters_and_versions(tmp_path: Path, config: ProbeConfig) -> None:
    first = Service(tmp_path / "demo", config).begin()
    done = first.probe(batch__rounds=1)
    first.ended(done)
    identity, waiting = first.probe(batch__rounds=12), first.probe(batch__rounds=1)
    until(lambda: first.answers.result(identity)[0].rounds >= 2)
    first.controller.close(30.0)
    assert first.workers.closed
    before = len(RunDirectory.open(tmp_path / "demo" / identity).finished_rounds())
    assert 2 <= before < 12

    again = Service(tmp_path / "demo", config).begin()
    try:
        assert again.ended(identity).state == again.ended(waiting).state == "done"
        assert again.probe() == "m0004", "ids count on"
        betas = [again.answers.beta(version, identity) for version in (1, before, before + 1, 12)]
        assert [beta.version for beta in betas] == [1, before, before + 1, 12]
        lines = RunDirectory.open(tmp_path / "demo" / identity).finished_rounds()
        assert [line.round for line in lines] == list(range(12)), "no round is done twice"
    finally:
        again.controller.close(30.0)


def test_a_service_in_the_place_of_a_run_gives_the_same_bits(service: Service, config: ProbeConfig) -> None:
    from ray_probe.controller.local_backend import LocalBackend
    from ray_probe.offline_entropy_probe import OfflineEntropyProbe
    from ray_probe.rollout.builder import build_rollout
    from ray_probe.run.preparation.prepared import baseline_rule

    service.begin()
    identity = service.probe()
    service.ended(identity)
    prepared = prepare(config)
    directory = RunDirectory.create(service.directory, "reference")
    rollout = build_rollout(prepared.config, prepared.checkpoint.directory, prepared.policy_id)
    backend = LocalBackend([rollout], baseline_rule(prepared.config), prepared.policy_id, directory)
    reference = OfflineEntropyProbe(prepared.config, prepared.plan, backend, directory).run().to_json()
    _, result = service.answers.result(identity)
    assert result is not None
    result = result.to_json()
    assert result["beta"] == reference["beta"] and result["gradient"] == reference["gradient"]
    assert result["advantage_mean_square"] == reference["advantage_mean_square"]


def test_draining_refuses_what_is_new_and_works_off_what_waits(service: Service) -> None:
    service.workers.gate.clear()
    service.begin()
    first, second = service.probe(batch__rounds=1), service.probe(batch__rounds=1)
    service.controller.drain(True)
    with pytest.raises(ConfigError, match="drain --undo"):
        service.probe()
    service.workers.gate.set()
    assert service.ended(first).state == service.ended(second).state == "done"
    service.controller.drain(False)
    assert service.probe() == "m0003"


def test_questions_before_anything_was_measured_say_what_to_do(service: Service) -> None:
    with pytest.raises(ConfigError, match="probe CHECKPOINT"):
        service.answers.beta(None, None)
    service.begin()
    until(lambda: service.answers.status().state == "idle")
    assert service.answers.results() == ()
    with pytest.raises(ConfigError, match="no such measurement; there are none yet"):
        service.answers.result("m0007")
    with pytest.raises(ConfigError, match=r"N: got 0; need an integer >= 1"):
        service.controller.scale(0)


def test_settings_of_the_service_itself_are_not_for_a_measurement(config: ProbeConfig) -> None:
    changed = measurement_config(config, {"batch.rounds": 9, "estimator.baseline.mode": "none"})
    assert (changed.batch.rounds, changed.estimator.baseline.mode) == (9, "none")
    for key in ("cluster.actors", "output.dir", "output.name"):
        with pytest.raises(ConfigError, match=f"--set: got '{key}'"):
            measurement_config(config, {key: "x"})
    with pytest.raises(ConfigError, match=r"batch\.round"):
        measurement_config(config, {"batch.round": 1})


def test_a_measurement_does_not_go_on_with_another_checkpoint_in_the_same_place(
    tmp_path: Path, config: ProbeConfig
) -> None:
    checkpoint = write_checkpoint(tmp_path / "step", seed=11)
    first = Service(tmp_path / "demo", config).begin()
    identity = first.probe(model__path=str(checkpoint), batch__rounds=500)
    until(lambda: first.answers.result(identity)[0].rounds >= 1)
    first.controller.close(30.0)
    write_checkpoint(checkpoint, seed=12)
    again = Service(tmp_path / "demo", config).begin()
    try:
        info = again.ended(identity)
        assert info.state == "failed" and info.exit_code == 2 and "model.path" in info.cause
    finally:
        again.controller.close(30.0)


def test_what_goes_on_runs_on_the_actors_that_are_there_now(tmp_path: Path, config: ProbeConfig) -> None:
    first = Service(tmp_path / "demo", config)
    first.probe()
    threads = config.model_copy(update={"cluster": config.cluster.model_copy(update={"cpus_per_actor": 3})})
    again = Service(tmp_path / "demo", threads).begin()
    try:
        assert again.ended("m0001").state == "done"
        assert again.workers.prepared is not None
        assert again.workers.prepared.config.cluster.cpus_per_actor == 3
    finally:
        again.controller.close(30.0)


def test_a_run_directory_that_was_cut_off_in_the_making_is_made_anew(tmp_path: Path, config: ProbeConfig) -> None:
    (tmp_path / "demo" / ".m0001.part" / "state").mkdir(parents=True)
    service = Service(tmp_path / "demo", config).begin()
    try:
        assert service.ended(service.probe(batch__rounds=1)).state == "done"
        assert not (tmp_path / "demo" / ".m0001.part").exists()
    finally:
        service.controller.close(30.0)


def test_a_full_disk_under_the_handling_of_an_error_does_not_end_the_service(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = service.controller.state
    result, failures = board.result, iter([OSError("disk")])

    def failing(item: Any) -> Any:
        if threading.current_thread().name == "controller":
            for failure in failures:
                raise failure
        return result(item)

    service.begin()
    until(lambda: service.answers.status().state == "idle")
    first = service.probe(batch__rounds=1)
    until(service.workers.in_round.is_set)
    monkeypatch.setattr(board, "result", failing)
    assert service.ended(first).state == "done"
    assert service.ended(service.probe(batch__rounds=1)).state == "done", "it works on"


def test_what_cannot_be_kept_is_not_queued(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OutputError("service.json: cannot be written")

    monkeypatch.setattr(service.controller.state, "save", full)
    with pytest.raises(OutputError):
        service.probe()
    assert service.answers.results() == ()


def test_errors_keep_nothing_alive(service: Service, tmp_path: Path) -> None:
    service.begin()
    identity = service.probe(data__prompts=str(tmp_path / "none.jsonl"))
    assert service.ended(identity).exit_code == 2
    gc.collect()
    assert sum(type(thing) is PreparedRun for thing in gc.get_objects()) <= 1, "that of the current checkpoint alone"
