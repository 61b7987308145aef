"""A chain of comparisons: the change from checkpoint to checkpoint, and in all.

Sums over steps are those of `ray_probe.run.comparison.path_sums`.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path

from ray_probe.core.estimator.change_sums import ChangeSums
from ray_probe.errors import ConfigError, bad_value
from ray_probe.run.comparison.change import ChangeFigure, Figure
from ray_probe.run.comparison.estimates import PromptRows, change_estimate
from ray_probe.run.comparison.path_sums import PathSums
from ray_probe.run.directory import RunDirectory
from ray_probe.system.json_object import JsonObject

STEP = "step-"


@dataclass(frozen=True)
class ChainStep(JsonObject):
    """One comparison of a chain, and the sums through it."""

    a: str
    """Directory of the checkpoint before."""
    b: str
    """Directory of the checkpoint after."""
    run: str
    """Name of the run's directory."""
    responses: int = 0
    """Responses of both checkpoints."""
    total: ChangeFigure = field(default_factory=ChangeFigure)
    """Change of the entropy of a response, nats."""
    pathwise: ChangeFigure = field(default_factory=ChangeFigure)
    """Its part at the states visited."""
    visitation: ChangeFigure = field(default_factory=ChangeFigure)
    """Its part through which states are visited."""
    per_token: Figure = field(default_factory=Figure)
    """Change of the entropy of a token, nats."""
    since_first: Figure = field(default_factory=Figure)
    """Change of the entropy of a response since the first checkpoint, nats."""
    entropy: Figure = field(default_factory=Figure)
    """Entropy of a response at `b`, nats: that of the first checkpoint and the changes since."""


@dataclass(frozen=True)
class Chain(JsonObject):
    """The changes of entropy along a chain of checkpoints."""

    entropy_first: Figure
    """Entropy of a response at the first checkpoint, nats."""
    steps: tuple[ChainStep, ...]
    """The comparisons in order."""
    rounds: int
    """Rounds that every step has; the figures are of these."""


def step_directories(directory: Path) -> list[Path]:
    """Return the run directories of a chain, in order; empty for another directory."""
    found = [path for path in directory.glob(f"{STEP}*") if path.name.removeprefix(STEP).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(STEP)))


def responses_of(run: Path) -> Path:
    """Return the folder in which a step keeps responses for the next one."""
    return run / "state" / "responses"


def drop_responses(run: Path) -> None:
    """Remove the responses that a step keeps for the next one."""
    shutil.rmtree(responses_of(run), ignore_errors=True)


def read_chain(directory: Path) -> Chain:
    """Return the chain whose steps lie in a directory, over the rounds of all.

    Raises:
        ConfigError: there is no step, a step has no finished round, or a file of it is damaged.
    """
    runs = [RunDirectory(path, "RUN_DIR") for path in step_directories(directory)]
    finished = [len(run.finished_rounds()) for run in runs]
    if not runs or not min(finished):
        missing = next((run.path.name for run, rounds in zip(runs, finished, strict=True) if not rounds), f"{STEP}1")
        raise ConfigError(bad_value("RUN_DIR", str(directory), f"{missing} has no finished round yet"))
    rounds = min(finished)
    sums = [_sums(run, rounds) for run in runs]
    rows = [PromptRows.of(one.rows) for one in sums]
    prompts = sorted(set.intersection(*(set(one.ids) for one in rows)))
    if not prompts:
        raise ConfigError(bad_value("RUN_DIR", str(directory), "its steps share no prompt, so they are no chain"))
    shared = [[one.only(prompts)] for one in rows]
    start_P = shared[0][0].entropies_P[0]
    steps, path = [], None
    for run, one, step in zip(runs, sums, shared, strict=True):
        path = PathSums.over([step]) if path is None else path.then(step)
        assert path is not None, "all steps have these rounds and prompts"
        settings = run.manifest().settings
        found = change_estimate(one, settings["generation"]["max_new_tokens"], shares_baselines=True)
        steps.append(
            ChainStep(
                settings["compare"]["against"], settings["model"]["path"], run.path.name,
                int(sum(row[0] for row in one.rows.values())), found.total, found.pathwise, found.visitation,
                found.per_token.change, path.since, path.first.mean(start_P + path.since_P),
            )
        )  # fmt: skip
    return Chain(shared[0][0].mean(start_P), tuple(steps), rounds)


def _sums(run: RunDirectory, rounds: int) -> ChangeSums:
    """Return the sums of a step's first rounds.

    Raises ConfigError for a run that is no comparison.
    """
    changes = [totals.change for totals in run.restore(rounds)]
    known = [change for change in changes if change is not None]
    if len(known) < len(changes):
        raise ConfigError(bad_value("RUN_DIR", str(run.path), "it is no comparison"))
    return reduce(add, known)


def names_of(places: Sequence[str]) -> list[str]:
    """Return short names that tell the checkpoints apart, from their paths."""
    for parts in range(1, max((len(Path(place).parts) for place in places), default=1) + 1):
        names = ["/".join(Path(place).parts[-parts:]) for place in places]
        if len(set(names)) == len(set(places)):
            return names
    return list(places)
