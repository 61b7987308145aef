"""Runs that are stopped, scaled or cannot be written: what goes on gives the answer of one process."""

from pathlib import Path

import pytest
from support.answers import Answer
from support.light import here, light_run
from support.ray_runs import run_here, run_on

from ray_probe.cluster.backend import RayBackend
from ray_probe.errors import OutputError
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.run.backend import Stopped
from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation.prepared import baseline_rule
from ray_probe.run.progress import Listener, Progress

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("fit", ["lagged", "in_sample"])
@pytest.mark.parametrize("commit_rounds", [1, 2])
def test_another_fit_gives_the_answer_of_one_process_too(
    backend: RayBackend, files: Path, fit: str, commit_rounds: int
) -> None:
    sections = {"estimator": {"baseline": {"fit": fit}}, "output": {"commit_rounds": commit_rounds}}
    run = light_run(files, **sections)
    expected = run_here(run, f"here-{fit}-{commit_rounds}", here(baseline_rule(run.config)))
    run_on(backend, run, f"ray-{fit}-{commit_rounds}").assert_same(expected)


def test_scaling_down_in_the_middle_of_a_commit_changes_no_bit_and_does_no_shard_again(
    backend: RayBackend, files: Path, reference: Answer
) -> None:
    alive: dict[int, int] = {}

    def scaler(backend: RayBackend) -> Listener:
        def listen(progress: Progress) -> None:
            alive[progress.round] = len(backend.pids)
            if progress.accumulated >= 3:
                backend.pool.scale(1)

        return listen

    answer = run_on(backend, light_run(files, 3, output={"commit_rounds": 2}), "scaled-down", scaler)
    answer.assert_same(reference)
    assert answer.result["counts"]["shards_retried"] == 0, "who leaves stays until its sum is committed"
    assert alive == {0: 3, 1: 3, 2: 1}
    assert list(answer.rounds[2].shards_by_actor) == list(answer.rounds[1].shards_by_actor), "who leaves has none"


def test_a_run_that_goes_on_has_the_writer_go_on_from_the_gradient_on_disk(
    backend: RayBackend, files: Path, reference: Answer
) -> None:
    run = light_run(files)
    directory = RunDirectory.create(Path(run.config.output.dir), "gone-on")
    last: list[Progress] = []
    backend.pool.scale(2)
    backend.load(run)
    backend.open(directory)
    stop = lambda: bool(last) and last[-1].round == 1 and last[-1].accumulated >= 2  # noqa: E731
    probe = OfflineEntropyProbe(run.config, run.plan, backend, directory, last.append, stop)
    with pytest.raises(Stopped):
        probe.run()
    assert probe.finished_rounds == 1 and probe.result() == probe.finish()
    backend.load(run)  # what the stopped measurement has left at work is of no interest any more
    backend.open(directory, [line.records for line in directory.finished_rounds()])
    again = Answer(OfflineEntropyProbe(run.config, run.plan, backend, directory).run(), directory)
    again.assert_same(reference)
    again.assert_each_record_once()


def test_a_writer_that_cannot_write_ends_the_run_in_its_own_words(backend: RayBackend, files: Path) -> None:
    run = light_run(files)
    directory = RunDirectory.create(Path(run.config.output.dir), "full")
    backend.load(run)
    backend.open(directory)
    directory.state.rmdir()
    with pytest.raises(OutputError, match=r"gradient\.staged: cannot be written"):
        OfflineEntropyProbe(run.config, run.plan, backend, directory).run()
