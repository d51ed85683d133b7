"""A node that a Ray resource names is found by that name, and gets the stage planned for it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from leftovers import actor_processes

from cluster.client import MotleyClient
from cluster.inventory import NODE_RESOURCE, find_hosts
from tests.local_ray.conftest import make_config, serving

JOIN_DEADLINE_S = 60.0

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def named_node(ray_session: None) -> Iterator[subprocess.Popen[bytes]]:
    """A second Ray node, started as the shipped clusters start theirs."""
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=2",
        f"--address={ray.get_runtime_context().gcs_address}",
        f"--object-store-memory={100 * 2**20}",
        f"--resources={json.dumps({f'{NODE_RESOURCE}big': 1})}",
    ]  # fmt: skip
    node = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline_s = time.monotonic() + JOIN_DEADLINE_S
    try:
        while "big" not in find_hosts():
            assert node.poll() is None, f"ray start ended with {node.returncode}"
            assert time.monotonic() < deadline_s, "the second node does not come up"
            time.sleep(0.1)
        yield node
    finally:
        node.terminate()
        node.wait(30)


def test_a_device_on_a_named_node_gets_its_stage_there(
    named_node: subprocess.Popen[bytes], checkpoints: Path
) -> None:
    figures: dict[str, Any] = {
        "kind": "cpu", "flops_per_s": 1e10, "memory_bytes_per_s": 1e10, "memory_bytes": 2**31,
    }  # fmt: skip
    devices = [{"id": "a", "node": "local"} | figures, {"id": "b", "node": "big"} | figures]

    with serving(make_config(checkpoints / "tiny-qwen3", (3, 5), devices=devices)) as served:
        stages = {stage.node: stage for stage in served.status().stages}
        assert (stages["big"].first_layer, stages["big"].end_layer) == (3, 8)
        assert len(actor_processes(b"ray::StageWorker", root=named_node.pid)) == 1
        with MotleyClient(served.running.grpc_target, served.running.token) as client:
            completion = client.complete(
                "import os\n", max_tokens=4, ignore_eos=True, temperature=0.0, timeout_s=30.0
            )
            assert len(completion.choices[0].token_ids) == 4
