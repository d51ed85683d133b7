from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_cases import (
    CLOSE,
    Case,
    assert_plan_holds,
    cases,
    every_cut,
    is_close,
    large_case,
)

from placement.errors import InfeasiblePlanError
from placement.stages import StagesPlan, plan_stages
from placement.topology import Device, Link, LinkRate, Topology
from placement.workload import DeviceOrder, LayerCost, ModelProfile, Objective, ServingWorkload

OBJECTIVES: tuple[Objective, ...] = ("throughput", "latency", "energy")
WORKLOAD = ServingWorkload(
    lanes=50, sequences_per_lane=1, context_tokens_per_sequence=1, kv_tokens=1, step_tokens=1
)


def model(num_layers: int, *, embedding_bytes: int = 1, head_bytes: int = 1) -> ModelProfile:
    return ModelProfile(
        name="toy",
        embedding=LayerCost(flops_per_token=0, weight_bytes=embedding_bytes),
        layers=(LayerCost(flops_per_token=1.0, weight_bytes=1000),) * num_layers,
        head=LayerCost(flops_per_token=1.0, weight_bytes=head_bytes),
        hidden_bytes_per_token=1,
    )


def device(device_id: str, speed: float, memory_bytes: int = 10**9, node: str = "n") -> Device:
    return Device(
        id=device_id,
        node=node,
        kind="paced",
        flops_per_s=1e12,
        memory_bytes_per_s=speed,
        memory_bytes=memory_bytes,
        active_power_w=10.0,
    )


def plan_case(
    case: Case, objective: Objective = "throughput", device_order: DeviceOrder = "free"
) -> StagesPlan:
    return plan_stages(
        case.profile,
        case.topology,
        workload=case.workload,
        headroom_fraction=case.headroom_fraction,
        objective=objective,
        device_order=device_order,
    )


def case_of(devices: Sequence[Device], profile: ModelProfile) -> Case:
    return Case(profile, Topology(devices=tuple(devices)), WORKLOAD, 0.1)


def test_the_device_with_room_for_the_embedding_comes_first() -> None:
    devices = (device("small", 1000.0, 2500), device("roomy", 1000.0, 10_000))
    case = case_of(devices, model(2, embedding_bytes=5000))

    plan = plan_case(case)

    assert [stage.device_id for stage in plan.stages] == ["roomy", "small"]
    assert len(plan_case(case, device_order="given").stages) == 1


def test_a_slow_link_is_crossed_once() -> None:
    devices = [device(f"{node}{i}", 1000.0, 1200, node) for i in range(2) for node in "xy"]
    link = Link(source_node="x", target_node="y", bandwidth_bytes_per_s=1e3, latency_s=1.0)
    case = case_of(devices, model(4))
    case = replace(case, topology=replace(case.topology, links=(link,)))

    plan = plan_case(case, "latency")

    assert [stage.node for stage in plan.stages] in (["x", "x", "y", "y"], ["y", "y", "x", "x"])
    assert plan.latency_s < plan_case(case, "latency", "given").latency_s - 1.9
    assert plan.is_exact
    assert plan.gap == 0.0


def test_an_order_is_found_through_the_only_links_there_are() -> None:
    devices = [device(node, 1000.0, 1200, node) for node in "abcd"]
    links = tuple(
        Link(source_node=a, target_node=b, bandwidth_bytes_per_s=1e6, latency_s=0.0)
        for a, b in ("ca", "ad", "db")
    )
    case = case_of(devices, model(4))
    case = replace(case, topology=replace(case.topology, links=links, default_link=None))

    for objective in OBJECTIVES:
        plan = plan_case(case, objective)
        assert [stage.node for stage in plan.stages] in (list("cadb"), list("bdac"))
    with pytest.raises(InfeasiblePlanError, match="no cut in their order fits"):
        plan_case(case, device_order="given")


def test_alike_devices_are_searched_exactly_however_many() -> None:
    devices = [device(f"x{i:02}", 1000.0, node="x") for i in range(20)]
    devices += [device(f"y{i:02}", 500.0, node="y") for i in range(20)]

    plan = plan_case(case_of(devices, model(60)))

    assert plan.is_exact
    assert plan.period_s == pytest.approx(2.0, rel=0.01)
    assert [stage.device_id for stage in plan.stages if stage.node == "x"] == [
        f"x{i:02}" for i in range(20)
    ]


def test_what_fits_in_no_order_is_refused_and_says_whether_that_is_proven() -> None:
    few = case_of([device(f"d{i}", 1.0 + i, 1500) for i in range(3)], model(4))
    apart = [device(f"d{i:02}", 1.0 + i, 1500, f"n{i:02}") for i in range(20)]
    many = case_of(apart, model(4))
    alone = replace(many, topology=replace(many.topology, default_link=None))
    # Pairs of nodes, where a cut needs four.
    links = tuple(
        Link(
            source_node=f"n{i:02}",
            target_node=f"n{i + 1:02}",
            bandwidth_bytes_per_s=1e6,
            latency_s=0.0,
        )
        for i in range(0, 20, 2)
    )
    pairs = replace(alone, topology=replace(alone.topology, links=links))

    with pytest.raises(InfeasiblePlanError, match="no cut in any order fits"):
        plan_case(few)
    with pytest.raises(InfeasiblePlanError, match="no cut in any order fits"):
        plan_case(alone)
    with pytest.raises(InfeasiblePlanError, match="no cut was found in any order"):
        plan_case(pairs)


