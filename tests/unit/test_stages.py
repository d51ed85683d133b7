from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from stage_cases import (
    CLOSE,
    Case,
    CutFigures,
    assert_plan_holds,
    cases,
    every_cut,
    is_close,
    large_case,
    need_bytes,
)

from placement.costs import stage_activation_bytes, stage_weight_bytes
from placement.cutting.pricing import StagePrices
from placement.errors import InfeasiblePlanError
from placement.stages import (
    StagesPlan,
    best_single,
    plan_stages,
    split_verdict,
)
from placement.topology import Device, Link, Topology
from placement.workload import DeviceOrder, LayerCost, ModelProfile, Objective, ServingWorkload

OBJECTIVES: tuple[Objective, ...] = ("throughput", "latency", "energy")
# Enough lanes that no step waits for the one before.
WORKLOAD = ServingWorkload(
    lanes=50, sequences_per_lane=1, context_tokens_per_sequence=1, kv_tokens=10, step_tokens=1
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


def device(
    device_id: str,
    speed: float,
    memory_bytes: int = 10**9,
    node: str = "n",
    watts: float | None = None,
) -> Device:
    """A device that reads `speed` bytes per second and is never bound by compute."""
    return Device(
        id=device_id,
        node=node,
        kind="paced",
        flops_per_s=1e12,
        memory_bytes_per_s=speed,
        memory_bytes=memory_bytes,
        active_power_w=watts,
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
    fast = device("fast", 9000.0, memory_bytes=2300)
    slow = device("slow", 1000.0)
    profile = model([layer()] * 4)

    tight = plan_stages(
        profile, Topology(devices=(fast, slow)), workload=WORKLOAD, headroom_fraction=0.2
    )
    loose = plan_stages(profile, Topology(devices=(fast, slow)), workload=WORKLOAD)

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
    assert reason == "one layer takes 1e+06 ms there; the period of a step is 3e+03 ms without it"


def test_a_device_that_would_not_help_is_left_out() -> None:
    devices = (device("a", 1000.0), device("b", 1000.0), device("c", 1000.0))

    plan = plan_stages(model([layer(), layer(4000)]), Topology(devices=devices), workload=WORKLOAD)

    # The heavy layer alone sets the bottleneck, so the third device has nothing to win.
    assert len(plan.stages) == 2
    [(_, reason)] = plan.left_out
    assert reason == (
        "it would not improve the throughput: no cut with it in this order brings the period "
        "of a step below 4e+03 ms"
    )


def test_among_equal_cuts_the_lexicographically_smallest_wins() -> None:
    devices = tuple(device(name, 1000.0) for name in "abc")
    profile = model([layer(4000), layer(), layer(), layer()])

    plan = plan_stages(profile, Topology(devices=devices), workload=WORKLOAD)

    # [1, 3, 0] and [1, 0, 3] cost the same.
    assert counts_of(plan, devices) == [0, 1, 3]


def two_nodes(bandwidth: float, latency_s: float) -> Topology:
    """Two equal devices on nodes x and y, and what joins them."""
    return Topology(
        devices=(device("near", 1000.0, node="x"), device("far", 1000.0, node="y")),
        links=(
            Link(
                source_node="x",
                target_node="y",
                bandwidth_bytes_per_s=bandwidth,
                latency_s=latency_s,
            ),
        ),
    )


def lanes(count: int) -> ServingWorkload:
    return ServingWorkload(
        lanes=count, sequences_per_lane=1, context_tokens_per_sequence=1, kv_tokens=1, step_tokens=1
    )


def test_many_lanes_hide_a_links_latency_and_few_do_not() -> None:
    topology = two_nodes(bandwidth=10.0, latency_s=5.0)
    profile = model([layer()] * 2)

    many = plan_stages(profile, topology, workload=lanes(50))
    few = plan_stages(profile, topology, workload=lanes(2))
    forced = plan_stages(profile, topology, workload=lanes(2), layer_counts=[1, 1])

    assert counts_of(many, topology.devices) == [1, 1]
    assert many.latency_s == pytest.approx(sum(s.step_s for s in many.stages) + 5.0 + 1 / 10.0)
    assert many.predicted_tokens_per_s == pytest.approx(1 / many.bottleneck_s)
    # Two lanes wait 3.5 s for each other where one device takes 2 s.
    assert counts_of(few, topology.devices) == [0, 2]
    assert forced.period_s == pytest.approx(forced.latency_s / 2)
    assert forced.predicted_tokens_per_s == pytest.approx(2 / forced.latency_s)


def test_a_link_is_a_stage_of_its_own() -> None:
    topology = two_nodes(bandwidth=0.6, latency_s=0.0)

    plan = plan_stages(model([layer()] * 2), topology, workload=WORKLOAD)

    # One byte keeps the link busy for 1.67 s: longer than a stage, shorter than both in one.
    assert len(plan.stages) == 2
    assert plan.busiest_hop_s == plan.period_s == pytest.approx(1 / 0.6)
    assert [stage.hop_busy_s for stage in plan.stages] == [plan.busiest_hop_s, 0.0]
    slower = plan_stages(
        model([layer()] * 2), two_nodes(bandwidth=0.4, latency_s=0.0), workload=WORKLOAD
    )
    assert len(slower.stages) == 1


def test_each_objective_has_its_own_optimum() -> None:
    devices = (
        device("quick", 3000.0, node="x", watts=900.0),
        device("even", 2900.0, node="y", watts=700.0),
        device("frugal", 1000.0, node="y", watts=10.0),
    )
    topology = Topology(devices=devices)
    profile = model([layer()] * 6)
    plans = {
        objective: plan_stages(profile, topology, workload=WORKLOAD, objective=objective)
        for objective in OBJECTIVES
    }

    assert counts_of(plans["throughput"], devices) == [3, 2, 1]
    assert counts_of(plans["latency"], devices) == [6, 0, 0]
    assert counts_of(plans["energy"], devices) == [0, 0, 6]
    assert plans["energy"].objective_value == pytest.approx(60.0, rel=0.01)
    assert plans["energy"].energy_j_per_token == plans["energy"].objective_value
    assert plans["latency"].objective_value == plans["latency"].latency_s
    assert plans["energy"].left_out[0][1] == (
        "one layer costs 300 J a token there; the energy of a token is 60.1 J without it"
    )
    assert plans["latency"].left_out[0][1].startswith("it would not improve the latency: no cut")


def test_energy_needs_the_power_of_every_device() -> None:
    topology = Topology(devices=(device("a", 1.0, watts=5.0), device("b", 1.0), device("c", 1.0)))

    with pytest.raises(ValueError, match=r"active_power_w is not set for 2 of 3 devices \(b, c\)"):
        plan_stages(model([layer()]), topology, workload=WORKLOAD, objective="energy")
    plan = plan_stages(model([layer()]), topology, workload=WORKLOAD, layer_counts=[0, 0, 1])
    assert plan.energy_j_per_token is None


def test_experts_held_are_counted_over_the_layers() -> None:
    routed = LayerCost(
        flops_per_token=1.0,
        weight_bytes=1000,
        routed_bytes=900,
        num_experts=16,
        experts_per_token=2,
    )
    devices = (device("a", 1000.0), device("b", 1000.0))

    plan = plan_stages(
        model([layer(), routed, routed]), Topology(devices=devices), workload=WORKLOAD,
        layer_counts=[1, 2],
    )  # fmt: skip

    assert [stage.num_experts for stage in plan.stages] == [0, 32]


def test_devices_that_cannot_be_reached_are_left_out_with_their_node() -> None:
    devices = (device("a", 9000.0, node="x"), device("b", 9000.0, node="y"))
    topology = Topology(devices=devices, default_link=None)

    plan = plan_stages(model([layer()] * 2), topology, workload=WORKLOAD)

    assert plan.left_out == (
        (
            "a",
            "no link joins its node x to those in use (y); declare one in links, "
            "or set default_link",
        ),
    )


@pytest.mark.parametrize("device_order", ["given", "free"])
def test_memory_that_no_links_join_is_named(device_order: DeviceOrder) -> None:
    devices = tuple(device(name, 1.0, 2000, node=f"node-{name}") for name in "abc")
    link = Link(
        source_node="node-a", target_node="node-b", bandwidth_bytes_per_s=1e6, latency_s=0.0
    )
    topology = Topology(devices=devices, links=(link,), default_link=None)

    plan = plan_stages(model([layer()] * 2), topology, workload=WORKLOAD, device_order=device_order)
    with pytest.raises(InfeasiblePlanError) as caught:
        plan_stages(model([layer()] * 3), topology, workload=WORKLOAD, device_order=device_order)

    assert {stage.node for stage in plan.stages} == {"node-a", "node-b"}
    assert "4 of 9 node pairs are not linked (node-a to node-c, node-b to node-c" in str(
        caught.value
    )
    assert "set default_link" in str(caught.value)


def test_a_forced_cut_over_nodes_that_are_not_joined_is_refused() -> None:
    devices = (device("a", 1.0, node="x"), device("b", 1.0, node="y"))

    with pytest.raises(InfeasiblePlanError, match="no link leads from x to y"):
        plan_stages(
            model([layer()] * 2),
            Topology(devices=devices, default_link=None),
            workload=WORKLOAD,
            layer_counts=[1, 1],
        )


def test_the_best_single_device_and_the_verdict() -> None:
    devices = (device("slow", 1000.0), device("fast", 2000.0), device("tiny", 9000.0, 10))
    topology, profile = Topology(devices=devices), model([layer()] * 4)

    alone = best_single(profile, topology, workload=WORKLOAD)
    busy = plan_stages(profile, topology, workload=WORKLOAD)
    single = plan_stages(profile, topology, workload=lanes(1))

    assert alone is not None
    assert [(stage.device_id, stage.num_layers) for stage in alone.stages] == [("fast", 4)]
    assert {reason for _, reason in alone.left_out} == {"the plan is for one device alone"}
    assert len(busy.stages) == 2
    assert split_verdict(busy, alone).startswith(
        "split for throughput: 2 stages give 0.7 tokens/s and 2504.10 ms a step; fast alone gives "
        "0.5 tokens/s and 2003.00 ms a step. All lanes together get 1.33 times the tokens/s; a "
        "single stream is slower, 1.25 times as long a step"
    )
    assert len(single.stages) == 1
    assert split_verdict(single, alone).startswith("do not split: fast holds toy alone")
    assert split_verdict(single, alone).endswith("; no split improves the throughput")
    for layer_counts in ([3, 1, 0], [4, 0, 0]):
        forced = plan_stages(profile, topology, workload=WORKLOAD, layer_counts=layer_counts)
        verdict = split_verdict(forced, alone)
        assert verdict.startswith("do not split: fast alone gives 0.5 tokens/s")


def test_what_no_single_device_holds_must_be_split() -> None:
    topology = Topology(devices=(device("a", 1.0, 3000), device("b", 1.0, 3000)))
    profile = model([layer()] * 4)

    assert best_single(profile, topology, workload=WORKLOAD) is None
    plan = plan_stages(profile, topology, workload=WORKLOAD)
    assert split_verdict(plan, None).startswith("split: no device holds toy alone; 2 stages give")


def test_too_little_memory_states_need_offer_and_knobs() -> None:
    topology = Topology(devices=(device("a", 1.0, 1000), device("b", 1.0, 1000)))

    with pytest.raises(InfeasiblePlanError) as caught:
        plan_stages(model([layer()] * 4), topology, workload=WORKLOAD)

    message = str(caught.value)
    assert "4 layers need 4042 bytes (4002 of weights, 40 of KV for 10 tokens)" in message
    assert "2 devices offer 1800 bytes (900, 900) after a headroom of 10%" in message
    assert "The smallest stage needs" in message
    assert "headroom_fraction is at its least, 0.1" in message
    assert "kv_tokens" in message


def test_kv_capacity_is_what_the_tightest_stage_can_take() -> None:
    devices = (device("a", 1000.0, 5000), device("b", 1000.0, 2000))
    profile = model([layer()] * 2)

    plan = plan_stages(profile, Topology(devices=devices), workload=WORKLOAD)

    fixed = stage_weight_bytes(profile, 1, 2) + stage_activation_bytes(
        profile, 1, 2, step_tokens=1, head_tokens=1
    )
    assert plan.kv_tokens_capacity == 1800 - fixed


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


@pytest.mark.parametrize("headroom", [-0.1, 0.0, 0.09, 1.0, math.nan])
def test_an_impossible_headroom_is_refused(headroom: float) -> None:
    with pytest.raises(ValueError, match="headroom_fraction"):
        plan_stages(
            model([layer()]),
            Topology(devices=(device("a", 1.0),)),
            workload=WORKLOAD,
            headroom_fraction=headroom,
        )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"objective": "speed"}, "objective is 'speed'; use one of throughput, latency, energy"),
        ({"device_order": "any"}, "device_order is 'any'; use one of given, free"),
        (
            {"device_order": "free", "layer_counts": [1]},
            "layer_counts has a count per device in the order given",
        ),
    ],
)
def test_a_malformed_option_is_refused(option: dict[str, Any], message: str) -> None:
    topology = Topology(devices=(device("a", 1.0),))

    with pytest.raises(ValueError, match=message):
        plan_stages(model([layer()]), topology, workload=WORKLOAD, **option)


