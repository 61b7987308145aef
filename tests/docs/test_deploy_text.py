"""Files under deploy/ and their page name what exists, and hold no secret."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import deployment
from support.deployment import DEPLOY, DOCKERFILE, LAUNCHER, ROOT, pinned

from ray_probe.cluster.connection.connect import Demand, shortfall

TOOLS = Path(sys.executable).parent
TEXTS = deployment.texts()


@pytest.mark.parametrize("command", [["shellcheck", "slurm.sh"], ["hadolint", "Dockerfile"]], ids=" ".join)
def test_scripts_pass_their_linters(command: list[str]) -> None:
    linter, file = command
    done = subprocess.run([TOOLS / linter, DEPLOY / file], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_all_pods_run_the_one_image_that_the_page_builds() -> None:
    (image,) = {pods.container["image"] for pods in deployment.ray_pods()}
    assert f"docker build -f deploy/Dockerfile -t {image} ." in TEXTS["clusters.md"]


def test_python_and_torch_are_the_same_wherever_they_are_installed() -> None:
    tested = re.search(r'python_version = "(.+)"', (ROOT / "pyproject.toml").read_text())[1]  # type: ignore[index]
    assert re.findall(r"^FROM python:(\d+\.\d+)\.\d+-slim", DOCKERFILE, re.MULTILINE) == [tested]
    assert f"ARG TORCH_VERSION={pinned('torch')}\n" in DOCKERFILE
    build = re.search(r"^ARG TORCH_BUILD=(\w+)$", DOCKERFILE, re.MULTILINE)[1]  # type: ignore[index]
    install = f"pip install --index-url https://download.pytorch.org/whl/{build} torch=={pinned('torch')}"
    for text in (TEXTS["clusters.md"], TEXTS["cluster-launcher.yaml"].replace("install -q", "install")):
        assert install in text
        assert set(re.findall(r"python(\d+\.\d+)", text)) == {tested}


def test_the_image_is_built_of_all_that_it_copies_and_of_nothing_else() -> None:
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()}
    assert set(sent) == copied and all((ROOT / name).exists() for name in sent)


@pytest.mark.parametrize("path", TEXTS)
def test_no_secret_lies_in_a_file(path: str) -> None:
    assert not re.findall(r"[0-9a-f]{32,}", TEXTS[path])
    assert not re.findall(r"(?i)(?:token|password|secret|key)['\"]?\s*[:=]\s*['\"]?[a-z0-9+/]{16,}", TEXTS[path])
    assert "kind: Secret" not in TEXTS[path]


def test_every_command_that_is_named_exists_with_its_options() -> None:
    calls, known = list(deployment.named_commands()), deployment.command_line()
    assert {call.path for call in calls} > {"clusters.md", "slurm.sh", "kuberay/rayjob.yaml", "kuberay/raycluster.yaml"}
    assert len(calls) > 25
    assert [call for call in calls if call.command not in known or call.options - known[call.command]] == []


def test_every_file_that_is_named_exists() -> None:
    named = {file for text in TEXTS.values() for file in re.findall(r"\b(?:configs|deploy)/[\w/.-]*\w\b(?!\*)", text)}
    assert len(named) > 8
    assert [file for file in named if not (ROOT / file).exists()] == []
    in_table = re.findall(r"^\| [^|]+ \| `([\w/.-]+\.\w+)` \|", TEXTS["clusters.md"], re.MULTILINE)
    assert len(in_table) == 4 and all((DEPLOY / file).is_file() for file in in_table)


def test_messages_that_the_page_explains_are_those_that_are_given() -> None:
    table = TEXTS["clusters.md"].split("| what you see |")[1].split("\n\n")[0]
    source = "".join(path.read_text() for path in (ROOT / "ray_probe").rglob("*.py"))
    for message in (
        "the cluster refused the token",
        "sees no CUDA device",
        "memory: an actor needs ",
        "cannot be written",
    ):
        assert message in table and message in source
    (asked,) = re.findall(r"`(asked .*?)`", table)
    assert asked in str(shortfall(Demand(4, 8, 1, {}, 4), [{"CPU": 8.0, "GPU": 1.0}]))


def test_ray_takes_every_option_that_its_commands_are_given() -> None:
    from ray.scripts.scripts import cli

    known = {name: {o for p in cli.commands[name].params for o in p.opts} for name in ("start", "symmetric-run")}
    started = {f"--{name}" for pods in deployment.ray_pods() for name in pods.ray_start}
    for command in LAUNCHER["head_start_ray_commands"] + LAUNCHER["worker_start_ray_commands"]:
        started |= set(re.findall(r"--[a-z-]+", command))
    assert started <= known["start"]
    (given,) = re.findall(r"ray symmetric-run (.*?) -- *bash", TEXTS["slurm.sh"])
    assert {"--address", "--min-nodes"} <= known["symmetric-run"]
    assert set(re.findall(r"--[a-z-]+", given)) <= known["symmetric-run"] | known["start"]
