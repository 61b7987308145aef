"""A gradient and comparisons that share a checkpoint's responses, so that each is sampled once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models import save_checkpoint, tiny_llama
from support.runs import POLICY, plan_of, settings

from ray_probe.config import ProbeConfig
from ray_probe.config.loading import config_from_dict, dump_yaml, to_dict
from ray_probe.controller.local_backend import LocalBackend
from ray_probe.core.estimator.change_sums import ROW
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.rollout.builder import RolloutBuilder
from ray_probe.rollout.comparison import Comparison
from ray_probe.rollout.loader import _store
from ray_probe.rollout.rollout import Rollout
from ray_probe.run.comparison.chain import responses_of
from ray_probe.run.directory import RunDirectory, as_json
from ray_probe.run.manifest import Manifest
from ray_probe.run.messages import ActorFacts
from ray_probe.run.preparation.prepare import prepare
from ray_probe.run.preparation.prepared import baseline_rule


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("shared")
    return [save_checkpoint(directory / f"step-{n}", tiny_llama(8, seed=n), "abcdef") for n in range(2)]


def config_of(
    directory: Path, name: str, checkpoint: Path, against: Path | None, before: str | None, side: int
) -> ProbeConfig:
    raw = to_dict(settings(checkpoint))
    raw["batch"] |= {"responses_per_prompt": 2 if against is None else 4, "rounds": 2}
    raw["compare"] |= {"against": against and str(against), "side": side, "keep_responses": True}
    raw["compare"]["responses_from"] = before and str(directory / before)
    raw["output"] |= {"dir": str(directory), "name": name}
    return config_from_dict(raw)


def forbid_sampling(rollout: Rollout | Comparison, place: int | None) -> None:
    processor = rollout._components.processor if isinstance(rollout, Rollout) else rollout.processors[place or 0]

    def generate(*args: object) -> None:
        raise AssertionError("these responses were sampled before")

    processor.generate = generate  # type: ignore[method-assign]


def measured(config: ProbeConfig, forbidden: int | None = None, samples: bool = True) -> dict[str, Any]:
    """The result of a measurement in this process; a policy that may not sample fails where it is asked to."""
    prepared = prepare(config)
    builder, checkpoint, against = RolloutBuilder(), prepared.checkpoint, prepared.against
    places = [(one.directory, one.adapter) for one in (against, checkpoint) if one is not None]
    store = _store(config, against or checkpoint, checkpoint)
    rollout: Rollout | Comparison
    if against is None:
        rollout = builder.load(config, *places[0], POLICY, store=store)
    else:
        rollout = builder.compare(config, places, POLICY, store=store)
    if not samples:
        forbid_sampling(rollout, forbidden)
    manifest = Manifest.of(prepared, ActorFacts(rollout.layout, "cpu", 1, 0), {})
    files = {"config.yaml": dump_yaml(config), "manifest.json": as_json(manifest.to_json())}
    run = RunDirectory.create(Path(config.output.dir), str(config.output.name), files)
    backend = LocalBackend([rollout], baseline_rule(config), POLICY, run)
    return OfflineEntropyProbe(config, plan_of(config), backend, run).run().to_json()


def test_gradient_and_comparisons_of_a_series_sample_each_checkpoint_once(checkpoints: list[Path], tmp_path: Path):
    a, b = checkpoints
    measured(config_of(tmp_path, "gradient-a", a, None, None, side=0))
    compared = measured(config_of(tmp_path, "compared", b, a, "gradient-a", side=0), forbidden=0, samples=False)
    gradient = measured(config_of(tmp_path, "gradient-b", b, None, "compared", side=1), samples=False)

    other = tmp_path / "alone"
    expected = config_of(other, "compared", b, a, None, side=0)
    assert compared["change"] == measured(expected)["change"], "bit for bit"
    alone = measured(config_of(other, "gradient-b", b, None, None, side=1))
    for key in ("beta", "entropy", "counts", "gradient", "advantage_mean_square"):
        assert gradient[key] == alone[key], key


def test_a_gradient_of_a_series_has_the_tokens_of_the_comparison(checkpoints: list[Path], tmp_path: Path):
    a, b = checkpoints
    compared = measured(config_of(tmp_path, "compared", b, a, None, side=0))
    gradient = measured(config_of(tmp_path, "gradient", b, None, "compared", side=1), samples=False)
    first, second = (part.change for part in RunDirectory(tmp_path / "compared").restore(2))
    rows = np.array(list((first + second).rows.values()))
    tokens, entropy = (rows[:, ROW.index(name)].sum() for name in ("tokens_b", "entropy_b"))
    counts = gradient["counts"]
    assert counts["tokens"] == tokens and 2 * counts["sequences"] == compared["counts"]["sequences"]
    assert gradient["entropy"]["per_token"] == pytest.approx(entropy / tokens, rel=1e-5)


def test_a_gradient_outside_a_series_keeps_its_own_seeds(checkpoints: list[Path], tmp_path: Path):
    shared = config_of(tmp_path, "shared", checkpoints[0], None, None, side=1)
    alone = shared.compare.model_copy(update={"keep_responses": False})
    output = shared.output.model_copy(update={"name": "alone"})
    own = measured(shared.model_copy(update={"compare": alone, "output": output}))
    assert own["beta"] == measured(own_seeds(shared))["beta"] != measured(shared)["beta"]
    assert not responses_of(tmp_path / "alone").exists() and any(responses_of(tmp_path / "shared").iterdir())


def own_seeds(config: ProbeConfig) -> ProbeConfig:
    """The same measurement with the other side, which only responses that are shared depend on."""
    compare = config.compare.model_copy(update={"keep_responses": False, "side": 0})
    return config.model_copy(
        update={"compare": compare, "output": config.output.model_copy(update={"name": "other-side"})}
    )