def test_a_model_beyond_any_memory_is_refused() -> None:
    heavy = layer(weight_bytes=2**62)

    with pytest.raises(ValueError, match=r"toy needs \d+ bytes .* lower kv_tokens \(10\)"):
        plan_stages(model([heavy]), Topology(devices=(device("a", 1.0),)), workload=WORKLOAD)


def test_many_devices_are_named_in_part() -> None:
    topology = Topology(devices=tuple(device(f"d{i}", 1.0, 10) for i in range(20)))

    with pytest.raises(InfeasiblePlanError, match=r"20 devices offer 180 bytes \(9, .* 12 more\)"):
        plan_stages(model([layer()]), topology, workload=WORKLOAD)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_prices_are_those_of_the_formulas(case: Case) -> None:
    prices = StagePrices(case.profile, case.topology, case.workload, case.headroom_fraction)
    for first in range(case.profile.num_layers):
        for end in range(first + 1, case.profile.num_layers + 1):
            assert prices.need_bytes[first, end] == need_bytes(case, first, end)
    assert prices.hop_bytes == (
        case.workload.sequences_per_lane * case.profile.hidden_bytes_per_token
    )


def value_of(cut: CutFigures, objective: Objective) -> float:
    return {
        "throughput": cut.period_s,
        "latency": cut.latency_s,
        "energy": cut.energy_j,
    }[objective]


