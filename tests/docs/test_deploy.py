"""Manifests are valid, safe by default, and fit the preset that they run."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
from support import deployment
from support.deployment import DOCKERFILE, KUBERAY, LAUNCHER, ROOT, Document, Pods, of_kind, pinned, quantity_bytes

from ray_probe.config import load_config

PRESET = load_config(ROOT / "configs/cluster_1p5b.yaml")
CORE_DOCUMENTS = [d for d in deployment.documents() if d["kind"] not in (*deployment.RAY_KINDS, "Kustomization")]
RAY_PODS = deployment.ray_pods()
RAY_NODES = [pods for pods in RAY_PODS if pods.role != "submitter"]
RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def name_of(item: Document | Pods) -> str:
    if isinstance(item, Pods):
        return f"{item.resource}-{item.role}"
    return f"{item['kind']}-{item['metadata']['name']}"


every_pod = pytest.mark.parametrize("pods", RAY_PODS, ids=name_of)
every_ray_node = pytest.mark.parametrize("pods", RAY_NODES, ids=name_of)
every_ray_resource = pytest.mark.parametrize("kind", deployment.RAY_KINDS)


@pytest.fixture
def schemas(tmp_path: Path) -> Path:
    """JSON schemas of KubeRay's resources, from `shared` beside the working copy."""
    found = ROOT.parent / "shared" / "schemas"
    if not found.is_dir():
        pytest.skip(f"no schemas of KubeRay's resources in {found}")
    return Path(shutil.copytree(found, tmp_path / "schemas"))


@every_ray_resource
def test_a_ray_resource_is_what_the_operator_accepts(kind: str, schemas: Path) -> None:
    schema = json.loads((schemas / f"ray.io_v1_{deployment.RAY_KINDS[kind]}.json").read_text())
    (doc,) = of_kind(kind)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(doc)
    assert not validator.is_valid({**doc, "spec": {**doc["spec"], "no-such-field": 1}})


@pytest.mark.parametrize("doc", CORE_DOCUMENTS, ids=name_of)
def test_a_core_resource_is_what_kubernetes_accepts(doc: Document) -> None:
    kubernetes_validate.validate(doc, kubernetes_validate.latest_version(), strict=True)
    assert doc["kind"] == "Namespace" or doc["metadata"]["namespace"] == "ray-probe"


def test_apply_k_applies_all_that_job_and_service_share() -> None:
    (shared,) = of_kind("Kustomization")
    files = {path.name for path in KUBERAY.glob("*.yaml")}
    assert set(shared["resources"]) == files - {"kustomization.yaml", "rayjob.yaml", "raycluster.yaml"}


def test_the_launcher_file_is_what_ray_accepts_and_takes_the_token_along_unreadable_to_others() -> None:
    (ray,) = importlib.util.find_spec("ray").submodule_search_locations  # type: ignore[union-attr,misc]
    jsonschema.validate(LAUNCHER, json.loads((Path(ray) / "autoscaler/ray-schema.json").read_text()))
    worker = LAUNCHER["available_node_types"]["gpu"]
    assert LAUNCHER["head_node_type"] == "head"
    assert 0 < worker["min_workers"] < worker["max_workers"] == LAUNCHER["max_workers"]
    assert LAUNCHER["file_mounts"] == {
        "/home/ubuntu/ray_probe": ".",
        "/home/ubuntu/.ray/auth_token": "~/.ray/auth_token",
    }
    assert LAUNCHER["setup_commands"][0] == "chmod 600 ~/.ray/auth_token"
    assert "RAY_AUTH_MODE=token" in LAUNCHER["setup_commands"][-1]


@every_ray_resource
def test_a_cluster_is_of_the_pinned_ray_asks_for_a_token_and_scales(kind: str) -> None:
    (doc,) = of_kind(kind)
    spec = deployment.cluster_spec(doc)
    assert spec["rayVersion"] == pinned("ray")
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    (group,) = spec["workerGroupSpecs"]
    assert 0 < group["minReplicas"] <= group["replicas"] < group["maxReplicas"]


@every_pod
def test_a_pod_runs_where_only_restricted_ones_may(pods: Pods) -> None:
    security = pods.template["spec"]["securityContext"]
    assert security["runAsNonRoot"] is True
    assert f"USER {security['runAsUser']}" in DOCKERFILE.splitlines()
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert [container["securityContext"] for container in pods.template["spec"]["containers"]] == [RESTRICTED]


