"""Links are measured for real, and a slow one changes the plan."""

from __future__ import annotations

import json
from typing import Any

import pytest
from host_cases import CHECKPOINT, SLOW_BYTES_PER_S
from host_ray import HostRay
from hosts import Network

pytestmark = pytest.mark.timeout(300)


def settings(lan: Network) -> dict[str, Any]:
    """Three equal devices that are fast beside a slow link: a step of 32 rows is 24 KB."""
    devices = [
        {
            "id": f"on-{name}", "node": host.address, "kind": "paced", "flops_per_s": 4e10,
            "memory_bytes_per_s": 6e9, "memory_bytes": "512 MiB",
        }
        for name, host in lan.items()
    ]  # fmt: skip
    plan = {"lanes": 6, "sequences_per_lane": 32, "context_tokens": 256}
    return {"model": str(CHECKPOINT), "devices": devices, "plan": plan}


def planned_nodes(cluster: HostRay, config: str) -> list[str]:
    """Return the nodes of the plan, from stage to stage."""
    planned = cluster.head.motley("plan", "--config", config, "--json")
    return [stage["node"] for stage in json.loads(planned.stdout)["plan"]["stages"]]


def test_a_measured_slow_link_makes_the_plan_cross_less(cluster: HostRay, lan: Network) -> None:
    near, middle, far = (host.address for host in lan.values())
    lan["h2"].shape(SLOW_BYTES_PER_S)
    config = cluster.write_config(settings(lan), cluster.head)

    profiled = cluster.head.motley("profile", "--config", config, "--json", timeout_s=240.0)
    rates = {
        (link["source_node"], link["target_node"]): link["bandwidth_bytes_per_s"]
        for link in json.loads(profiled.stdout)["links"]
    }
    slow = planned_nodes(cluster, config)
    # The same hosts, had the far one a link like the others'.
    links = [
        {"source_node": node, "target_node": far, "bandwidth_bytes_per_s": rates[near, middle]}
        for node in (near, middle)
    ]
    like_others = cluster.write_config(settings(lan) | {"links": links}, cluster.head, "fast")
    fast = planned_nodes(cluster, like_others)

    assert rates[near, middle] > 4 * SLOW_BYTES_PER_S
    for way in ((near, far), (far, near), (middle, far), (far, middle)):
        assert 0.5 * SLOW_BYTES_PER_S < rates[way] < 1.1 * SLOW_BYTES_PER_S
    assert sorted(fast) == [near, middle, far]
    assert len(slow) < len(fast)
    assert far not in slow
