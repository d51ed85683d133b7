"""The shipped manifests against schemas, and what must hold of them together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from referencing import Registry, Resource

from cluster.config import MotleyConfig, load_config
from cluster.gateway.auth import check_token
from cluster.inventory import NODE_RESOURCE

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "deploy" / "kubernetes"
KUBERAY = json.loads(
    (ROOT / "tests" / "support" / "schemas" / "kuberay.json").read_text(encoding="utf-8")
)
KUBERNETES = "v1.34.0-local-strict"

Object = dict[str, Any]


def objects() -> dict[str, Object]:
    """Every object of the manifests by "Kind name"."""
    found: dict[str, Object] = {}
    for path in sorted(MANIFESTS.glob("*.yaml")):
        for tree in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            name = f"{tree['kind']} {tree['metadata']['name']}"
            assert name not in found
            found[name] = tree
    return found


OBJECTS = objects()
RAY = {name: tree for name, tree in OBJECTS.items() if tree["apiVersion"] == "ray.io/v1"}
CORE = {name: tree for name, tree in OBJECTS.items() if name not in RAY}


def cluster_of(tree: Object) -> Object:
    spec = tree["spec"]
    found: Object = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return found


def templates() -> dict[str, Object]:
    """Every pod template by where it is."""
    found: dict[str, Object] = {}
    for name, tree in RAY.items():
        cluster = cluster_of(tree)
        found[f"{name} head"] = cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            found[f"{name} {group['groupName']}"] = group["template"]
        if "submitterPodTemplate" in tree["spec"]:
            found[f"{name} submitter"] = tree["spec"]["submitterPodTemplate"]
    return found


TEMPLATES = templates()


def containers(template: Object) -> Iterator[Object]:
    yield from template["spec"].get("initContainers", ())
    yield from template["spec"]["containers"]


# -- schemas -------------------------------------------------------------------------------------


def test_every_ray_kind_is_there() -> None:
    assert {tree["kind"] for tree in RAY.values()} == {"RayCluster", "RayJob", "RayService"}


@pytest.mark.parametrize("name", RAY)
def test_kuberay_knows_every_field(name: str) -> None:
    jsonschema.validate(RAY[name], KUBERAY)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rayVersion", 2.6),
        ("headGroupSpec.template", None),
        ("authOptions.mode", "on"),
        ("headGroupSpec.rayStartParams.num-cpus", 4),
        ("workerGroupsSpecs", []),
    ],
)
def test_the_schema_refuses_what_kuberay_would(path: str, value: object) -> None:
    tree = json.loads(json.dumps(RAY["RayCluster motley"]))
    *parents, last = path.split(".")
    place = tree["spec"]
    for parent in parents:
        place = place[parent]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, KUBERAY)


@pytest.fixture(scope="module")
def kubernetes() -> Registry[Any]:
    """Kubernetes' own definitions, in which unknown fields are refused."""
    package = pytest.importorskip(
        "kubernetes_validate", reason="the `test` extra brings Kubernetes' schemas"
    )
    folder = Path(package.__file__).parent / "kubernetes-json-schema" / KUBERNETES
    tree = json.loads((folder / "_definitions.json").read_text(encoding="utf-8"))
    registry: Registry[Any] = Registry().with_resource("kubernetes", Resource.from_contents(tree))
    return registry


def check(tree: Object, definition: str, kubernetes: Registry[Any]) -> None:
    reference = {"$ref": f"kubernetes#/$defs/io.k8s.api.{definition}"}
    jsonschema.Draft202012Validator(reference, registry=kubernetes).validate(tree)


@pytest.mark.parametrize("name", CORE)
def test_kubernetes_knows_every_field(name: str, kubernetes: Registry[Any]) -> None:
    tree = CORE[name]
    group, _, version = tree["apiVersion"].rpartition("/")
    check(tree, f"{group.partition('.')[0] or 'core'}.{version}.{tree['kind']}", kubernetes)


@pytest.mark.parametrize("name", TEMPLATES)
def test_kubernetes_knows_every_field_of_a_pod(name: str, kubernetes: Registry[Any]) -> None:
    check(TEMPLATES[name], "core.v1.PodTemplateSpec", kubernetes)


def test_kubernetes_would_refuse_a_field_it_does_not_know(kubernetes: Registry[Any]) -> None:
    tree = json.loads(json.dumps(TEMPLATES["RayCluster motley head"]))
    tree["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalations"] = False

    with pytest.raises(jsonschema.ValidationError, match="allowPrivilegeEscalations"):
        check(tree, "core.v1.PodTemplateSpec", kubernetes)


def test_the_serve_application_is_there() -> None:
    [application] = serve_config()["applications"]
    module, _, function = application["import_path"].partition(":")
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")

    assert f"def {function}(" in source
    assert f'name="{application["deployments"][0]["name"]}"' in source


def serve_config() -> Object:
    return dict(yaml.safe_load(RAY["RayService motley"]["spec"]["serveConfigV2"]))


# -- what must hold ------------------------------------------------------------------------------


def test_the_three_run_on_the_same_cluster() -> None:
    first, *others = (cluster_of(tree) for tree in RAY.values())
    assert all(other == first for other in others)


