"""Drives a chain of comparisons, one run directory a step."""

import json
from pathlib import Path

from ray_probe.config.loading import load_config
from ray_probe.config.strict_yaml import override_of
from ray_probe.run.comparison.chain import STEP, Chain, drop_responses, read_chain
from ray_probe.run.directory import as_json, default_name
from ray_probe.service.run_request import RunRequest
from ray_probe.system.files import write_atomically

RESUMED = ("cluster.", "metrics.", "notify.", "series.")
"""Settings that may differ where a step is resumed."""


def chain_directory(config: Path | None, settings: tuple[str, ...]) -> Path:
    """Return the directory of a chain: `output.dir`, then `output.name` or a new name.

    Raises:
        ConfigError: a setting is wrong.
    """
    placeholder = ("model.path=A", "compare.against=B")
    output = load_config(config, (*placeholder, *settings)).output
    return Path(output.dir).resolve() / (output.name or default_name(Path("chain")))


def step_request(
    directory: Path, number: int, steps: int, a: str, b: str, config: Path | None, settings: tuple[str, ...]
) -> RunRequest:
    """Return the request of one step; one that was begun before is resumed.

    A checkpoint's place decides the side of its seeds, so that both of its steps have the same responses of it: the
    first keeps their token ids, the second uses them.

    Args:
        directory: of the chain.
        number: of the step, from 1.
        steps: of the chain.
        a: directory of the checkpoint before.
        b: directory of the checkpoint after.
        config: YAML file, or None.
        settings: of the command line.
    """
    name = f"{STEP}{number}"
    if (directory / name).is_dir():
        free = tuple(one for one in settings if override_of(one)[0].startswith(RESUMED))
        return RunRequest(None, directory / name, free)
    before = None if number == 1 else str(directory / f"{STEP}{number - 1}")
    own = {"model.path": b, "compare.against": a, "output.dir": str(directory), "output.name": name,
           "compare.keep_responses": number < steps, "compare.responses_from": before}  # fmt: skip
    named = tuple(f"{key}={json.dumps(value)}" for key, value in own.items())
    return RunRequest(config, None, (*settings, *named, f"compare.side={(number - 1) % 2}"), name)


def end_step(directory: Path, number: int) -> None:
    """Remove the responses that the step before kept for this one, which is finished."""
    drop_responses(directory / f"{STEP}{number - 1}")


def write_chain(directory: Path) -> Chain:
    """Write the files of a chain whose steps are finished; returns the chain.

    The files are chain.json, chain.png and report.html.

    Raises:
        ConfigError: a step has no finished round.
        OutputError: a file cannot be written.
    """
    from ray_probe.page.places import chain_part
    from ray_probe.page.report_file import REPORT, write_report
    from ray_probe.report.change_plots import chain_figure  # imports matplotlib

    chain = read_chain(directory)
    write_atomically(directory / "chain.json", as_json(chain.to_json()).encode())
    chain_figure(chain).savefig(directory / "chain.png", dpi=150)
    part = chain_part(directory, chain)
    write_report(directory / REPORT, part.title, part.entries, part.series)
    return chain
