"""The shipped Ray cluster files against Ray's own schema and defaults; nothing is launched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.inventory import NODE_RESOURCE

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = sorted((ROOT / "deploy" / "clusters").glob("*.yaml"))


def load(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_ray_accepts_the_file_before_and_after_its_defaults(path: Path) -> None:
    config = load(path)
    schema = Path(ray.autoscaler.__file__).with_name("ray-schema.json")

    jsonschema.validate(config, json.loads(schema.read_text(encoding="utf-8")))
    # As `ray up` does it: defaults first.
    validate_config(prepare_config(config))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_every_node_starts_with_token_authentication_and_has_the_token(path: Path) -> None:
    config = load(path)

    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[key] if "ray start" in command]
        assert starts
        assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    assert "--dashboard-host=127.0.0.1" in str(config["head_start_ray_commands"])


def test_the_lan_configuration_names_the_machines_of_the_lan_cluster() -> None:
    provider = load(ROOT / "deploy" / "clusters" / "lan.yaml")["provider"]
    devices = load(ROOT / "deploy" / "configs" / "lan.yaml")["devices"]

    assert {device["node"] for device in devices} <= {
        provider["head_ip"],
        *provider["worker_ips"],
    }


@pytest.mark.parametrize("name", ["aws.yaml", "mixed.yaml"])
def test_every_cloud_machine_has_a_name_of_its_own(name: str) -> None:
    config = load(ROOT / "deploy" / "clusters" / name)

    for kind, node_type in config["available_node_types"].items():
        assert node_type["resources"][f"{NODE_RESOURCE}{kind}"] == 1
        if kind != config["head_node_type"]:
            assert node_type["min_workers"] == node_type["max_workers"] == 1
    workers = len(config["available_node_types"]) - 1
    assert config["max_workers"] == workers


def test_the_devices_of_the_mix_are_on_machines_of_their_kind() -> None:
    node_types = load(ROOT / "deploy" / "clusters" / "mixed.yaml")["available_node_types"]
    devices = load(ROOT / "deploy" / "configs" / "mixed.yaml")["devices"]

    assert {device["node"] for device in devices} == set(node_types)
    for device in devices:
        has_gpu = "GPU" in node_types[device["node"]]["resources"]
        assert (device["kind"] == "cuda") is has_gpu


def test_a_submitted_job_carries_the_packages_and_little_else() -> None:
    ignored = get_excludes_from_ignore_files(ROOT, include_gitignore=True)

    def is_shipped(path: str) -> bool:
        return not any(matches(ROOT / path) for matches in ignored)

    for path in (
        "cluster/cli.py",
        "cluster/gateway/settings.py",
        "actors/engine/config.py",
        "placement/stages.py",
        "protos/motley_pb2.py",
        "deploy/configs/embedded.yaml",
        "deploy/checkpoints/tiny-qwen3/model.safetensors",
        "pyproject.toml",
    ):
        assert is_shipped(path), path
    for path in (".venv/bin/python", ".git/HEAD", "tests/unit/test_cli.py"):
        assert not is_shipped(path), path