def plan_case(
    case: Case, objective: Objective, device_order: DeviceOrder = "given"
) -> StagesPlan | None:
    try:
        return plan_stages(
            case.profile,
            case.topology,
            workload=case.workload,
            headroom_fraction=case.headroom_fraction,
            objective=objective,
            device_order=device_order,
        )
    except InfeasiblePlanError:
        return None


@settings(max_examples=2000, deadline=None)
@given(cases())
def test_no_cut_in_the_given_order_beats_the_plan(case: Case) -> None:
    cuts = every_cut(case, case.in_order())
    for objective in OBJECTIVES if case.has_energy else OBJECTIVES[:2]:
        plan = plan_case(case, objective)
        if plan is None:
            assert not cuts
        else:
            assert_best(plan, cuts, case)


def assert_best(plan: StagesPlan, cuts: Sequence[CutFigures], case: Case) -> None:
    """No cut is better, and of the equally good ones it is the one that the ties name."""
    best = min(value_of(cut, plan.objective) for cut in cuts)
    assert is_close(plan.objective_value, best)
    tied = [cut for cut in cuts if is_close(value_of(cut, plan.objective), best)]
    fewest = min(cut.num_stages for cut in tied)
    assert len(plan.stages) == fewest
    tied = [cut for cut in tied if cut.num_stages == fewest]
    quickest_s = min(cut.latency_s for cut in tied)
    assert is_close(plan.latency_s, quickest_s)
    tied = [cut for cut in tied if is_close(cut.latency_s, quickest_s)]
    assert counts_of(plan, case.devices) == list(min(cut.counts for cut in tied))
    assert plan.is_exact
    assert plan.objective_lower_bound <= plan.objective_value
    assert plan.lower_bound_s <= plan.bottleneck_s
    assert_plan_holds(plan, case)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_equal_questions_give_equal_plans_that_survive_json(case: Case) -> None:
    for objective in OBJECTIVES if case.has_energy else OBJECTIVES[:2]:
        plan = plan_case(case, objective)
        if plan is not None:
            assert plan_case(case, objective) == plan
            text = json.dumps(plan.to_json(), allow_nan=False)
            assert StagesPlan.from_json(json.loads(text)) == plan