@every_ray_resource
def test_the_namespace_admits_restricted_pods_alone_and_the_autoscaler_is_one(kind: str) -> None:
    (namespace,), (doc,) = of_kind("Namespace"), of_kind(kind)
    assert namespace["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    assert deployment.cluster_spec(doc)["autoscalerOptions"]["securityContext"] == RESTRICTED


@every_ray_node
def test_the_object_store_fits_its_memory_and_leaves_some(pods: Pods) -> None:
    shared_memory = pods.mounts()["/dev/shm"]["emptyDir"]
    assert shared_memory["medium"] == "Memory"
    store, room = int(pods.ray_start["object-store-memory"]), quantity_bytes(shared_memory["sizeLimit"])
    assert store < room < quantity_bytes(pods.container["resources"]["limits"]["memory"]) / 2
    assert pods.container["resources"]["limits"] == pods.container["resources"]["requests"]


@every_ray_node
def test_a_node_has_the_directories_of_the_preset_and_can_write_them(pods: Pods) -> None:
    models = str(Path(re.search(r"HF_HOME=(\S+)", DOCKERFILE)[1]).parent)  # type: ignore[index]
    claims = {doc["metadata"]["name"]: doc["spec"]["accessModes"] for doc in of_kind("PersistentVolumeClaim")}
    for path in (PRESET.output.dir, models):
        assert claims[pods.mounts()[path]["persistentVolumeClaim"]["claimName"]] == ["ReadWriteMany"]
    owned = re.search(r"install --directory --owner=1000 \S+ \S+ (/.*)", DOCKERFILE)[1].split()  # type: ignore[index]
    assert owned == [PRESET.output.dir, models, PRESET.model.cache_dir]
    prompts, root = Path(str(PRESET.data.prompts)), re.findall(r"^WORKDIR (.+)$", DOCKERFILE, re.MULTILINE)[-1]
    assert (ROOT / prompts.relative_to(root)).is_file()


@every_ray_node
def test_a_worker_holds_one_actor_of_the_preset_and_the_head_none(pods: Pods) -> None:
    limits = pods.container["resources"]["limits"]
    if pods.role == "head":
        assert pods.ray_start["num-cpus"] == "0" and "nvidia.com/gpu" not in limits
        assert pods.mounts()["/configs"]["configMap"]["name"] == of_kind("ConfigMap")[0]["metadata"]["name"]
    else:
        cluster, tolerations = PRESET.cluster, pods.template["spec"]["tolerations"]
        assert (int(limits["cpu"]), limits["nvidia.com/gpu"]) == (cluster.cpus_per_actor, cluster.gpus_per_actor)
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in tolerations
        assert "emptyDir" in pods.mounts()[str(PRESET.model.cache_dir)]


def test_the_config_map_is_the_preset_word_for_word() -> None:
    (configs,) = of_kind("ConfigMap")
    assert configs["data"] == {"cluster_1p5b.yaml": (ROOT / "configs/cluster_1p5b.yaml").read_text()}


def test_the_actors_asked_for_have_room_when_they_are_asked_for() -> None:
    (job,), (service,) = of_kind("RayJob"), of_kind("RayCluster")
    groups = [deployment.cluster_spec(doc)["workerGroupSpecs"][0] for doc in (job, service)]
    assert groups[0]["minReplicas"] == PRESET.cluster.actors
    at_start = re.findall(r"ray-probe up /\S+ .*--actors (\d+)", "\n".join(deployment.texts().values()))
    there = {groups[1]["minReplicas"], LAUNCHER["available_node_types"]["gpu"]["min_workers"]}
    assert len(at_start) >= 4 and {int(number) for number in at_start} == there
    shards = PRESET.batch.prompts_per_round // PRESET.batch.shard_prompts
    assert all(shards >= 2 * most for most in (LAUNCHER["max_workers"], *(group["maxReplicas"] for group in groups)))


def admitted(pods: Pods, sender: dict[str, str]) -> bool:
    """Whether some policy lets pods with these labels reach every port of `pods`."""
    return any(
        policy["spec"]["podSelector"].get("matchLabels", {}).items() <= pods.labels.items()
        and "ports" not in rule
        and any(peer["podSelector"]["matchLabels"].items() <= sender.items() for peer in rule["from"])
        for policy in of_kind("NetworkPolicy")
        for rule in policy["spec"].get("ingress", ())
    )


@every_pod
def test_a_pod_is_reached_by_those_of_its_own_cluster_alone(pods: Pods) -> None:
    assert {"podSelector": {}, "policyTypes": ["Ingress"]} in [policy["spec"] for policy in of_kind("NetworkPolicy")]
    assert [admitted(pods, other.labels) for other in RAY_PODS] == [pods.resource == o.resource for o in RAY_PODS]
    assert not admitted(pods, {}) and not admitted(pods, {"ray-probe/cluster": "another"})


def test_the_operator_reaches_the_heads_dashboards_and_nothing_else() -> None:
    specs = [policy["spec"] for policy in of_kind("NetworkPolicy")]
    to_ports = [(s["podSelector"], r["ports"]) for s in specs for r in s.get("ingress", ()) if "ports" in r]
    assert to_ports == [({"matchLabels": {"ray.io/node-type": "head"}}, [{"protocol": "TCP", "port": 8265}])]
