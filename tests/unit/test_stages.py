from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.costs import (
    stage_activation_bytes,
    stage_kv_bytes,
    stage_step_s,
    stage_weight_bytes,
)
from placement.errors import InfeasiblePlanError
from placement.stages import StagesPlan, plan_stages
from placement.topology import Device, Link, Topology
from placement.workload import LayerCost, ModelProfile, ServingWorkload

WORKLOAD = ServingWorkload(
    lanes=2, sequences_per_lane=1, context_tokens_per_sequence=1, kv_tokens=10, step_tokens=1
)


def layer(weight_bytes: int = 1000, kv_bytes_per_token: int = 1) -> LayerCost:
    return LayerCost(
        flops_per_token=1.0, weight_bytes=weight_bytes, kv_bytes_per_token=kv_bytes_per_token
    )


def model(layers: Sequence[LayerCost], head_bytes: int = 1) -> ModelProfile:
    return ModelProfile(
        name="toy",
        embedding=LayerCost(flops_per_token=0, weight_bytes=1),
        layers=tuple(layers),
        head=LayerCost(flops_per_token=1.0, weight_bytes=head_bytes),
        hidden_bytes_per_token=1,
    )


def device(device_id: str, speed: float, memory_bytes: int = 10**9, node: str = "n") -> Device:
    """A device that reads `speed` bytes per second and is never bound by compute."""
    return Device(
        id=device_id,
        node=node,
        kind="paced",
        flops_per_s=1e12,
        memory_bytes_per_s=speed,
        memory_bytes=memory_bytes,
    )


def counts_of(plan: StagesPlan, devices: Sequence[Device]) -> list[int]:
    by_device = {stage.device_id: stage.num_layers for stage in plan.stages}
    return [by_device.get(device.id, 0) for device in devices]


def test_layers_are_shared_out_by_speed() -> None:
    devices = (device("a", 5000.0), device("b", 2000.0), device("c", 1000.0))

    plan = plan_stages(model([layer()] * 8), Topology(devices=devices), workload=WORKLOAD)

    assert counts_of(plan, devices) == [5, 2, 1]
    assert [(s.index, s.first_layer, s.end_layer) for s in plan.stages] == [
        (0, 0, 5),
        (1, 5, 7),
        (2, 7, 8),
    ]
    assert plan.bottleneck_s == pytest.approx(1.0, rel=0.01)
    assert plan.lower_bound_s == pytest.approx(1.0, rel=0.01)
    assert plan.left_out == ()
    assert max(stage.share_of_bottleneck for stage in plan.stages) == 1.0


def test_a_heavy_head_moves_layers_off_the_last_device() -> None:
    devices = (device("a", 1000.0), device("b", 1000.0))

    plan = plan_stages(
        model([layer()] * 6, head_bytes=2000), Topology(devices=devices), workload=WORKLOAD
    )

    assert counts_of(plan, devices) == [4, 2]


def test_memory_overrules_speed_and_the_headroom_counts() -> None:
    fast = device("fast", 9000.0, memory_bytes=2100)
    slow = device("slow", 1000.0)
    profile = model([layer()] * 4)

    tight = plan_stages(profile, Topology(devices=(fast, slow)), workload=WORKLOAD)
    loose = plan_stages(
        profile, Topology(devices=(fast, slow)), workload=WORKLOAD, headroom_fraction=0.0
    )

    assert counts_of(tight, (fast, slow)) == [1, 3]
    assert counts_of(loose, (fast, slow)) == [2, 2]


def test_a_device_that_holds_no_layer_is_left_out_with_its_bytes() -> None:
    devices = (device("a", 1000.0), device("tiny", 1e6, memory_bytes=500))

    plan = plan_stages(model([layer()] * 2), Topology(devices=devices), workload=WORKLOAD)

    [(device_id, reason)] = plan.left_out
    assert device_id == "tiny"
    assert "450 bytes after headroom hold no layer" in reason
    assert plan.lower_bound_s == pytest.approx(plan.bottleneck_s)


def test_a_slow_device_is_left_out_with_its_time() -> None:
    devices = (device("a", 1000.0), device("slow", 1.0))

    plan = plan_stages(model([layer()] * 3), Topology(devices=devices), workload=WORKLOAD)

    assert counts_of(plan, devices) == [3, 0]
    [(_, reason)] = plan.left_out
    assert reason.startswith("one layer takes 1e+06 ms there; the slowest stage takes 3e+03 ms")


def test_a_device_that_would_not_help_is_left_out() -> None:
    devices = (device("a", 1000.0), device("b", 1000.0), device("c", 1000.0))

    plan = plan_stages(model([layer(), layer(4000)]), Topology(devices=devices), workload=WORKLOAD)

    # The heavy layer alone sets the bottleneck, so the third device has nothing to win.
    assert len(plan.stages) == 2
    [(_, reason)] = plan.left_out
    assert "would not make the slowest stage faster" in reason


