"""What is deployed where experts are sharded: what stages see, and what each device keeps free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.engine.checkpoint import planning_profile
from cluster.config import ConfigError, MotleyConfig
from cluster.planning import declared_topology, plan_serving, serving_workload
from placement.costs import expert_weight_bytes, memory_cap_bytes
from placement.workload import ModelProfile

CHECKPOINTS = Path(__file__).resolve().parents[2] / "deploy" / "checkpoints"
MOE = CHECKPOINTS / "tiny-qwen3-moe"


def config_of(
    model: Path = MOE,
    *,
    kind: str = "paced",
    memory: int = 2**31,
    nodes: str = "",
    **plan: Any,
) -> Any:
    devices = [
        {
            "id": f"d{i}",
            "kind": kind,
            "flops_per_s": 1e9 * (i + 1),
            "memory_bytes_per_s": 1e9,
            "memory_bytes": memory,
        }
        | ({"node": nodes[i]} if nodes else {})
        for i in range(3)
    ]
    link = {"source_node": "a", "target_node": "b", "bandwidth_bytes_per_s": 1e8, "latency_s": 1e-3}
    tree = {
        "model": str(model),
        "devices": devices,
        "links": [link] if nodes else [],
        "plan": {"experts": "shards"} | plan,
    }
    return MotleyConfig.model_validate(tree)


def profile_of(config: MotleyConfig) -> ModelProfile:
    return planning_profile(config.model, dtype_bytes=4)


def test_stages_see_the_model_without_experts_and_the_memory_that_experts_leave() -> None:
    config = config_of(memory=24 * 2**20, context_tokens=64, lanes=1)
    profile, topology = profile_of(config), declared_topology(config)
    served = plan_serving(config, profile, topology)
    shards = served.shards
    assert shards is not None

    assert sum(layer.routed_bytes for layer in served.profile.layers) == 0
    assert served.stages.kv_tokens_capacity <= serving_workload(config).kv_tokens
    bytes_each = expert_weight_bytes(profile.layers[0])
    needed = {stage.device_id: stage.need_bytes for stage in served.stages.stages}
    for whole, left, device in zip(
        topology.devices, served.topology.devices, shards.devices, strict=True
    ):
        kept = shards.num_slots(device) * bytes_each
        assert kept >= 4 * bytes_each, "room for spare_experts"
        assert needed.get(device.id, 0) + kept <= memory_cap_bytes(whole.memory_bytes, 0.1)
        assert needed.get(device.id, 0) <= memory_cap_bytes(left.memory_bytes, 0.1)


def test_room_for_guests_is_kept_where_devices_share_a_node() -> None:
    bare, kept = (
        plan_serving(config, profile_of(config), declared_topology(config)).shards
        for config in (config_of(nodes="aab", guest_experts=number) for number in (0, 3))
    )
    assert bare is not None
    assert kept is not None
    more = [kept.num_slots(d) - bare.num_slots(d) for d in kept.devices]
    assert more == [kept.num_guests(device) for device in kept.devices] == [3, 3, 0]


def test_a_device_without_layers_holds_experts() -> None:
    config = config_of(layer_counts=(6, 0, 0))
    served = plan_serving(config, profile_of(config), declared_topology(config))

    assert [stage.device_id for stage in served.stages.stages] == ["d0"]
    assert served.shards is not None
    assert served.shards.experts.device_ids == ("d0", "d1", "d2")


@pytest.mark.parametrize(("num_spread", "on_two_nodes"), [(0, 0), (4, 4)])
def test_the_hottest_experts_are_held_on_two_nodes(num_spread: int, on_two_nodes: int) -> None:
    config = config_of(
        memory=14 * 2**20, nodes="aab", context_tokens=64, lanes=1, spread_experts=num_spread
    )
    shards = plan_serving(config, profile_of(config), declared_topology(config)).shards
    assert shards is not None

    node_of = {device.id: device.node for device in shards.devices}
    for layer, placed in enumerate(shards.experts.layers):
        assert placed.not_spread == ()
        nodes = [
            {node_of[holding.device_id] for holding in held}
            for held in shards.experts.holdings(layer)
        ]
        assert [len(each) for each in nodes].count(2) == on_two_nodes


def test_nothing_changes_where_experts_stay_in_their_stages() -> None:
    config = config_of(experts="stages")
    profile = profile_of(config)
    served = plan_serving(config, profile, declared_topology(config))

    assert served.shards is None
    assert served.profile is profile


def test_shards_of_a_model_without_experts_are_refused() -> None:
    config = config_of(CHECKPOINTS / "tiny-qwen3")

    with pytest.raises(ConfigError, match=r"no routed experts; .*plan.experts: stages"):
        plan_serving(config, profile_of(config), declared_topology(config))


def test_two_gpus_of_a_node_are_refused() -> None:
    config = config_of(kind="cuda")

    with pytest.raises(ConfigError, match=r"one GPU a node so far, local has 3"):
        plan_serving(config, profile_of(config), declared_topology(config))
