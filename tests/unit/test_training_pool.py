"""What slots of training are planned for where frozen experts are sharded."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import ConfigError, MotleyConfig
from cluster.forecast import training_forecast
from cluster.planning import declared_topology, training_pool
from placement.costs import expert_weight_bytes, memory_cap_bytes
from placement.errors import InfeasiblePlanError
from tests.unit.test_serving_plan import CHECKPOINTS, config_of, profile_of

LORA = {"rank": 4, "target_modules": ["q_proj"]}


def training(config: Any, **settings: Any) -> MotleyConfig:
    tree = config.model_dump(mode="json")
    tree["plan"]["experts"] = "stages"
    tree["training"] |= {"lora": LORA, "sequence_tokens": 64} | settings
    return MotleyConfig.model_validate(tree)


def test_slots_are_without_experts_and_have_the_memory_that_those_leave() -> None:
    config = training(config_of(memory=64 * 2**20), experts="shards")
    profile, topology = profile_of(config), declared_topology(config)

    pool = training_pool(config, profile, topology)

    assert pool.shards is not None
    assert not any(layer.routed_bytes for layer in pool.profile.layers)
    assert all(
        held for layer in range(profile.num_layers) for held in pool.shards.experts.holdings(layer)
    )
    bytes_each = expert_weight_bytes(profile.layers[0])
    for whole, left, device in zip(
        topology.devices, pool.topology.devices, pool.shards.devices, strict=True
    ):
        cap = memory_cap_bytes(whole.memory_bytes, 0.1)
        kept = pool.shards.num_slots(device) * bytes_each
        assert 0 < kept <= cap / 2
        assert memory_cap_bytes(left.memory_bytes, 0.1) <= cap - kept
    assert training_forecast(config, pool.profile, pool.topology).plan.slots


def test_nothing_changes_where_experts_come_with_their_layers() -> None:
    config = training(config_of())
    profile, topology = profile_of(config), declared_topology(config)

    pool = training_pool(config, profile, topology)

    assert (pool.profile, pool.topology, pool.shards) == (profile, topology, None)


def test_what_cannot_be_sharded_is_refused() -> None:
    with pytest.raises(ValueError, match="keeps them frozen, and without lora all weights"):
        training(config_of(), experts="shards", lora=None)
    dense = training(config_of(CHECKPOINTS / "tiny-qwen3"), experts="shards")
    with pytest.raises(ConfigError, match=r"no routed experts; .*training.experts: layers"):
        training_pool(dense, profile_of(dense), declared_topology(dense))
    gpus = training(config_of(kind="cuda"), experts="shards")
    with pytest.raises(ConfigError, match=r"training.experts: shards takes one GPU a node so far"):
        training_pool(gpus, profile_of(gpus), declared_topology(gpus))
    small = training(config_of(memory=2**22), experts="shards")
    with pytest.raises(InfeasiblePlanError, match="slots"):
        training_pool(small, profile_of(small), declared_topology(small))