def test_among_equal_cuts_the_lexicographically_smallest_wins() -> None:
    devices = tuple(device(name, 1000.0) for name in "abc")
    profile = model([layer(4000), layer(), layer(), layer()])

    plan = plan_stages(profile, Topology(devices=devices), workload=WORKLOAD)

    # [1, 3, 0] and [1, 0, 3] cost the same.
    assert counts_of(plan, devices) == [0, 1, 3]


def test_latency_adds_the_links_and_throughput_follows_the_bottleneck_or_the_lanes() -> None:
    near, far = device("near", 1000.0, node="x"), device("far", 1000.0, node="y")
    link = Link(source_node="x", target_node="y", bandwidth_bytes_per_s=10.0, latency_s=5.0)
    topology = Topology(devices=(near, far), links=(link,))

    plan = plan_stages(model([layer()] * 2), topology, workload=WORKLOAD)

    assert plan.latency_s == pytest.approx(sum(s.step_s for s in plan.stages) + 5.0 + 1 / 10.0)
    # Two lanes cannot hide a link that takes longer than the steps.
    assert plan.predicted_tokens_per_s == pytest.approx(2 / plan.latency_s)
    lanes = ServingWorkload(
        lanes=50, sequences_per_lane=3, context_tokens_per_sequence=1, kv_tokens=1, step_tokens=3
    )
    busy = plan_stages(model([layer()] * 2), topology, workload=lanes)
    assert busy.predicted_tokens_per_s == pytest.approx(3 / busy.bottleneck_s)


def test_too_little_memory_states_need_offer_and_knobs() -> None:
    topology = Topology(devices=(device("a", 1.0, 1000), device("b", 1.0, 1000)))

    with pytest.raises(InfeasiblePlanError) as caught:
        plan_stages(model([layer()] * 4), topology, workload=WORKLOAD)

    message = str(caught.value)
    assert "4 layers need 4042 bytes (4002 of weights, 40 of KV for 10 tokens)" in message
    assert "2 devices offer 1800 bytes (900, 900) after a headroom of 10%" in message
    assert "headroom_fraction" in message
    assert "kv_tokens" in message


def test_kv_capacity_is_what_the_tightest_stage_can_take() -> None:
    devices = (device("a", 1000.0, 5000), device("b", 1000.0, 2000))
    profile = model([layer()] * 2)

    plan = plan_stages(profile, Topology(devices=devices), workload=WORKLOAD, headroom_fraction=0.0)

    fixed = stage_weight_bytes(profile, 1, 2) + stage_activation_bytes(
        profile, 1, 2, step_tokens=1, head_tokens=1
    )
    assert plan.kv_tokens_capacity == 2000 - fixed


def test_a_model_without_kv_gets_the_capacity_it_asked_for() -> None:
    plan = plan_stages(
        model([layer(kv_bytes_per_token=0)]),
        Topology(devices=(device("a", 1.0),)),
        workload=WORKLOAD,
    )

    assert plan.kv_tokens_capacity == WORKLOAD.kv_tokens


def test_a_forced_cut_is_taken_as_it_is() -> None:
    devices = (device("a", 9000.0), device("b", 1.0), device("c", 1000.0))

    plan = plan_stages(
        model([layer()] * 4),
        Topology(devices=devices),
        workload=WORKLOAD,
        layer_counts=[1, 0, 3],
    )

    assert counts_of(plan, devices) == [1, 0, 3]
    assert plan.left_out == (("b", "layer_counts gives it 0 layers"),)
    assert plan.lower_bound_s < plan.bottleneck_s


def test_a_forced_cut_over_a_cap_is_refused_with_its_bytes() -> None:
    devices = (device("a", 1.0, 1500), device("b", 1.0))

    with pytest.raises(InfeasiblePlanError, match=r"layers \[0, 2\) on a, .* offers 1350 after"):
        plan_stages(
            model([layer()] * 2), Topology(devices=devices), workload=WORKLOAD, layer_counts=[2, 0]
        )


@pytest.mark.parametrize(
    ("layer_counts", "message"),
    [
        ([2], "1 entries for 2 devices"),
        ([3, -1], "0 or more each"),
        ([1, 2], "sum to the model's 2 layers .they sum to 3."),
    ],
)
def test_a_malformed_forced_cut_is_refused(layer_counts: list[int], message: str) -> None:
    topology = Topology(devices=(device("a", 1.0), device("b", 1.0)))

    with pytest.raises(ValueError, match=message):
        plan_stages(model([layer()] * 2), topology, workload=WORKLOAD, layer_counts=layer_counts)


@pytest.mark.parametrize("headroom", [-0.1, 1.0, math.nan])
def test_an_impossible_headroom_is_refused(headroom: float) -> None:
    with pytest.raises(ValueError, match="headroom_fraction"):
        plan_stages(
            model([layer()]),
            Topology(devices=(device("a", 1.0),)),
            workload=WORKLOAD,
            headroom_fraction=headroom,
        )


