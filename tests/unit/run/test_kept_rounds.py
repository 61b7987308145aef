"""The result of kept rounds, written from the run directory alone, is the one that the run itself writes."""

import json
from pathlib import Path

import pytest
from support.runs import Job, a_checkpoint, settings

from ray_probe.config.loading import dump_yaml
from ray_probe.errors import ConfigError
from ray_probe.run.directory import RunDirectory
from ray_probe.run.estimates import write_kept_result
from ray_probe.run.progress import Progress
from ray_probe.system.digests import chained, record


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A run in this process, in a directory that is complete."""
    config = settings(a_checkpoint(tmp_path))
    job = Job.of(config, tmp_path / "run")
    (job.path / "config.yaml").write_text(dump_yaml(config))
    (job.path / "manifest.json").write_text("{}")
    return job


def kept(job: Job) -> dict[str, object]:
    result: dict[str, object] = json.loads((job.path / "result.json").read_text())
    return result


def replaced_by(job: Job, result: dict[str, object]) -> None:
    """Write another result.json, as a run writes it: with its digest on record."""
    data = json.dumps(result).encode()
    (job.path / "result.json").write_bytes(data)
    record(job.path, {"result.json": data})


def test_it_is_the_result_that_the_run_writes(job: Job) -> None:
    job.run()
    written = kept(job)
    (job.path / "result.json").unlink()
    write_kept_result(job.path)
    assert kept(job) == written


def test_it_is_of_whole_rounds_when_the_run_was_cut_off_in_the_middle_of_one(job: Job) -> None:
    def cut(progress: Progress) -> None:
        if progress.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(cut)
    assert not (job.path / "result.json").exists()
    write_kept_result(job.path)
    assert kept(job) == job.probe.result().to_json()
    assert kept(job)["counts"]["rounds"] == 2  # type: ignore[index]


def test_an_older_result_is_replaced_and_one_of_all_rounds_stays(job: Job) -> None:
    result = job.run()
    replaced_by(job, result | {"counts": {"rounds": 1}})
    write_kept_result(job.path)
    assert kept(job)["counts"]["rounds"] == 3  # type: ignore[index]
    replaced_by(job, kept(job) | {"mine": True})
    write_kept_result(job.path)
    assert kept(job)["mine"] is True


def test_without_a_finished_round_nothing_is_written(job: Job) -> None:
    write_kept_result(job.path)
    assert not (job.path / "result.json").exists()


def test_rounds_of_a_version_that_kept_no_actors_are_left_alone(job: Job) -> None:
    job.run()
    (job.path / "result.json").unlink()
    lines = [json.loads(line) for line in (job.path / "rounds.jsonl").read_text().splitlines()]
    del lines[-1]["actors"]
    text, chain = b"", 0
    for line in lines:
        data, chain = chained(json.dumps({key: value for key, value in line.items() if key != "crc"}), chain)
        text += data
    (job.path / "rounds.jsonl").write_bytes(text)
    write_kept_result(job.path)
    assert not (job.path / "result.json").exists()


def test_a_run_that_is_driven_is_left_alone(job: Job) -> None:
    job.run()
    (job.path / "result.json").unlink()
    with RunDirectory(job.path).held(), pytest.raises(ConfigError, match="is driving this run"):
        write_kept_result(job.path)
    assert not (job.path / "result.json").exists()