@settings(max_examples=600, deadline=None)
@given(cases())
def test_the_bounds_hold_for_every_cut_in_any_order(case: Case) -> None:
    cuts = every_cut(case, case.in_any_order())
    for objective in OBJECTIVES if case.has_energy else OBJECTIVES[:2]:
        plan = plan_case(case, objective)
        if plan is None:
            continue
        best = min(value_of(cut, objective) for cut in cuts)
        assert plan.objective_lower_bound <= best * (1 + CLOSE)
        assert plan.lower_bound_s <= min(cut.bottleneck_s for cut in cuts) * (1 + CLOSE)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_the_best_single_device_is_the_best_of_all_that_hold_the_model(case: Case) -> None:
    single = every_cut(case, [(device,) for device in case.devices])
    for objective in OBJECTIVES if case.has_energy else OBJECTIVES[:2]:
        alone = best_single(
            case.profile,
            case.topology,
            workload=case.workload,
            headroom_fraction=case.headroom_fraction,
            objective=objective,
        )
        if alone is None:
            assert not single
            continue
        assert is_close(alone.objective_value, min(value_of(cut, objective) for cut in single))
        plan = plan_case(case, objective)
        assert plan is not None
        assert plan.objective_value <= alone.objective_value * (1 + CLOSE)


@pytest.mark.parametrize(
    "case",
    [
        large_case(16, 4, lanes=4, memory_bytes=40e9),
        large_case(16, 16, lanes=16, memory_bytes=40e9),
        large_case(512, 64, lanes=64, memory_bytes=12e9),
    ],
    ids=["16", "16-apart", "512"],
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_large_plan_is_within_its_certificate(case: Case, objective: Objective) -> None:
    plan = plan_case(case, objective)

    assert plan is not None
    assert plan.is_exact
    assert 0.0 <= plan.gap < 0.6
    assert_plan_holds(plan, case)