@settings(max_examples=1000, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_no_cut_in_any_order_beats_the_plan(case: Case, random: Random) -> None:
    cuts = every_cut(case, case.in_any_order())
    shuffled = list(case.devices)
    random.shuffle(shuffled)
    other = replace(case, topology=replace(case.topology, devices=tuple(shuffled)))
    for objective in OBJECTIVES if case.has_energy else OBJECTIVES[:2]:
        try:
            plan = plan_case(case, objective)
        except InfeasiblePlanError:
            assert not cuts
            continue
        values = [
            {"throughput": cut.period_s, "latency": cut.latency_s, "energy": cut.energy_j}[
                objective
            ]
            for cut in cuts
        ]
        best = min(values)
        assert is_close(plan.objective_value, best)
        tied = [cut for cut, value in zip(cuts, values, strict=True) if is_close(value, best)]
        fewest = min(cut.num_stages for cut in tied)
        assert len(plan.stages) == fewest
        quickest_s = min(cut.latency_s for cut in tied if cut.num_stages == fewest)
        assert is_close(plan.latency_s, quickest_s)
        assert plan.is_exact
        assert plan.gap == 0.0
        assert plan.lower_bound_s <= plan.bottleneck_s
        assert_plan_holds(plan, case)
        # The order that the devices came in makes no difference.
        assert plan_case(other, objective) == plan
        text = json.dumps(plan.to_json(), allow_nan=False)
        assert StagesPlan.from_json(json.loads(text)) == plan


SIXTEEN = large_case(16, 4, lanes=4, memory_bytes=40e9)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_dozen_different_devices_are_searched_exactly(objective: Objective) -> None:
    case = replace(SIXTEEN, topology=replace(SIXTEEN.topology, devices=SIXTEEN.devices[:12]))

    plan = plan_case(case, objective)

    assert plan.is_exact
    assert plan.gap == 0.0
    assert plan.objective_value <= plan_case(case, objective, "given").objective_value * (1 + CLOSE)
    assert_plan_holds(plan, case)


@pytest.mark.parametrize(
    ("case", "gap"),
    [
        (SIXTEEN, 0.06),
        (large_case(16, 16, lanes=16, memory_bytes=40e9), 0.1),
        (large_case(512, 64, lanes=64, memory_bytes=12e9), 0.5),
    ],
    ids=["16", "16-apart", "512"],
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_large_plan_is_within_its_certificate(
    case: Case, gap: float, objective: Objective
) -> None:
    plan = plan_case(case, objective)
    turned = replace(case, topology=replace(case.topology, devices=case.devices[::-1]))

    assert 0.0 <= plan.gap < gap
    assert_plan_holds(plan, case)
    assert plan_case(turned, objective) == plan


def test_an_unfound_improvement_is_not_called_impossible() -> None:
    plan = plan_case(SIXTEEN)

    assert not plan.is_exact
    assert any("no cut was found in which it brings" in reason for _, reason in plan.left_out)


def test_devices_outside_the_pool_are_used_where_it_is_too_small() -> None:
    devices = [device(f"d{i:03}", 1.0 + i, 1500, f"n{i % 5}") for i in range(135)]

    plan = plan_case(case_of(devices, model(130)), "latency")

    # Each holds one layer; the slowest five stay out.
    assert [device_id for device_id, _ in plan.left_out] == [f"d{i:03}" for i in range(5)]


def test_few_links_among_many_nodes_still_give_a_plan() -> None:
    apart = [device(f"d{i:02}", 1.0 + i, 1500, f"n{i:02}") for i in range(20)]
    links = tuple(
        Link(
            source_node=f"n{i:02}",
            target_node=f"n{i + 1:02}",
            bandwidth_bytes_per_s=1e6,
            latency_s=0.1 * i,
        )
        for i in range(19)
    )
    case = case_of(apart, model(4))
    case = replace(case, topology=replace(case.topology, links=links, default_link=None))

    plan = plan_case(case)

    assert_plan_holds(plan, case)
    assert [stage.node for stage in plan.stages] in (
        ["n16", "n17", "n18", "n19"],
        ["n19", "n18", "n17", "n16"],
    )
    slow = LinkRate(bandwidth_bytes_per_s=1.0, latency_s=9.0)
    joined = replace(case, topology=replace(case.topology, default_link=slow))
    assert plan_case(joined).period_s <= plan.period_s * (1 + CLOSE)
