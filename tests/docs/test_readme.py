"""The README is true: its code runs, its figures are those measured, its table has every key."""

import json
import re
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

from ray_probe.cli.main import app
from ray_probe.config import ProbeConfig
from ray_probe.service.client import ProbeClient

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def config_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += config_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{field.alias or name}")
    return keys


def test_the_library_example_runs_and_leaves_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", README.split("## Use it as a library")[1], re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    model = names["processor"].model  # type: ignore[attr-defined]
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert sum(float(parameter.grad.norm()) for parameter in model.parameters()) > 0


def test_every_command_and_option_that_is_shown_exists() -> None:
    command = typer.main.get_command(app)
    shown = re.findall(r"^(?:\$ |    )?ray-probe (.+?)(?: {2,}#.*)?$", README, re.MULTILINE)
    assert len(shown) >= 15
    for line in shown:
        name, *rest = line.split()
        for one in name.split("|"):
            options = {option for parameter in command.commands[one].params for option in parameter.opts}
            assert {word for word in rest if word.startswith("--")} <= options, line


def test_the_client_example_uses_what_the_client_has() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.split("## Use it as a library")[0], re.DOTALL)
    methods = set(re.findall(r"client\.(\w+)\(", code))
    assert methods == {"probe", "wait", "beta", "variance"}
    assert all(callable(getattr(ProbeClient, method)) for method in methods)


def test_every_key_of_a_config_is_in_the_table_and_no_other() -> None:
    table = README.split("## Every key of a config")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE) == config_keys(ProbeConfig)


def test_the_baselines_table_shows_what_was_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/baselines.json").read_text())
    ratios, gradients = measured["advantages"]["advantage_mean_square_ratio"], measured["gradient_by_mode"]
    for mode in ("constant", "residual_mu", "regression"):
        (row,) = re.findall(rf"^\| `{mode}`.*$", README, re.MULTILINE)
        assert f"{ratios[mode]['value']:.3f} ± {ratios[mode]['se']:.3f}" in row
        assert f"| {gradients[mode]['trace_cov'] / gradients['none']['trace_cov']:.2f} |" in row
    difference = {(pair["mode"], pair["against"]): pair for pair in measured["advantages"]["advantage_paired"]}
    last = difference["regression", "residual_mu"]
    assert f"{-last['difference']:.2f} ± {last['se']:.2f}" in README


def test_the_memory_figure_is_what_was_measured_and_within_its_bound() -> None:
    growth_mb = json.loads((ROOT / "benchmarks/results/actor_memory.json").read_text())["growth_mb"]
    assert growth_mb <= 16
    assert f"exceeds that at 32 by {growth_mb:.0f} MB" in README
