"""Reads the files under deploy/ and their page, docs/clusters.md."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer
import yaml

from ray_probe.cli.main import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERAY = DEPLOY / "kuberay"
PAGE = ROOT / "docs" / "clusters.md"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
LAUNCHER = yaml.safe_load((DEPLOY / "cluster-launcher.yaml").read_text())
RAY_KINDS = {"RayCluster": "raycluster", "RayJob": "rayjob"}
UNITS = {"Gi": 2**30, "Mi": 2**20, "": 1}

Document = dict[str, Any]


class Pods(NamedTuple):
    """A pod template of a Ray resource; `role` is head, worker or submitter."""

    resource: str
    role: str
    template: Document
    ray_start: Document

    @property
    def container(self) -> Document:
        """The container that runs Ray, which is the first."""
        container: Document = self.template["spec"]["containers"][0]
        return container

    @property
    def labels(self) -> dict[str, str]:
        """Labels that the manifest gives to the pods."""
        labels: dict[str, str] = self.template["metadata"]["labels"]
        return labels

    def mounts(self) -> dict[str, Document]:
        """Volumes by the path that they are mounted at."""
        volumes = {volume["name"]: volume for volume in self.template["spec"].get("volumes", ())}
        return {mount["mountPath"]: volumes[mount["name"]] for mount in self.container.get("volumeMounts", ())}


def documents() -> list[Document]:
    """All documents of the KubeRay directory."""
    return [doc for path in sorted(KUBERAY.glob("*.yaml")) for doc in yaml.safe_load_all(path.read_text())]


def of_kind(kind: str) -> list[Document]:
    """The documents of a kind."""
    return [doc for doc in documents() if doc["kind"] == kind]


def cluster_spec(doc: Document) -> Document:
    """The cluster in a RayCluster or RayJob."""
    spec: Document = doc["spec"] if doc["kind"] == "RayCluster" else doc["spec"]["rayClusterSpec"]
    return spec


def ray_pods() -> list[Pods]:
    """Every pod template of every Ray resource."""
    found = []
    for doc in (doc for kind in RAY_KINDS for doc in of_kind(kind)):
        spec, name = cluster_spec(doc), doc["metadata"]["name"]
        head = spec["headGroupSpec"]
        found.append(Pods(name, "head", head["template"], head["rayStartParams"]))
        found += [
            Pods(name, "worker", group["template"], group["rayStartParams"]) for group in spec["workerGroupSpecs"]
        ]
        if "submitterPodTemplate" in doc["spec"]:
            found.append(Pods(name, "submitter", doc["spec"]["submitterPodTemplate"], {}))
    return found


class Call(NamedTuple):
    """A call of the command line: the file that names it, the command, the options."""

    path: str
    command: str
    options: set[str]


def quantity_bytes(text: str) -> int:
    """Bytes of a Kubernetes quantity."""
    number, unit = re.fullmatch(r"(\d+)(Gi|Mi|)", text).groups()  # type: ignore[union-attr]
    return int(number) * UNITS[unit]


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    return re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]


def texts() -> dict[str, str]:
    """Returns files under deploy/ and their page, with continued lines joined."""
    paths = {str(path.relative_to(DEPLOY)): path for path in sorted(DEPLOY.rglob("*")) if path.is_file()}
    return {name: re.sub(r"\\\n[# ]*", "", path.read_text()) for name, path in (paths | {PAGE.name: PAGE}).items()}


def named_commands() -> Iterator[Call]:
    """Yields each call of the command line that these files name."""
    for path, text in texts().items():
        for said in re.findall(r"(?<!-n )(?:ray-probe|launch\.py) [a-z]+\b(?!\.)[^`'\"\n|#;)]*", text):
            words = said.split()
            yield Call(path, words[1], {word.split("=")[0] for word in words[2:] if word.startswith("--")})


def command_line() -> dict[str, set[str]]:
    """Commands of the command line with their options."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {name: {option for p in command.params for option in p.opts} for name, command in commands.items()}