@pytest.mark.parametrize("name", RAY)
def test_ray_asks_for_a_token_and_is_the_version_of_the_project(name: str) -> None:
    cluster = cluster_of(RAY[name])

    assert cluster["authOptions"] == {"mode": "token"}
    assert Version(cluster["rayVersion"]) in Requirement("ray>=2.60,<2.61").specifier
    assert (
        Version(metadata.version("ray")).release[:2] == Version(cluster["rayVersion"]).release[:2]
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pod_would_be_let_into_a_restricted_namespace(name: str) -> None:
    spec = TEMPLATES[name]["spec"]

    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
    for container in containers(TEMPLATES[name]):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pod_is_bounded_pinned_and_asked_after(name: str) -> None:
    for container in containers(TEMPLATES[name]):
        assert re.fullmatch(r"motley:\d+\.\d+\.\d+-(cpu|cuda)", container["image"])
        limits, requests = (container["resources"][key] for key in ("limits", "requests"))
        assert {"cpu", "memory"} <= set(limits)
        assert set(requests) == set(limits)
        assert ("nvidia.com/gpu" in limits) is container["image"].endswith("cuda")
        if not name.endswith("submitter"):
            for probe in ("readinessProbe", "livenessProbe"):
                assert "local_raylet_healthz" in container[probe]["exec"]["command"][-1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_pod_mounts_is_there(name: str) -> None:
    spec = TEMPLATES[name]["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}

    for container in containers(TEMPLATES[name]):
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    for volume in volumes.values():
        if "configMap" in volume:
            assert f"ConfigMap {volume['configMap']['name']}" in OBJECTS
        if "secret" in volume:
            assert f"Secret {volume['secret']['secretName']}" in OBJECTS
        if "persistentVolumeClaim" in volume:
            claim = volume["persistentVolumeClaim"]["claimName"]
            assert f"PersistentVolumeClaim {claim}" in OBJECTS


def settings(name: str, folder: Path) -> MotleyConfig:
    path = folder / name
    path.write_text(OBJECTS["ConfigMap motley-config"]["data"][name], encoding="utf-8")
    return load_config(path)


@pytest.mark.parametrize("name", OBJECTS["ConfigMap motley-config"]["data"])
def test_each_device_is_on_a_named_node_of_its_kind(name: str, tmp_path: Path) -> None:
    config = settings(name, tmp_path)
    cluster = cluster_of(RAY["RayCluster motley"])
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}

    assert config.devices is not None
    for device in config.devices:
        group = groups[device.node]
        assert group["resources"][f"{NODE_RESOURCE}{device.node}"] == "1"
        assert group["replicas"] == group["maxReplicas"] == 1
        assert (device.kind == "cuda") is ("GPU" in group["resources"])


def test_the_gateway_listens_where_the_service_and_the_policy_lead(tmp_path: Path) -> None:
    gateway = settings("serve.yaml", tmp_path).gateway
    service = OBJECTS["Service motley"]["spec"]
    head = cluster_of(RAY["RayCluster motley"])["headGroupSpec"]["template"]
    policy = OBJECTS["NetworkPolicy clients-to-gateway"]["spec"]

    assert gateway.uses_tls
    ports = {gateway.http_port, gateway.grpc_port}
    assert {port["targetPort"] for port in service["ports"]} == ports
    assert ports < {port["containerPort"] for port in head["spec"]["containers"][0]["ports"]}
    assert service["selector"].items() <= head["metadata"]["labels"].items()
    assert ports < {port["port"] for port in policy["ingress"][0]["ports"]}
    # Ray Serve's proxy has another.
    assert serve_config()["http_options"]["port"] not in ports


def test_the_replica_is_pinned_to_the_head_and_finds_its_settings() -> None:
    [application] = serve_config()["applications"]
    [replica] = application["deployments"]
    head = cluster_of(RAY["RayService motley"])["headGroupSpec"]
    [mounted] = [
        mount["mountPath"]
        for mount in head["template"]["spec"]["containers"][0]["volumeMounts"]
        if mount["name"] == "config"
    ]

    assert set(replica["ray_actor_options"]["resources"]) <= set(head["resources"])
    assert application["args"]["config"] == f"{mounted}/serve.yaml"
    assert replica["num_replicas"] == 1


def test_nothing_comes_in_unless_it_is_said() -> None:
    closed = OBJECTS["NetworkPolicy nothing-comes-in"]["spec"]

    assert closed == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for name, tree in OBJECTS.items():
        if tree["kind"] == "NetworkPolicy" and name != "NetworkPolicy nothing-comes-in":
            for rule in tree["spec"].get("ingress", ()):
                assert rule["from"], name
    labels = OBJECTS["Namespace motley"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_no_secret_is_shipped_and_the_placeholder_is_refused() -> None:
    token = OBJECTS["Secret motley-gateway"]["stringData"]["token"]

    with pytest.raises(ValueError, match="at least 8 are needed"):
        check_token(token)
    for name, tree in OBJECTS.items():
        if tree["kind"] == "Secret":
            assert all(len(value) < 8 for value in tree["stringData"].values()), name
    for template in TEMPLATES.values():
        for container in containers(template):
            assert not [e for e in container.get("env", ()) if "TOKEN" in e["name"]]
