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


def measured_plan(cluster: HostRay, config: str) -> tuple[dict[str, float], list[str]]:
    """Measure the links anew; returns their rates, and the plan's nodes from stage to stage."""
    profiled = cluster.head.motley("profile", "--config", config, "--refresh", "--json")
    planned = cluster.head.motley("plan", "--config", config, "--json")
    rates = {
        f"{link['source_node']} to {link['target_node']}": link["bandwidth_bytes_per_s"]
        for link in json.loads(profiled.stdout)["links"]
    }
    return rates, [stage["node"] for stage in json.loads(planned.stdout)["plan"]["stages"]]


def test_a_measured_slow_link_makes_the_plan_cross_less(cluster: HostRay, lan: Network) -> None:
    config = cluster.write_config(settings(lan), cluster.head)
    near, far = lan["h1"].address, lan["h2"].address

    fast_rates, fast = measured_plan(cluster, config)
    lan["h2"].shape(SLOW_BYTES_PER_S)
    slow_rates, slow = measured_plan(cluster, config)

    assert fast_rates[f"{near} to {far}"] > 4 * SLOW_BYTES_PER_S
    for way in (f"{near} to {far}", f"{far} to {near}"):
        assert 0.5 * SLOW_BYTES_PER_S < slow_rates[way] < 1.1 * SLOW_BYTES_PER_S
    assert sorted(fast) == [host.address for host in lan.values()]
    assert len(slow) < len(fast)
    assert far not in slow
