from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from expert_vectors import (
    EPLB_VECTORS,
    UNEQUAL_VECTORS,
    V2,
    V3_OPTIMUM_ROWS,
    V4,
    V4_EPLB_EXACT_WEIGHTS_ROWS,
    V4_OPTIMUM_ROWS,
    V5_NO_REPLICA,
    EplbVector,
    UnequalVector,
    expert_devices,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from placement.errors import InfeasiblePlanError
from placement.experts import ExpertDevice, ExpertPlan, plan_experts, slots_from_memory

EXPERT_BYTES = 1000
ROUNDING = 1 + 1e-9


def device(device_id: str, speed: float = 1.0, slots: int = 4, node: str = "n") -> ExpertDevice:
    return ExpertDevice(
        id=device_id,
        node=node,
        rows_per_s=speed,
        slots_per_layer=slots,
        expert_read_s=1.0 / speed,
    )


def plan(load_rows: Any, devices: list[ExpertDevice], **settings: Any) -> ExpertPlan:
    return plan_experts(
        np.array(load_rows, dtype=np.float64), devices, expert_bytes=EXPERT_BYTES, **settings
    )


def check_is_sound(made: ExpertPlan, load_rows: np.ndarray, devices: list[ExpertDevice]) -> None:
    """Check what every plan promises, from its public values alone."""
    by_id = {one.id: one for one in devices}
    for layer, loads in zip(made.layers, load_rows, strict=True):
        assert set().union(*map(set, layer.experts)) == set(range(len(loads)))
        total = np.zeros(len(loads))
        for index, device_id in enumerate(made.device_ids):
            experts, shares = layer.experts[index], layer.shares[index]
            assert len(set(experts)) == len(experts) == len(shares)
            assert len(experts) <= by_id[device_id].slots_per_layer
            assert all(share >= 0 for share in shares)
            total[list(experts)] += shares
            seconds = sum(loads[list(experts)] * shares) / by_id[device_id].rows_per_s
            assert layer.device_s[index] == pytest.approx(seconds, rel=1e-9, abs=1e-12)
        assert total == pytest.approx(np.ones(len(loads)))
        assert layer.bottleneck_s == max(layer.device_s)
        assert layer.lower_bound_s <= layer.bottleneck_s
    assert made.bottleneck_s == pytest.approx(sum(layer.bottleneck_s for layer in made.layers))
    copies = [sum(len(layer.experts[i]) for layer in made.layers) for i in range(len(by_id))]
    assert list(made.device_bytes) == [count * EXPERT_BYTES for count in copies]


def integer_program_s(loads: list[float], devices: list[ExpertDevice]) -> float:
    """The optimum over placements and weights, from a solver that shares no code with ours."""
    num_experts, num_devices = len(loads), len(devices)
    # Variables: share[e, d], then held[e, d], then the finish.
    pairs = num_experts * num_devices
    shares, held = np.eye(pairs, 2 * pairs + 1), np.eye(pairs, 2 * pairs + 1, k=pairs)
    by_expert = np.repeat(np.eye(num_experts), num_devices, axis=1)
    by_device = np.tile(np.eye(num_devices), num_experts)
    rows = (by_device * np.repeat(loads, num_devices)) @ shares
    rows[:, -1] = [-one.rows_per_s for one in devices]
    cost = np.zeros(2 * pairs + 1)
    cost[-1] = 1.0
    upper = np.ones(2 * pairs + 1)
    upper[-1] = np.inf
    solved = milp(
        cost,
        constraints=[
            LinearConstraint(by_expert @ shares, 1, 1),
            LinearConstraint(rows, -np.inf, 0),
            LinearConstraint(by_device @ held, 0, [one.slots_per_layer for one in devices]),
            LinearConstraint(shares - held, -np.inf, 0),
        ],
        integrality=np.r_[np.zeros(pairs), np.ones(pairs), 0],
        bounds=Bounds(0, upper),
    )
    assert solved.success
    return float(solved.fun)


@st.composite
def device_lists(draw: st.DrawFn, num_experts: int, max_devices: int) -> list[ExpertDevice]:
    """Devices with slots for one copy of every expert, on one to three nodes."""
    num_devices = draw(st.integers(1, max_devices))
    devices = [
        device(
            f"d{index}",
            speed=draw(st.integers(1, 20)) / 4,
            slots=draw(st.integers(1, num_experts + 1)),
            node=f"n{draw(st.integers(0, 2))}",
        )
        for index in range(num_devices)
    ]
    assume(sum(one.slots_per_layer for one in devices) >= num_experts)
    return devices


@st.composite
def cases(
    draw: st.DrawFn, max_experts: int = 12, max_devices: int = 6
) -> tuple[np.ndarray, list[ExpertDevice]]:
    num_experts = draw(st.integers(1, max_experts))
    loads = st.lists(st.integers(0, 400), min_size=num_experts, max_size=num_experts)
    load_rows = draw(st.lists(loads, min_size=1, max_size=2))
    devices = draw(device_lists(num_experts, max_devices))
    return np.array(load_rows, dtype=np.float64), devices


# --- worked cases


def test_a_fast_device_takes_more_rows_and_finishes_with_the_slow_one() -> None:
    made = plan([[6, 3, 2, 1]], [device("fast", 3.0, 3), device("slow", 1.0, 1)])

    [layer] = made.layers
    assert layer.experts == ((0, 2, 3), (1,))
    assert layer.device_s == pytest.approx((3.0, 3.0))
    assert layer.gap == 0.0
    assert made.device_bytes == (3000, 1000)


def test_a_hot_expert_is_replicated_and_its_rows_follow_the_speeds() -> None:
    made = plan([[90, 10]], [device("a", 3.0, 2), device("b", 1.0, 2)])

    assert made.bottleneck_s == pytest.approx(25.0)
    hot = dict(made.holdings(0)[0])
    assert sorted(hot) == ["a", "b"]
    assert hot["a"] * 90 >= 65 - 1e-9


@pytest.mark.parametrize("vector", UNEQUAL_VECTORS, ids=lambda vector: vector.name)
def test_unequal_devices_reach_the_known_optimum(vector: UnequalVector) -> None:
    made = plan(vector.load_rows, vector.devices)

    assert made.lower_bound_s == pytest.approx(vector.bound_s, rel=1e-9)
    assert made.bottleneck_s == pytest.approx(vector.optimum_s, rel=1e-9)
    assert made.gap < 0.03


def test_two_hot_experts_are_split_down_to_the_mean() -> None:
    made = plan(V4.load_rows, expert_devices((1.0,) * 8, (2,) * 8))

    assert made.bottleneck_s == pytest.approx(V4_OPTIMUM_ROWS, rel=1e-9)


def test_two_slots_a_device_come_within_half_a_percent_of_the_integer_optimum() -> None:
    made = plan(V2.load_rows, expert_devices((1.0,) * 8, (2,) * 8))

    for layer, optimum in zip(made.layers, V3_OPTIMUM_ROWS, strict=True):
        assert layer.bottleneck_s <= 1.005 * optimum


@pytest.mark.parametrize("vector", EPLB_VECTORS, ids=lambda vector: vector.name)
def test_eplb_mode_costs_what_eplb_s_placement_costs(vector: EplbVector) -> None:
    devices = expert_devices((1.0,) * 8, (2,) * 8, num_nodes=vector.num_nodes)

    made = plan(vector.load_rows, devices, mode="eplb", num_groups=vector.num_groups)

    assert [layer.bottleneck_s for layer in made.layers] == pytest.approx(vector.bottleneck_rows)
    for layer, slots in zip(made.layers, vector.expert_of_slot, strict=True):
        pairs = [sorted(set(slots[first : first + 2])) for first in range(0, 16, 2)]
        assert [list(experts) for experts in layer.experts] == pairs
    best = plan(vector.load_rows, devices, num_groups=vector.num_groups)
    assert best.bottleneck_s < 0.95 * made.bottleneck_s


def test_an_eplb_plan_says_what_exact_weights_would_reach() -> None:
    made = plan(V4.load_rows, expert_devices((1.0,) * 8, (2,) * 8), mode="eplb")

    assert made.layers[0].bottleneck_s == pytest.approx(232.0)
    assert made.layers[0].weights_bound_s == pytest.approx(V4_EPLB_EXACT_WEIGHTS_ROWS)


def test_the_critical_devices_prove_the_weights_from_the_plan_alone() -> None:
    made = plan(V5_NO_REPLICA.load_rows, V5_NO_REPLICA.devices)

    [layer] = made.layers
    speeds = {one.id: one.rows_per_s for one in V5_NO_REPLICA.devices}
    alone = [
        load
        for load, held in zip(V5_NO_REPLICA.load_rows[0], made.holdings(0), strict=True)
        if {holding.device_id for holding in held} <= set(layer.critical_devices)
    ]
    bound_s = sum(alone) / sum(speeds[device_id] for device_id in layer.critical_devices)
    assert bound_s == pytest.approx(layer.bottleneck_s)
    assert layer.weights_bound_s == pytest.approx(bound_s)


def test_small_decode_batches_balance_expert_reads_and_not_rows() -> None:
    # 40 rows and 4 rows a step both mean one read; 40 against 4 x 10 would level rows instead.
    loads = [[40.0] + [10.0] * 3]
    devices = [device("a", 1.0, 2), device("b", 1.0, 2)]

    made = plan(loads, devices, objective="activated")

    assert made.layers[0].device_s == pytest.approx((2.0, 2.0), rel=1e-3)
    rare = plan([[math.log(2)] * 2], devices, objective="activated")
    assert rare.bottleneck_s == pytest.approx(0.5)
    assert rare.objective == "activated"


def test_the_hottest_experts_get_a_second_node() -> None:
    devices = [device(f"{node}{i}", 1.0, 3, node) for node in "ab" for i in range(2)]
    loads = np.array([[10, 9, 8, 7, 6, 5, 4, 3]], dtype=np.float64)

    made = plan(loads, devices, num_spread=3)

    check_is_sound(made, loads, devices)
    for expert in range(3):
        assert {device_id[0] for device_id, _ in made.holdings(0)[expert]} == {"a", "b"}
    assert made.layers[0].not_spread == ()
    assert made.bottleneck_s == pytest.approx(13.0)


def test_a_full_node_makes_room_for_a_second_copy_by_moving_a_light_expert() -> None:
    devices = [device("a", 9.0, 3, "a"), device("b", 1.0, 2, "b")]

    made = plan([[50, 3, 2, 1]], devices, num_spread=1)

    assert {device_id for device_id, _ in made.holdings(0)[0]} == {"a", "b"}
    assert made.layers[0].not_spread == ()


@pytest.mark.parametrize(("slots", "nodes"), [(2, "ab"), (4, "aa")])
def test_hot_experts_that_cannot_be_spread_are_named(slots: int, nodes: str) -> None:
    devices = [device(f"d{i}", 1.0, slots, node) for i, node in enumerate(nodes)]

    made = plan([[10, 9, 8, 7]], devices, num_spread=2)

    assert made.layers[0].not_spread == (0, 1)


def test_a_device_without_slots_is_left_out_and_told_why() -> None:
    made = plan([[2, 1]], [device("a"), device("none", slots=0), device("snail", 1e-9)])

    assert made.device_ids == ("a", "snail")
    assert [device_id for device_id, _ in made.left_out] == ["none"]
    assert "slots_per_layer is 0" in made.left_out[0][1]


def test_a_layer_without_rows_has_no_gap() -> None:
    made = plan([[0, 0, 0]], [device("a"), device("b")])

    assert (made.bottleneck_s, made.lower_bound_s, made.gap) == (0.0, 0.0, 0.0)


def test_a_device_that_would_only_wait_is_left_out() -> None:
    made = plan([[9]], [device("a"), device("slow", 1e-12)])

    assert dict(made.left_out) == {"slow": "no layer would finish earlier with it"}


# --- invariants


@given(case=cases(), num_spread=st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_every_plan_is_sound(case: tuple[np.ndarray, list[ExpertDevice]], num_spread: int) -> None:
    made = plan(*case, num_spread=num_spread, max_trials_per_layer=30)

    check_is_sound(made, *case)
    assert ExpertPlan.from_json(json.loads(json.dumps(made.to_json()))) == made
    for layer in made.layers:
        assert layer.weights_bound_s == pytest.approx(layer.bottleneck_s, rel=1e-9)


@given(case=cases(max_experts=5, max_devices=3))
@settings(max_examples=50, deadline=None)
def test_the_optimum_lies_between_the_bound_and_the_plan(
    case: tuple[np.ndarray, list[ExpertDevice]],
) -> None:
    made = plan(*case)

    for layer, loads in zip(made.layers, case[0], strict=True):
        optimum_s = integer_program_s(loads.tolist(), case[1])
        assert layer.lower_bound_s <= optimum_s * (1 + 1e-6) + 1e-6
        assert layer.bottleneck_s >= optimum_s * (1 - 1e-6) - 1e-6


def test_small_random_layers_are_placed_optimally() -> None:
    rng = np.random.default_rng(1)
    for trial in range(40):
        num_experts, num_devices = int(rng.integers(2, 8)), int(rng.integers(2, 4))
        least = -(-num_experts // num_devices)
        devices = [
            device(f"d{i}", float(rng.integers(1, 6)) if trial % 2 else 1.0, least + trial % 3)
            for i in range(num_devices)
        ]
        loads = np.round(rng.lognormal(3.0, 1.2, num_experts))

        made = plan([loads], devices)

        optimum_s = integer_program_s(loads.tolist(), devices)
        assert made.bottleneck_s == pytest.approx(optimum_s, rel=1e-6)


@given(case=cases(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_devices_does_not_matter(
    case: tuple[np.ndarray, list[ExpertDevice]], data: st.DataObject
) -> None:
    load_rows, devices = case
    shuffled = data.draw(st.permutations(devices))

    made = plan(load_rows, devices, max_trials_per_layer=30)

    assert plan(load_rows, shuffled, max_trials_per_layer=30) == made


@given(case=cases(), num_slots=st.integers(0, 3), are_equal=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_plan_is_never_worse_than_eplb(
    case: tuple[np.ndarray, list[ExpertDevice]], num_slots: int, are_equal: bool
) -> None:
    load_rows, devices = case
    slots = -(-load_rows.shape[1] // len(devices)) + num_slots
    devices = [
        dataclasses.replace(
            one, slots_per_layer=slots, rows_per_s=1.0 if are_equal else one.rows_per_s
        )
        for one in devices
    ]

    made = plan(load_rows, devices, max_trials_per_layer=0)
    eplb = plan(load_rows, devices, mode="eplb")

    check_is_sound(eplb, load_rows, devices)
    for ours, theirs in zip(made.layers, eplb.layers, strict=True):
        assert ours.bottleneck_s <= theirs.bottleneck_s * ROUNDING
        assert ours.lower_bound_s == pytest.approx(
            min(ours.lower_bound_s, theirs.bottleneck_s), rel=1e-9
        )


def test_a_thousand_skewed_layers_are_never_worse_than_eplb_s() -> None:
    rng = np.random.default_rng(7)
    for trial in range(50):
        num_experts, num_devices = int(rng.integers(4, 25)), int(rng.integers(2, 7))
        slots = -(-num_experts // num_devices) + trial % 3
        speeds = rng.uniform(1, 5, num_devices) if trial % 2 else np.ones(num_devices)
        devices = [device(f"d{i}", float(speed), slots) for i, speed in enumerate(speeds)]
        load_rows = np.round(rng.lognormal(3.0, 1.2, (20, num_experts)))

        made = plan(load_rows, devices, max_trials_per_layer=20)
        eplb = plan(load_rows, devices, mode="eplb")

        for ours, theirs in zip(made.layers, eplb.layers, strict=True):
            assert ours.bottleneck_s <= theirs.bottleneck_s * ROUNDING


def test_many_experts_on_unequal_devices_come_within_a_thousandth_of_the_bound() -> None:
    rng = np.random.default_rng(3)
    load_rows = np.array(
        [np.round(1e5 / rng.permutation(np.arange(1, 257)) ** alpha) for alpha in (0.4, 0.8, 1.2)]
    )
    devices = [device(f"d{i:02d}", float(rng.uniform(1, 4)), 9) for i in range(32)]

    made = plan(load_rows, devices)

    check_is_sound(made, load_rows, devices)
    assert max(layer.gap for layer in made.layers) < 1e-3


# --- bad input


def test_too_few_slots_are_refused_with_bytes_and_knobs() -> None:
    with pytest.raises(InfeasiblePlanError, match=r"5 slots .*5000 bytes.*offer 3 \(1, 2\).*raise"):
        plan([[1] * 5], [device("a", slots=1), device("b", slots=2)])


def test_an_expert_that_fits_no_device_is_refused() -> None:
    slots = slots_from_memory(free_bytes=999, expert_bytes=EXPERT_BYTES, num_layers=1)

    with pytest.raises(InfeasiblePlanError, match="none of 1 devices holds an expert of 1000"):
        plan([[1]], [device("a", slots=slots)])


def test_eplb_says_when_the_smallest_device_is_too_small_for_it() -> None:
    with pytest.raises(InfeasiblePlanError, match=r"4 devices with 2 each.*offer 8 for 12 experts"):
        plan(V5_NO_REPLICA.load_rows, V5_NO_REPLICA.devices, mode="eplb")


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_loads_that_are_no_rows_are_refused_with_their_place(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"layer 1, expert 0 is (nan|inf|-1)"):
        plan([[1, 2], [wrong, 3]], [device("a")])


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 0)])
def test_loads_must_be_a_table(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="load_rows has shape"):
        plan(np.ones(shape), [device("a")])


@pytest.mark.parametrize("speed", [0.0, -1.0, math.nan, math.inf])
def test_speeds_must_be_positive(speed: float) -> None:
    fields: dict[str, Any] = {"id": "a", "node": "n", "slots_per_layer": 1}
    with pytest.raises(ValueError, match=r"device a: rows_per_s \("):
        ExpertDevice(**fields, rows_per_s=speed)
    with pytest.raises(ValueError, match=r"device a: expert_read_s \("):
        ExpertDevice(**fields, rows_per_s=1.0, expert_read_s=speed)


def test_names_and_slots_of_devices_are_checked() -> None:
    with pytest.raises(ValueError, match="empty id"):
        device("")
    with pytest.raises(ValueError, match=r"slots_per_layer \(-1\)"):
        device("a", slots=-1)
    with pytest.raises(ValueError, match="2 devices are called a"):
        plan([[1]], [device("a"), device("a", node="m")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "best"}, "mode"),
        ({"objective": "tokens"}, "objective"),
        ({"num_groups": 2}, r"num_groups \(2\) must divide the 3 experts"),
        ({"num_spread": -1}, r"num_spread \(-1\)"),
        ({"max_trials_per_layer": -1}, r"max_trials_per_layer \(-1\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan([[1, 2, 3]], [device("a")], **settings)


def test_counting_reads_needs_their_seconds_and_bytes_are_positive() -> None:
    blind = ExpertDevice(id="a", node="n", rows_per_s=1.0, slots_per_layer=1)
    with pytest.raises(ValueError, match="device a has no expert_read_s"):
        plan([[1]], [blind], objective="activated")
    with pytest.raises(ValueError, match=r"expert_bytes \(0\)"):
        plan_experts(np.ones((1, 1)), [blind], expert_bytes=0)


def test_slots_are_what_fits_every_layer_after_headroom() -> None:
    assert slots_from_memory(1000, 10, 10, headroom_fraction=0.0) == 10
    assert slots_from_memory(1000, 10, 10) == 9
    with pytest.raises(ValueError, match="expert_bytes"):
        slots_from_memory(1000, 0, 10)
    with pytest.raises(ValueError, match="headroom_fraction"):
        slots_from_memory(1000, 1, 10, headroom_fraction=1.0)
