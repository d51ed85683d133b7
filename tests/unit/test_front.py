from __future__ import annotations

import json
from collections.abc import Sequence

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
)

from placement.errors import InfeasiblePlanError
from placement.front import StageFront, plan_front
from placement.stages import plan_stages
from placement.topology import Device, Topology
from placement.workload import DeviceOrder, LayerCost, ModelProfile, Objective, ServingWorkload

Point = tuple[float, ...]


def front_of(case: Case, device_order: DeviceOrder = "given") -> StageFront:
    return plan_front(
        case.profile,
        case.topology,
        workload=case.workload,
        headroom_fraction=case.headroom_fraction,
        device_order=device_order,
    )


def points_of(front: StageFront) -> list[Point]:
    return [tuple(getattr(plan, axis) for axis in front.axes) for plan in front.plans]


def case_of(devices: Sequence[Device], num_layers: int, lanes: int) -> Case:
    profile = ModelProfile(
        name="toy",
        embedding=LayerCost(flops_per_token=0, weight_bytes=1),
        layers=(LayerCost(flops_per_token=1.0, weight_bytes=1000),) * num_layers,
        head=LayerCost(flops_per_token=1.0, weight_bytes=1),
        hidden_bytes_per_token=1,
    )
    workload = ServingWorkload(
        lanes=lanes,
        sequences_per_lane=1,
        context_tokens_per_sequence=1,
        kv_tokens=1,
        step_tokens=1,
    )
    return Case(profile, Topology(devices=tuple(devices)), workload, 0.1)


def device(device_id: str, speed: float, watts: float | None = None) -> Device:
    return Device(
        id=device_id,
        node=device_id,
        kind="paced",
        flops_per_s=1e12,
        memory_bytes_per_s=speed,
        memory_bytes=10**9,
        active_power_w=watts,
    )


def test_latency_is_traded_for_throughput_and_energy() -> None:
    case = case_of([device("a", 3000.0, 90.0), device("b", 1000.0, 10.0)], 4, lanes=50)

    front = front_of(case)

    assert front.axes == ("period_s", "latency_s", "energy_j_per_token")
    # Each layer moved to b saves 20 J and costs 0.67 s of latency; one moved shortens the period.
    shares = [[stage.num_layers for stage in plan.stages] for plan in front.plans]
    assert shares == [[4], [3, 1], [2, 2], [1, 3], [4]]
    assert [plan.stages[0].device_id for plan in front.plans] == ["a", "a", "a", "a", "b"]
    assert front.epsilon == 0.0
    assert front.plans[0].left_out == (("b", "this plan of the front does without it"),)


def test_without_the_power_of_every_device_energy_is_no_axis() -> None:
    case = case_of([device("a", 3000.0, 90.0), device("b", 1000.0)], 4, lanes=50)

    front = front_of(case)

    assert front.axes == ("period_s", "latency_s")
    assert [[stage.num_layers for stage in plan.stages] for plan in front.plans] == [[4], [3, 1]]


def test_one_lane_leaves_nothing_to_trade() -> None:
    # With one lane the period is the latency.
    front = front_of(case_of([device("a", 3000.0), device("b", 1000.0)], 4, lanes=1))

    assert len(front.plans) == 1


def test_an_infeasible_question_has_no_front() -> None:
    tight = case_of([device("a", 1.0)], 4, lanes=1)
    heavy = ServingWorkload(
        lanes=1,
        sequences_per_lane=1,
        context_tokens_per_sequence=1,
        kv_tokens=1,
        step_tokens=10**9,
    )

    with pytest.raises(InfeasiblePlanError, match="no cut in their order fits"):
        plan_front(tight.profile, tight.topology, workload=heavy)


def undominated(points: Sequence[Point]) -> list[Point]:
    """Points that none beats, by pairwise comparison; figures that are close count as equal."""

    def beats(other: Point, point: Point) -> bool:
        return all(a <= b * (1 + CLOSE) for a, b in zip(other, point, strict=True)) and any(
            a < b * (1 - CLOSE) for a, b in zip(other, point, strict=True)
        )

    rounded = sorted({tuple(float(f"{value:.9g}") for value in point) for point in points})
    return [point for point in rounded if not any(beats(other, point) for other in rounded)]


