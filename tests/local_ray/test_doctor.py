"""The doctor against a live Ray cluster, in a process of its own as a user would run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import ray

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def address(ray_session: None) -> str:
    return str(ray.get_runtime_context().gcs_address)


def doctor(folder: Path, address: str) -> dict[str, dict[str, str]]:
    path = folder / "config.yaml"
    path.write_text(
        f"model: {ROOT}/deploy/checkpoints/tiny-qwen3\n"
        f"ray: {{address: '{address}'}}\n"
        "gateway: {http_port: 0, grpc_port: 0}\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "doctor", "--json", "--config", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode in (0, 1), done.stderr
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_every_node_is_asked_for_its_versions(address: str, tmp_path: Path) -> None:
    checks = doctor(tmp_path, address)

    assert checks["ray cluster"]["message"] == "1 nodes alive"
    for package in ("python", "torch", "transformers", "ray"):
        assert checks[f"{package} on every node"]["outcome"] == "pass"
    assert ray.__version__ in checks["ray on every node"]["message"]


def test_a_cluster_that_is_not_there_is_a_failed_check(tmp_path: Path) -> None:
    checks = doctor(tmp_path, "127.0.0.1:1")

    assert checks["ray cluster"]["outcome"] == "fail"
    assert "127.0.0.1:1 cannot be joined" in checks["ray cluster"]["message"]
