"""A chain of comparisons: the same responses for both neighbours of a checkpoint, sums with errors, its reports."""

import io
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from support.chains import config_of, step
from support.html_report import data_of
from support.models import save_checkpoint, tiny_llama
from support.runs import untimed

from ray_probe.config.loading import config_from_dict, to_dict
from ray_probe.core.estimator.change_sums import ROW
from ray_probe.errors import ConfigError
from ray_probe.model.sequences import pack_sequences
from ray_probe.report.chain_report import chain_csv, chain_markdown, chain_table
from ray_probe.report.change_plots import chain_figure
from ray_probe.report.number_format import with_error
from ray_probe.rollout.response_store import ResponseStore, policy_key
from ray_probe.run.comparison.chain import Chain, names_of, read_chain, responses_of, step_directories
from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation.plan import PromptRef, Shard
from ray_probe.run.preparation.prepare import prepare
from ray_probe.service.chain import chain_directory, end_step, step_request, write_chain


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("chain")
    return [save_checkpoint(directory / f"step-{n}", tiny_llama(8, seed=n), "abcdef") for n in range(3)]


@pytest.fixture(scope="module")
def chain_of_three(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("steps")
    for number, (a, b) in enumerate(pairwise(checkpoints), start=1):
        step(directory, number, a, b)
    return directory


def columns(directory: Path, number: int, name: str) -> np.ndarray:
    """A column of the sums of a step's prompts."""
    totals = RunDirectory(directory / f"step-{number}").restore(2)
    rows = sum((part.change for part in totals[1:]), start=totals[0].change).rows
    return np.array([rows[prompt][ROW.index(name)] for prompt in sorted(rows)])


def test_a_checkpoint_in_the_middle_gives_the_same_responses_to_both_steps(chain_of_three: Path):
    np.testing.assert_array_equal(columns(chain_of_three, 1, "tokens_b"), columns(chain_of_three, 2, "tokens_a"))
    np.testing.assert_allclose(
        columns(chain_of_three, 1, "entropy_b"), columns(chain_of_three, 2, "entropy_a"), rtol=1e-5
    )


@pytest.fixture
def kept(checkpoints: list[Path], tmp_path: Path) -> Path:
    """A first step that keeps the responses of its second checkpoint."""
    store = ResponseStore(None, tmp_path / "step-1", ("a", "b"))
    step(tmp_path, 1, *checkpoints[:2], store=store)
    return tmp_path


def second(kept: Path, checkpoints: list[Path], key: str = "b", samples: bool = False) -> dict[str, object]:
    """The result of the second step, which samples its first checkpoint or must not."""
    store = ResponseStore(kept / "step-1", None, (key, "c"))
    step(kept, 2, *checkpoints[1:], store=store, samples=(samples, True))
    return untimed(RunDirectory(kept / "step-2").result().to_json())


def test_kept_responses_are_not_sampled_again_and_change_nothing(
    kept: Path, checkpoints: list[Path], chain_of_three: Path
):
    files = sorted(responses_of(kept / "step-1").iterdir())
    assert len(files) == 6 and {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert responses_of(kept / "step-1").stat().st_mode & 0o777 == 0o700
    assert second(kept, checkpoints)["change"] == RunDirectory(chain_of_three / "step-2").result().to_json()["change"]
    assert not responses_of(kept / "step-2").exists()
    end_step(kept, 2)
    assert not responses_of(kept / "step-1").exists()


@pytest.mark.parametrize("loss", ["gone", "cut", "flipped", "of another policy"])
def test_responses_that_are_lost_or_of_another_policy_are_sampled_again(
    kept: Path, checkpoints: list[Path], chain_of_three: Path, loss: str
):
    file = sorted(responses_of(kept / "step-1").iterdir())[1]
    data = file.read_bytes()
    if loss == "gone":
        file.unlink()
    elif loss == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif loss == "flipped":
        place = data.index(b"tokens.npy") + 200
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    key = "of another" if loss == "of another policy" else "b"
    found = second(kept, checkpoints, key, samples=True)
    assert found["change"] == RunDirectory(chain_of_three / "step-2").result().to_json()["change"]


def test_the_key_of_a_policy_names_all_that_responses_depend_on_but_prompts_and_seeds(checkpoints: list[Path]):
    config = config_of(*checkpoints[:2], side=0)
    one, other = prepare(config).checkpoint, prepare(config).against
    assert other is not None
    keys = {policy_key(config, one), policy_key(config, other)}
    for section, key, value in (("generation", "top_p", 0.5), ("model", "dtype", "bfloat16")):
        raw = to_dict(config)
        raw[section][key] = value
        keys.add(policy_key(config_from_dict(raw), one))
    assert len(keys) == 4


def test_kept_responses_to_other_prompts_or_of_other_seeds_are_not_used(tmp_path: Path):
    store = ResponseStore(tmp_path, tmp_path, ("policy", "policy"))
    (tmp_path / "state").mkdir()
    refs = (PromptRef(0, 0, "ab"), PromptRef(1, 0, "c"))
    shard, prompts = Shard(0, 0, refs, 7, 4), [[1, 2], [3]]
    log_q = [[np.array([-0.5, -0.25]), np.array([-1.0])], [np.array([-2.0]), np.array([-0.125])]]
    seeds = shard.response_seeds(1)
    store.keep(shard, pack_sequences(prompts, [[[4, 0], [0]], [[5], [0]]], log_q), seeds)
    read = store.load(shard, prompts, seeds)
    assert read is not None and read.gen_lens == [[2, 1], [1, 1]]
    assert [read.tokens(0, 0)[part].tolist() for part in (0, 1)] == [[1, 2], [4, 0]]
    assert [row.tolist() for row in read.sample_logprobs[0]] == [[-0.5, -0.25], [-1.0]]
    assert store.load(shard, [[1, 2], [4]], seeds) is None, "other prompts"
    assert store.load(shard, prompts, shard.response_seeds(0)) is None, "the other side's seeds"
    assert store.load(shard, prompts, replace(shard, seed=8).response_seeds(1)) is None
    assert store.load(replace(shard, index=1), prompts, seeds) is None
    assert ResponseStore(tmp_path, None, ("other", "")).load(shard, prompts, seeds) is None


def test_sums_over_steps_have_errors_from_the_sums_of_each_prompt(chain_of_three: Path):
    chain = read_chain(chain_of_three)
    first, second = chain.steps
    assert first.since_first.value == pytest.approx(first.total.value)
    assert first.since_first.se == pytest.approx(first.total.se)
    assert second.since_first.value == pytest.approx(first.total.value + second.total.value)
    totals = sum(columns(chain_of_three, n, name) for n in (1, 2) for name in ("pathwise", "visitation"))
    responses = columns(chain_of_three, 1, "responses")
    residual = totals - second.since_first.value * responses
    clusters = len(totals)
    error = np.sqrt((residual**2).sum() * clusters / (clusters - 1)) / responses.sum()
    assert second.since_first.se == pytest.approx(error)
    assert second.since_first.se != pytest.approx(np.hypot(first.total.se, second.total.se), rel=1e-3)
    assert second.entropy.value == pytest.approx(chain.entropy_first.value + second.since_first.value)
    assert chain.rounds == 2


def test_swapping_the_checkpoints_of_a_run_changes_the_sign_of_its_result(checkpoints: list[Path], tmp_path: Path):
    a, b = checkpoints[:2]
    step(tmp_path / "forth", 1, a, b, side=0)
    step(tmp_path / "back", 1, b, a, side=1)
    forth, back = (RunDirectory(tmp_path / name / "step-1").result().change for name in ("forth", "back"))
    for name in ("total", "pathwise", "visitation"):
        there, here = getattr(forth, name), getattr(back, name)
        assert there.value == pytest.approx(-here.value, rel=1e-6, abs=1e-9) and there.value != 0
        assert there.se == pytest.approx(here.se, rel=1e-6)
    assert forth.entropy_a.value == pytest.approx(back.entropy_b.value)
    assert (forth.js, forth.kl.ab) == (pytest.approx(back.js), pytest.approx(back.kl.ba))


def test_the_chain_is_written_and_shown(chain_of_three: Path):
    chain = write_chain(chain_of_three)
    assert Chain.from_json(json.loads((chain_of_three / "chain.json").read_text())) == chain
    assert (chain_of_three / "chain.png").read_bytes()[:4] == b"\x89PNG"
    (series,) = data_of((chain_of_three / "report.html").read_text())["series"]
    assert [point["entropy"]["value"] for point in series["points"]] == [
        chain.entropy_first.value, *(step.entropy.value for step in chain.steps)]  # fmt: skip
    assert [change["since_first"] for change in series["changes"]] == [
        step.since_first.to_json() for step in chain.steps]  # fmt: skip
    lines = chain_csv(chain).splitlines()
    assert len(lines) == 3 and lines[0].startswith("a,b,run,total,total_se")
    assert float(lines[1].split(",")[3]) == chain.steps[0].total.value
    assert chain_markdown(chain).count("±") == 12
    assert len(chain_figure(chain).axes) == 2


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_no_number_of_a_chain_is_cut(chain_of_three: Path, width: int):
    stream = io.StringIO()
    chain = read_chain(chain_of_three)
    Console(file=stream, width=width, _environ={}).print(chain_table(chain))
    text = " ".join(stream.getvalue().split())
    for one in chain.steps:
        for figure, plus in ((one.total, True), (one.since_first, True), (one.entropy, False)):
            assert with_error(figure.value, figure.se, plus) in text
    assert max(map(len, stream.getvalue().splitlines())) <= width


def test_what_is_no_chain_or_has_no_round_is_refused_in_one_line(tmp_path: Path):
    assert step_directories(tmp_path) == []
    with pytest.raises(ConfigError, match="step-1 has no finished round yet"):
        read_chain(tmp_path)


def test_a_step_has_the_side_of_its_place_and_is_resumed_where_it_was_begun(tmp_path: Path):
    config = tmp_path / "c.yaml"
    config.write_text("data: {prompts: p.jsonl}\n")
    asked = ("cluster.actors=3", f"output.dir={tmp_path}", "output.name=mine")
    directory = chain_directory(config, asked)
    assert directory == tmp_path / "mine"
    requests = [step_request(directory, number, 3, "a", "b", config, asked) for number in (1, 2, 3)]
    assert [request.overrides[-1] for request in requests] == [f"compare.side={side}" for side in (0, 1, 0)]
    assert requests[1].overrides[:3] == asked and 'output.name="step-2"' in requests[1].overrides
    (directory / "step-2").mkdir(parents=True)
    kept = [f"compare.keep_responses={word}" in one.overrides for one, word in zip(
        requests, ("true", "true", "false"), strict=True)]
    assert kept == [True] * 3
    assert "compare.responses_from=null" in requests[0].overrides
    assert f'compare.responses_from="{directory / "step-1"}"' in requests[1].overrides
    again = step_request(directory, 2, 3, "a", "b", config, asked)
    assert (again.config, again.resume, again.overrides) == (None, directory / "step-2", ("cluster.actors=3",))


def test_names_tell_checkpoints_apart():
    assert names_of(["/x/run/step-1", "/x/run/step-2"]) == ["step-1", "step-2"]
    assert names_of(["/x/a/last", "/x/b/last"]) == ["a/last", "b/last"]
