"""A demand that this machine cannot hold is refused with the key that allows it."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ray_probe.cluster.connection import demand as demands
from ray_probe.cluster.connection.demand import Demand, check_machine, crowding, few_open_files, over_cap
from ray_probe.config.loading import config_from_dict
from ray_probe.errors import ClusterError, ConfigError

MINIMAL = {"model": {"path": "m"}, "data": {"prompts": "p.jsonl"}}


def of(**cluster: object) -> Demand:
    return Demand.of(config_from_dict({**MINIMAL, "cluster": cluster}).cluster)


@pytest.mark.parametrize(("cluster", "cap"), [({"actors": 1000}, 4), ({"actors": 8, "max_actors": 7}, 7)])
def test_max_actors_is_a_cap_and_the_refusal_names_the_key(cluster: dict[str, int], cap: int) -> None:
    actors = cluster["actors"]
    problem = over_cap(of(**cluster))
    assert problem is not None and problem.startswith(f"cluster.actors: got {actors}; cluster.max_actors allows {cap} ")
    assert problem.endswith(f"set cluster.max_actors={actors}")
    assert over_cap(of(**{**cluster, "max_actors": actors})) is None
    with pytest.raises(ConfigError, match=r"^cluster\.actors: got"):
        check_machine(of(**cluster))


def test_more_than_twice_the_cores_is_refused_unless_max_actors_was_given() -> None:
    assert crowding(of(actors=4), cores=2) is None
    problem = crowding(of(actors=3), cores=1)
    assert problem is not None and problem.startswith("cluster.actors: got 3; actors for more than 2 CPUs ")
    assert "cluster.cpus_per_actor" in problem and problem.endswith("set cluster.max_actors=3 to have them")
    assert crowding(of(actors=2, cpus_per_actor=3), cores=2) is not None
    assert crowding(of(actors=3, max_actors=3), cores=1) is None


def test_crowding_is_refused_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demands, "cores", lambda: 1)
    with pytest.raises(ConfigError, match=r"set cluster\.max_actors=3"):
        check_machine(of(actors=3))
    check_machine(of(actors=2))


@pytest.mark.parametrize(("slots", "limit", "needed"), [(4, 159, 160), (4, 160, None), (1000, 4096, 8128)])
def test_few_open_files_are_refused_with_the_number_needed(slots: int, limit: int, needed: int | None) -> None:
    problem = few_open_files(slots, limit)
    assert (problem is None) == (needed is None)
    if problem is not None:
        assert problem.startswith(f"ulimit -Hn: got {limit}; Ray needs at least {needed} open files")
    assert few_open_files(slots, resource.RLIM_INFINITY) is None


def test_a_low_hard_limit_is_refused_before_the_start_and_a_soft_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 4096))
    check_machine(of())
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 64))
    with pytest.raises(ClusterError, match=r"^ulimit -Hn: got 64; "):
        check_machine(of())


@pytest.mark.parametrize("command", ["run", "up"])
def test_the_command_line_refuses_a_thousand_actors_in_one_line_and_starts_nothing(
    tmp_path: Path, command: str
) -> None:
    raw = {"model": {"path": str(tmp_path)}, "data": {"prompts": ["a"]}, "output": {"dir": str(tmp_path / "runs")}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    done = subprocess.run(
        [sys.executable, "-c", "from ray_probe.cli.main import main; main()", command, "run.yaml", "--actors", "1000"],
        env=os.environ | {"XDG_STATE_HOME": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: cluster.actors: got 1000; cluster.max_actors allows 4 ")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
