from __future__ import annotations

import numpy as np
import pytest
from expert_vectors import V4, V4_EPLB_EXACT_WEIGHTS_ROWS
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from placement.packing.weights import ReplicaWeights, cut_bound_s, solve_weights

Case = tuple[list[list[int]], list[float], list[float]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Holders, loads and speeds of one layer."""
    speeds = draw(st.lists(st.integers(1, 40).map(float), min_size=1, max_size=6))
    held = st.sets(st.integers(0, len(speeds) - 1), min_size=1).map(sorted)
    holders = draw(st.lists(held, min_size=1, max_size=9))
    loads = draw(
        st.lists(st.integers(0, 300).map(float), min_size=len(holders), max_size=len(holders))
    )
    return holders, loads, speeds


def linear_program_s(holders: list[list[int]], loads: list[float], speeds: list[float]) -> float:
    """The least finish of the slowest device, from a solver that shares no code with ours."""
    copies = [(expert, device) for expert, held in enumerate(holders) for device in held]
    whole = np.zeros((len(loads), len(copies) + 1))
    finish = np.zeros((len(speeds), len(copies) + 1))
    for column, (expert, device) in enumerate(copies):
        whole[expert, column] = 1.0
        finish[device, column] = 1.0
    finish[:, -1] = -np.array(speeds)
    cost = np.zeros(len(copies) + 1)
    cost[-1] = 1.0
    solved = linprog(cost, A_ub=finish, b_ub=np.zeros(len(speeds)), A_eq=whole, b_eq=loads)
    return float(solved.fun)


def check_is_a_split(case: Case, weights: ReplicaWeights) -> None:
    holders, loads, speeds = case
    rows_on = np.zeros(len(speeds))
    for expert, by_device in enumerate(weights.rows):
        assert sorted(by_device) == holders[expert]
        assert min(by_device.values()) >= 0
        assert sum(by_device.values()) == pytest.approx(loads[expert])
        for device, rows in by_device.items():
            rows_on[device] += rows
    assert weights.finish_s == pytest.approx(rows_on / speeds, abs=1e-9)


@given(case=cases())
@settings(max_examples=200, deadline=None)
def test_the_weights_are_as_good_as_a_linear_program_s(case: Case) -> None:
    weights = solve_weights(*case)

    assert weights.bottleneck_s == pytest.approx(linear_program_s(*case), rel=1e-7, abs=1e-9)
    assert weights.bottleneck_s == max(weights.finish_s)
    check_is_a_split(case, weights)


@given(case=cases(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_the_critical_devices_prove_that_no_weights_are_better(
    case: Case, data: st.DataObject
) -> None:
    weights = solve_weights(*case)
    some = data.draw(st.sets(st.integers(0, len(case[2]) - 1), min_size=1))

    bound_s = cut_bound_s(*case, weights.critical_devices)
    assert bound_s == pytest.approx(weights.bottleneck_s, rel=1e-9)
    assert cut_bound_s(*case, frozenset(some)) <= bound_s * (1 + 1e-9)


def test_rows_pass_through_a_device_in_the_middle() -> None:
    # Device 0 can shed rows only onto 1, which must shed its own onto 2.
    holders = [[0], [0, 1], [1, 2]]

    weights = solve_weights(holders, [6.0, 3.0, 9.0], [1.0, 1.0, 1.0])

    assert weights.finish_s == pytest.approx([6.0, 6.0, 6.0])
    assert weights.rows[1][0] == pytest.approx(0.0)
    assert weights.rows[2] == pytest.approx({1: 3.0, 2: 6.0})


def test_devices_beside_the_slowest_are_level_too() -> None:
    weights = solve_weights([[0], [1, 2]], [10.0, 6.0], [1.0, 1.0, 2.0])

    assert weights.critical_devices == {0}
    assert weights.finish_s == pytest.approx([10.0, 2.0, 2.0])


def test_exact_weights_on_eplb_s_placement_already_beat_flashlb() -> None:
    devices: list[set[int]] = [set() for _ in V4.loads[0]]
    for slot, expert in enumerate(V4.expert_of_slot[0]):
        devices[expert].add(slot // 2)

    weights = solve_weights([sorted(held) for held in devices], V4.loads[0], [1.0] * 8)

    assert weights.bottleneck_s == pytest.approx(V4_EPLB_EXACT_WEIGHTS_ROWS)


def test_a_layer_without_rows_takes_no_time() -> None:
    weights = solve_weights([[0, 1], [1]], [0.0, 0.0], [1.0, 2.0])

    assert weights.bottleneck_s == 0.0
    assert weights.rows == [{0: 0.0, 1: 0.0}, {1: 0.0}]
