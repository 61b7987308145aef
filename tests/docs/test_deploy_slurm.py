"""slurm.sh, with fake commands of Slurm and Ray that note their arguments."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.deployment import DEPLOY

FAKES = {
    "python": f'exec "{sys.executable}" "$@"',
    "srun": 'while [[ $1 == --* ]]; do echo "$1" >>"$NOTES/srun"; shift; done; exec "$@"',
    "hostname": 'echo "10.0.0.7 172.17.0.1"',
    # Ray's own answers 0, too, when it cannot start.
    "ray": """python - "$@" <<'END'
import json, os, sys, pathlib
path = os.environ["RAY_AUTH_TOKEN_PATH"]
facts = {"arguments": sys.argv[1:], "mode": os.environ["RAY_AUTH_MODE"], "token": pathlib.Path(path).read_text(),
         "token_path": path, "token_file": os.stat(path).st_mode, "tmp": os.environ["RAY_TMPDIR"],
         "tmp_directory": os.stat(os.environ["RAY_TMPDIR"]).st_mode}
pathlib.Path(os.environ["NOTES"], "ray.json").write_text(json.dumps(facts))
END
[[ -n ${RAY_FAILS-} ]] && exit 0
while [[ $1 != -- ]]; do shift; done
shift; exec "$@" """,
    "ray-probe": 'printf "%s\\n" "$@" >"$NOTES/probe"; exit "${PROBE_ENDS_WITH:-0}"',
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes with eight GPUs each."""
    tools, home = tmp_path / "submitted" / ".venv" / "bin", tmp_path / "home"
    for directory in (tools, home, tmp_path / "notes"):
        directory.mkdir(parents=True)
    for name, body in FAKES.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)
    return {
        "PATH": os.environ["PATH"], "HOME": str(home), "NOTES": str(tmp_path / "notes"),
        "SLURM_SUBMIT_DIR": str(tmp_path / "submitted"), "SLURM_JOB_ID": f"9{os.getpid()}", "SLURM_NNODES": "2",
        "SLURM_CPUS_ON_NODE": "64", "SLURM_GPUS_ON_NODE": "8",
    }  # fmt: skip


def submit(job: dict[str, str], *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(DEPLOY / "slurm.sh"), *arguments]
    return subprocess.run(command, env=job | more, capture_output=True, text=True, timeout=60)


def told_ray(job: dict[str, str]) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(Path(job["NOTES"], "ray.json").read_text())
    return facts


def test_ray_starts_on_every_node_and_the_probe_gets_an_actor_for_each_gpu(job: dict[str, str]) -> None:
    assert submit(job, "mine.yaml", "--set", "data.prompts=a b.jsonl").returncode == 0
    arguments = told_ray(job)["arguments"]
    started = arguments[: arguments.index("--")]
    assert started[:5] == ["symmetric-run", "--address", "10.0.0.7:6379", "--min-nodes", "2"]
    assert {"--num-cpus=64", "--num-gpus=8"} < set(started)
    told_probe = Path(job["NOTES"], "probe").read_text().splitlines()
    assert told_probe == [
        "run",
        "--address",
        "10.0.0.7:6379",
        "--actors",
        "16",
        "mine.yaml",
        "--set",
        "data.prompts=a b.jsonl",
    ]
    assert "--ntasks=2" in Path(job["NOTES"], "srun").read_text().splitlines()


def test_the_token_is_this_users_alone_is_in_no_argument_or_output_and_goes_with_the_job(job: dict[str, str]) -> None:
    done, facts = submit(job, "mine.yaml"), told_ray(job)
    assert facts["mode"] == "token"
    token = facts["token"].strip()
    assert len(token) == 64
    assert [stat.S_IMODE(facts[name]) for name in ("token_file", "tmp_directory")] == [0o600, 0o700]
    assert token not in "".join([*facts["arguments"], done.stdout, done.stderr])
    assert not Path(facts["token_path"]).exists() and list(Path(job["HOME"]).iterdir()) == []
    assert not Path(facts["tmp"]).exists()


@pytest.mark.parametrize("code", ["0", "3", "5"])
def test_the_job_ends_with_the_exit_code_of_the_probe(job: dict[str, str], code: str) -> None:
    assert submit(job, "mine.yaml", PROBE_ENDS_WITH=code).returncode == int(code)


def test_a_ray_that_does_not_start_is_exit_code_4_and_one_line(job: dict[str, str]) -> None:
    done = submit(job, "mine.yaml", RAY_FAILS="1")
    assert done.returncode == 4
    assert done.stderr == "error: Ray did not come up on 2 node(s) at 10.0.0.7:6379; the reason is above\n"
