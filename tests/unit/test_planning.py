from __future__ import annotations

import pytest

from actors.engine.checkpoint import Checkpoint
from actors.engine.config import EngineConfig
from cluster.config import ConfigError, MotleyConfig, default_config
from cluster.planning import (
    best_single_device_plan,
    declared_topology,
    dtype_bytes,
    make_plan,
    serving_workload,
)
from placement.topology import DeviceKind
from placement.workload import ModelProfile


def config_with(**changes: object) -> MotleyConfig:
    return MotleyConfig.model_validate(default_config().model_dump() | changes)


@pytest.fixture(scope="module")
def tiny() -> ModelProfile:
    return Checkpoint.open(default_config().model).profile(dtype_bytes=4)


def test_the_embedded_default_cuts_unevenly_with_a_step_that_real_work_fits_in(
    tiny: ModelProfile,
) -> None:
    config = default_config()

    plan = make_plan(config, tiny, declared_topology(config))

    assert [stage.num_layers for stage in plan.stages] == [5, 2, 1]
    assert 0.015 <= plan.bottleneck_s <= 0.025
    assert plan.bottleneck_s <= plan.lower_bound_s * 1.1
    assert best_single_device_plan(config, tiny, declared_topology(config)) is None


def test_the_best_single_device_is_found_when_one_holds_the_model(tiny: ModelProfile) -> None:
    config = config_with(plan={"context_tokens": 64})

    alone = best_single_device_plan(config, tiny, declared_topology(config))

    assert alone is not None
    assert [stage.device_id for stage in alone.stages] == ["big"]


def test_kv_is_reserved_in_whole_blocks_or_as_set() -> None:
    plan = {"lanes": 3, "sequences_per_lane": 2, "context_tokens": 17}

    assert serving_workload(config_with(plan=plan)).kv_tokens == 3 * 2 * 32
    fixed = config_with(plan=plan, engine={"num_kv_blocks": 10, "kv_block_tokens": 8})
    assert serving_workload(fixed).kv_tokens == 3 * 10 * 8


@pytest.mark.parametrize(
    ("dtype", "kinds", "expected"),
    [
        ("auto", ["cuda", "cuda"], 2),
        ("auto", ["cuda", "cpu"], 4),
        ("auto", ["paced"], 4),
        ("float32", ["cuda"], 4),
        ("bfloat16", ["cpu"], 2),
    ],
)
def test_weights_are_as_wide_as_the_dtype(
    dtype: str, kinds: list[DeviceKind], expected: int
) -> None:
    assert dtype_bytes(EngineConfig.model_validate({"dtype": dtype}), kinds) == expected


def test_undeclared_devices_cannot_be_planned_offline() -> None:
    with pytest.raises(ConfigError, match="devices is not set: they are found and measured"):
        declared_topology(config_with(devices=None))
    real = [{"id": "x", "kind": "cpu"}, {"id": "y", "kind": "cuda", "memory_bytes": 1}]
    with pytest.raises(ConfigError, match="devices x, y have no figures"):
        declared_topology(config_with(devices=real))


def test_links_reach_the_topology() -> None:
    link = {
        "source_node": "local",
        "target_node": "local",
        "bandwidth_bytes_per_s": "1 MB/s",
        "latency_s": 0.25,
    }

    topology = declared_topology(config_with(links=[link]))

    assert topology.link("local", "local").bandwidth_bytes_per_s == 1e6
    assert topology.link("local", "local").latency_s == 0.25


def test_a_cut_that_does_not_suit_the_model_is_a_settings_error(tiny: ModelProfile) -> None:
    config = config_with(plan={"layer_counts": [4, 2, 1]})

    with pytest.raises(ConfigError, match=r"plan: layer_counts \[4, 2, 1\] must .* 8 layers"):
        make_plan(config, tiny, declared_topology(config))