def axes_of(cut: CutFigures, front: StageFront) -> Point:
    return (cut.period_s, cut.latency_s, cut.energy_j)[: len(front.axes)]


def is_among(point: Point, points: Sequence[Point]) -> bool:
    return any(all(map(is_close, point, other)) for other in points)


@settings(max_examples=2000, deadline=None)
@given(cases())
def test_the_front_is_that_of_all_cuts(case: Case) -> None:
    assert_front(case, "given")


@settings(max_examples=500, deadline=None)
@given(cases())
def test_the_front_in_free_order_is_that_of_all_cuts_in_any_order(case: Case) -> None:
    assert_front(case, "free")


def assert_front(case: Case, device_order: DeviceOrder) -> None:
    orders = case.in_order() if device_order == "given" else case.in_any_order()
    cuts = every_cut(case, orders)
    try:
        front = front_of(case, device_order)
    except InfeasiblePlanError:
        assert not cuts
        return
    found = points_of(front)
    true = undominated([axes_of(cut, front) for cut in cuts])
    assert len(front.axes) == (3 if case.has_energy else 2)
    assert all(is_among(point, found) for point in true)
    assert all(is_among(point, true) for point in found)
    assert not any(is_among(point, found[:index]) for index, point in enumerate(found))
    assert front.epsilon == 0.0
    latencies_s = [plan.latency_s for plan in front.plans]
    assert latencies_s == sorted(latencies_s)
    for plan in front.plans:
        assert_plan_holds(plan, case)
    assert front_of(case, device_order) == front
    text = json.dumps(front.to_json(), allow_nan=False)
    assert StageFront.from_json(json.loads(text)) == front


@settings(max_examples=500, deadline=None)
@given(cases())
def test_with_few_labels_the_front_covers_all_cuts_within_its_epsilon(case: Case) -> None:
    cuts = every_cut(case, case.in_order())
    if not cuts:
        return

    front = plan_front(
        case.profile,
        case.topology,
        workload=case.workload,
        headroom_fraction=case.headroom_fraction,
        most_labels=60,
    )

    if front.epsilon is None:
        return
    slack = (1 + front.epsilon) * (1 + CLOSE)
    found = points_of(front)
    for cut in cuts:
        assert any(
            all(a <= b * slack for a, b in zip(point, axes_of(cut, front), strict=True))
            for point in found
        )


LARGE = large_case(16, 4, lanes=4, memory_bytes=40e9)


def test_a_large_front_is_exact_and_ends_at_the_best_plan_of_each_objective() -> None:
    front = front_of(LARGE)

    assert front.epsilon == 0.0
    objectives: tuple[Objective, ...] = ("throughput", "latency", "energy")
    for objective, axis in zip(objectives, front.axes, strict=True):
        plan = plan_stages(
            LARGE.profile, LARGE.topology, workload=LARGE.workload, objective=objective
        )
        best = min(getattr(each, axis) for each in front.plans)
        assert best == pytest.approx(plan.objective_value)


def test_a_front_with_too_many_labels_is_as_coarse_as_it_says() -> None:
    apart = large_case(16, 16, lanes=16, memory_bytes=40e9)
    exact = front_of(apart)

    coarse = plan_front(apart.profile, apart.topology, workload=apart.workload, most_labels=55_000)

    assert exact.epsilon == 0.0
    assert coarse.epsilon is not None
    assert 0.0 < coarse.epsilon <= 0.3
    assert len(undominated(points_of(coarse))) == len(coarse.plans) < len(exact.plans)
    for point in points_of(exact):
        assert any(
            all(a <= b * (1 + coarse.epsilon) for a, b in zip(other, point, strict=True))
            for other in points_of(coarse)
        )


def test_a_large_front_in_free_order_does_not_claim_to_be_complete() -> None:
    front = front_of(LARGE, "free")

    assert front.epsilon is None
    assert len(undominated(points_of(front))) == len(front.plans)
    for plan in front.plans:
        assert_plan_holds(plan, LARGE)
