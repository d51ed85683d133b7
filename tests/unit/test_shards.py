from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from placement.costs import expert_read_s, expert_row_s, experts_s, layer_step_s
from placement.errors import InfeasiblePlanError
from placement.measured import LayerSample, MeasuredLayer
from placement.shards import ShardsPlan, plan_shards, without_experts
from placement.topology import Device, LinkRate, Topology
from placement.workload import LayerCost, ModelProfile, ServingWorkload

# One number a byte: 100 dense and 8 experts of 50; a row uses 100 + 2 x 50 and does 2 FLOPs each.
SPARSE = LayerCost(
    flops_per_token=400.0,
    weight_bytes=500,
    routed_bytes=400,
    num_experts=8,
    experts_per_token=2,
    kv_bytes_per_token=1,
)
END = LayerCost(flops_per_token=0, weight_bytes=10)
WORKLOAD = ServingWorkload(
    lanes=1, sequences_per_lane=4, context_tokens_per_sequence=1, kv_tokens=4, step_tokens=4
)


def model(*layers: LayerCost) -> ModelProfile:
    return ModelProfile(
        name="m",
        embedding=END,
        layers=layers or (SPARSE, SPARSE),
        head=END,
        hidden_bytes_per_token=4,
    )


def device(device_id: str, **changes: Any) -> Device:
    fields: dict[str, Any] = {
        "node": f"n{device_id}",
        "kind": "paced",
        "flops_per_s": 1e3,
        "memory_bytes_per_s": 1e6,
        "memory_bytes": 10_000,
    }
    return Device(id=device_id, **(fields | changes))


def test_the_dense_part_and_the_experts_of_a_row_are_all_of_its_flops() -> None:
    [dense, _] = without_experts(model()).layers

    assert dense.flops_per_token == pytest.approx(200.0)
    assert dense.weight_bytes == 100
    assert expert_row_s(device("a"), SPARSE) == pytest.approx(100.0 / 1e3)
    assert expert_read_s(device("a"), SPARSE) == pytest.approx(50 / 1e6)


def test_each_expert_of_a_call_is_read_while_its_rows_are_computed() -> None:
    slow_memory = device("a", memory_bytes_per_s=100.0)

    assert experts_s(slow_memory, SPARSE, [1, 5, 20]) == pytest.approx(0.5 + 0.5 + 2.0)
    assert experts_s(slow_memory, SPARSE, []) == 0


def test_a_faster_device_takes_experts_off_the_stage_and_is_reached_by_one_message() -> None:
    near, far = device("a"), device("b", flops_per_s=9e3)
    link = LinkRate(bandwidth_bytes_per_s=1e3, latency_s=0.001)
    topology = Topology(devices=(near, far), default_link=link)

    plan = plan_shards(model(), topology, workload=WORKLOAD)

    # 4 rows of 2 experts: 8 rows, of 0.1 s on a and a ninth of that on b.
    assert plan.stages.stages[0].device_id == "b"
    [first, _] = plan.experts.layers
    assert first.bottleneck_s == pytest.approx(8 * 0.1 / 10)
    # Its message carries 16 bytes there and back.
    assert plan.message_s == pytest.approx(2 * 2 * (0.001 + 0.016))
    assert plan.latency_s == pytest.approx(
        plan.stages.latency_s + 2 * first.bottleneck_s + plan.message_s
    )
    assert dict(plan.device_s)["b"] == pytest.approx(
        plan.stages.stages[0].step_s + 2 * first.bottleneck_s
    )
    assert plan.predicted_tokens_per_s == pytest.approx(4 / plan.period_s)


def test_a_shard_holds_no_more_than_the_memory_that_the_stage_leaves() -> None:
    # The stage needs 220 of weights, 8 of KV and 17 rows of 4 x 4 bytes.
    tight = device("a", memory_bytes=2000)
    roomy = device("b", flops_per_s=1.0, memory_bytes=2000)

    plan = plan_shards(model(), Topology(devices=(tight, roomy)), workload=WORKLOAD)

    by_device = dict(zip(plan.experts.device_ids, plan.experts.device_bytes, strict=True))
    for stage in plan.stages.stages:
        assert stage.need_bytes + by_device.get(stage.device_id, 0) <= stage.memory_cap_bytes
    assert sum(by_device.values()) >= 2 * 400