layers_strategy = st.lists(
    st.builds(
        LayerCost,
        flops_per_token=st.sampled_from([10.0, 500.0]),
        weight_bytes=st.integers(100, 400),
        kv_bytes_per_token=st.integers(0, 3),
    ),
    min_size=1,
    max_size=5,
)
devices_strategy = st.lists(
    st.tuples(
        st.sampled_from([100.0, 200.0, 1000.0]),
        st.sampled_from([100.0, 300.0, 1000.0]),
        st.integers(300, 2500),
    ),
    min_size=1,
    max_size=4,
)


def brute_force(
    profile: ModelProfile, devices: Sequence[Device], headroom_fraction: float
) -> tuple[float, int] | None:
    """The least (bottleneck, number of devices) over every way to share out the layers."""
    best: tuple[float, int] | None = None
    for counts in itertools.product(range(profile.num_layers + 1), repeat=len(devices)):
        if sum(counts) != profile.num_layers:
            continue
        steps, first, fits = [], 0, True
        for each, count in zip(devices, counts, strict=True):
            if count:
                end = first + count
                need = (
                    stage_weight_bytes(profile, first, end)
                    + stage_kv_bytes(profile, first, end, WORKLOAD.kv_tokens)
                    + stage_activation_bytes(profile, first, end, step_tokens=1, head_tokens=1)
                )
                fits = fits and need <= int(each.memory_bytes * (1 - headroom_fraction))
                steps.append(stage_step_s(each, profile, first, end, tokens=1, context_tokens=1))
                first = end
        # Rounded so that sums in another order count as ties.
        key = (round(max(steps), 9), len(steps))
        if fits and (best is None or key < best):
            best = key
    return best


@settings(max_examples=150, deadline=None)
@given(layers_strategy, devices_strategy, st.sampled_from([0.0, 0.1, 0.5]))
def test_no_cut_beats_the_plan(
    layers: list[LayerCost], figures: list[tuple[float, float, int]], headroom: float
) -> None:
    profile = model(layers, head_bytes=150)
    devices = tuple(
        Device(
            id=f"d{i}",
            node="n",
            kind="paced",
            flops_per_s=flops,
            memory_bytes_per_s=rate,
            memory_bytes=memory,
        )
        for i, (flops, rate, memory) in enumerate(figures)
    )
    best = brute_force(profile, devices, headroom)
    topology = Topology(devices=devices)
    if best is None:
        with pytest.raises(InfeasiblePlanError):
            plan_stages(profile, topology, workload=WORKLOAD, headroom_fraction=headroom)
        return

    plan = plan_stages(profile, topology, workload=WORKLOAD, headroom_fraction=headroom)

    assert (round(plan.bottleneck_s, 9), len(plan.stages)) == best
    assert plan.lower_bound_s <= plan.bottleneck_s
    assert_plan_holds(plan, profile, devices, headroom)
    again = plan_stages(profile, topology, workload=WORKLOAD, headroom_fraction=headroom)
    assert again == plan
    assert StagesPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def assert_plan_holds(
    plan: StagesPlan, profile: ModelProfile, devices: Sequence[Device], headroom: float
) -> None:
    """Each layer once and in order, no cap exceeded, everyone in a stage or left out."""
    by_id = {device.id: device for device in devices}
    edges = [0, *(stage.end_layer for stage in plan.stages)]
    assert [stage.first_layer for stage in plan.stages] == edges[:-1]
    assert edges[-1] == profile.num_layers
    for stage in plan.stages:
        activations = stage_activation_bytes(
            profile, stage.first_layer, stage.end_layer, step_tokens=1, head_tokens=1
        )
        cap = by_id[stage.device_id].memory_bytes * (1 - headroom)
        assert stage.weight_bytes + stage.kv_bytes + activations <= cap
    used = [stage.device_id for stage in plan.stages]
    assert sorted(used + [device_id for device_id, _ in plan.left_out]) == sorted(by_id)
    assert plan.kv_tokens_capacity >= WORKLOAD.kv_tokens


@settings(max_examples=60, deadline=None)
@given(layers_strategy, devices_strategy)
def test_the_lower_bound_holds_for_every_order_of_the_devices(
    layers: list[LayerCost], figures: list[tuple[float, float, int]]
) -> None:
    profile = model(layers)
    devices = [
        Device(
            id=f"d{i}",
            node="n",
            kind="cpu",
            flops_per_s=flops,
            memory_bytes_per_s=rate,
            memory_bytes=10**9,
        )
        for i, (flops, rate, _) in enumerate(figures)
    ]
    bounds, bottlenecks = [], []
    for order in itertools.permutations(devices):
        plan = plan_stages(profile, Topology(devices=tuple(order)), workload=WORKLOAD)
        bounds.append(plan.lower_bound_s)
        bottlenecks.append(plan.bottleneck_s)

    assert max(bounds) <= min(bottlenecks) * (1 + 1e-9)