def test_a_node_that_the_stages_cannot_reach_gets_no_experts() -> None:
    topology = Topology(devices=(device("a"), device("b")), default_link=None)

    plan = plan_shards(model(), topology, workload=WORKLOAD)

    assert plan.experts.device_ids == (plan.stages.stages[0].device_id,)
    assert plan.message_s == 0.0


def test_few_rows_are_balanced_by_the_weights_they_read() -> None:
    slow_memory = [device(name, memory_bytes_per_s=10.0, flops_per_s=1e9) for name in "ab"]

    plan = plan_shards(model(), Topology(devices=tuple(slow_memory)), workload=WORKLOAD)

    assert plan.experts.objective == "activated"


def test_a_hot_expert_gets_more_of_the_fast_device() -> None:
    load = np.ones((2, 8))
    load[0, 3] = 20.0
    topology = Topology(devices=(device("a"), device("b", flops_per_s=4e3)))

    plan = plan_shards(model(), topology, workload=WORKLOAD, expert_load=load)

    shares = {h.device_id: h.share for h in plan.experts.holdings(0)[3]}
    assert shares.get("b", 0.0) > 0.5
    assert plan.experts.layers[0].gap == pytest.approx(0.0, abs=1e-3)


def test_bad_input_is_refused_with_the_number() -> None:
    topology = Topology(devices=(device("a"),))
    dense = LayerCost(flops_per_token=1, weight_bytes=10)
    with pytest.raises(ValueError, match="m has no routed experts"):
        plan_shards(model(dense), topology, workload=WORKLOAD)
    with pytest.raises(ValueError, match=r"shape \(1, 8\); the model needs \(2, 8\)"):
        plan_shards(model(), topology, workload=WORKLOAD, expert_load=np.ones((1, 8)))
    with pytest.raises(ValueError, match="above 0 in every layer"):
        plan_shards(model(), topology, workload=WORKLOAD, expert_load=np.zeros((2, 8)))
    small = Topology(devices=(device("a", memory_bytes=700),))
    with pytest.raises(InfeasiblePlanError, match="none of 1 devices holds an expert"):
        plan_shards(model(), small, workload=WORKLOAD)


def test_a_plan_survives_json() -> None:
    plan = plan_shards(model(), Topology(devices=(device("a"), device("b"))), workload=WORKLOAD)

    assert ShardsPlan.from_json(plan.to_json()) == plan
    assert layer_step_s(device("a"), without_experts(model()).layers[0], 4, 4) > 0


def test_the_order_of_the_devices_does_not_change_the_plan() -> None:
    speeds = {"a": 1e3, "b": 4e3, "c": 2e3, "d": 4e3}
    devices = tuple(device(name, flops_per_s=speed) for name, speed in speeds.items())

    plans = [
        plan_shards(model(), Topology(devices=order), workload=WORKLOAD)
        for order in (devices, devices[::-1], devices[2:] + devices[:2])
    ]

    assert plans[0] == plans[1] == plans[2]


def test_what_was_measured_of_a_layer_slows_its_experts_and_its_dense_part_alike() -> None:
    plain = device("a")
    whole_s = layer_step_s(plain, SPARSE, 4, 4)
    sample = LayerSample(tokens=4, context_tokens=4, forward_s=7 * whole_s)
    slow = device("a", measured_layers=(MeasuredLayer(layer=SPARSE, samples=(sample,)),))

    fast_plan, slow_plan = (
        plan_shards(model(), Topology(devices=(each,)), workload=WORKLOAD) for each in (plain, slow)
    )

    assert slow_plan.experts.bottleneck_s == pytest.approx(7 * fast_plan.experts.bottleneck_s)
    assert slow_plan.stages.latency_s == pytest.approx(7 * fast_plan.stages.latency_s, rel=1e-3)


def test_a_forced_cut_holds_for_the_dense_part_too() -> None:
    topology = Topology(devices=(device("a"), device("b", flops_per_s=9e3)))

    plan = plan_shards(
        model(), topology, workload=WORKLOAD, layer_counts=[1, 1], device_order="given"
    )

    assert [stage.device_id for stage in plan.stages.stages] == ["a", "b"]


def test_a_shard_without_a_stage_keeps_room_for_the_rows_it_gets() -> None:
    # Room for two experts of each layer if nothing else were held: 220 bytes at the cap.
    tight = device("b", memory_bytes=250)

    plan = plan_shards(model(), Topology(devices=(device("a"), tight)), workload=WORKLOAD)

    assert plan.experts.device_ids == ("a",)
