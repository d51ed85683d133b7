from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.experts import ExpertDevice, layer_problems, plan_experts
from placement.packing.search import LayerProblem
from placement.sharding.chains import Layout, layouts_between
from placement.sharding.incremental import ReplanTerms, replan_layer

TERMS = ReplanTerms(copy_s=1.0, horizon_steps=1000.0)


def device(name: str, speed: float = 1.0, slots: int = 4, node: str = "n") -> ExpertDevice:
    return ExpertDevice(id=name, node=node, rows_per_s=speed, slots_per_layer=slots)


def problem_of(loads: Any, devices: list[ExpertDevice]) -> LayerProblem:
    [problem] = layer_problems(np.array([loads], dtype=np.float64), devices, "rows")
    return problem


def layout(*held: set[int]) -> Layout:
    return tuple(map(frozenset, held))


def test_nothing_moves_when_nothing_is_gained() -> None:
    devices = [device("a"), device("b")]
    held = layout({0, 1}, {2, 3})
    made = replan_layer(problem_of([1, 1, 1, 1], devices), held, devices, TERMS)
    assert made.layout == held
    assert (made.num_loads, made.old_s, made.new_s, made.bound_s) == (0, 2.0, 2.0, 2.0)


def test_an_unbalanced_layer_moves_just_what_levels_it() -> None:
    devices = [device("a"), device("b")]
    made = replan_layer(problem_of([5, 3, 1, 1], devices), layout({0, 1}, {2, 3}), devices, TERMS)
    assert made.num_loads == 1
    assert (made.old_s, made.new_s) == (8.0, 5.0)
    # Nothing that was held had to go.
    assert made.layout[0] >= {0, 1}
    assert made.layout[1] >= {2, 3}


def test_a_short_horizon_forbids_what_a_long_one_pays_for() -> None:
    devices = [device("a"), device("b")]
    problem, held = problem_of([5, 3, 1, 1], devices), layout({0, 1}, {2, 3})
    short = ReplanTerms(copy_s=1.0, horizon_steps=0.1)
    assert replan_layer(problem, held, devices, short).num_loads == 0


def test_equal_devices_take_each_others_part() -> None:
    """A placement from scratch names devices by order of load; what is held decides who is who."""
    rng = np.random.default_rng(3)
    devices = [device(name, slots=8) for name in "abcd"]
    loads = rng.zipf(1.5, 32).clip(max=40)
    plan = plan_experts(np.array([loads], dtype=np.float64), devices, expert_bytes=1)
    held = tuple(map(frozenset, plan.layers[0].experts))
    rotated = held[1:] + held[:1]
    made = replan_layer(problem_of(loads, devices), rotated, devices, TERMS)
    assert made.num_loads <= 4
    assert made.new_s <= plan.layers[0].bottleneck_s * 1.02


def test_the_hottest_are_put_on_two_nodes_and_stay_there() -> None:
    devices = [device("a", node="x", slots=3), device("b", node="y", slots=3)]
    problem, held = problem_of([9, 8, 1, 1], devices), layout({0, 2}, {1, 3})
    terms = ReplanTerms(copy_s=1e9, horizon_steps=1.0, num_spread=2)
    made = replan_layer(problem, held, devices, terms)
    assert all({0, 1} <= here for here in made.layout)
    assert replan_layer(problem, made.layout, devices, terms).num_loads == 0


@settings(deadline=None)
@given(st.data())
def test_every_layout_of_a_change_holds_every_expert_and_fits(data: st.DataObject) -> None:
    num_devices, num_experts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    least = -(-num_experts // num_devices)
    slots = [least + data.draw(st.integers(0, 2)) for _ in range(num_devices)]
    held, wanted = (data.draw(placements(slots, num_experts)) for _ in range(2))
    staging = data.draw(st.integers(1, 3))
    before = held
    layouts = layouts_between(held, wanted, slots, staging_slots=staging)
    assert len(layouts) <= sum(len(new - old) for new, old in zip(wanted, held, strict=True)) + 1
    for after in layouts:
        assert frozenset().union(*after) == frozenset(range(num_experts))
        for old, new, room in zip(before, after, slots, strict=True):
            assert len(new) <= room
            assert len(old | new) <= room + staging
        before = after
    assert before == wanted


def placements(slots: list[int], num_experts: int) -> st.SearchStrategy[Layout]:
    """Draw layouts that hold every expert within the slots."""

    def build(order: list[int], extra: list[frozenset[int]]) -> Layout:
        held: list[set[int]] = [set() for _ in slots]
        for expert in order:
            room = [d for d, here in enumerate(held) if len(here) < slots[d]]
            held[room[expert % len(room)]].add(expert)
        for device_index, here in enumerate(held):
            spare = sorted(extra[device_index] - here)
            here.update(spare[: slots[device_index] - len(here)])
        return tuple(map(frozenset, held))

    experts = st.integers(0, num_experts - 1)
    return st.builds(
        build,
        st.permutations(range(num_experts)),
        st.lists(st.frozensets(experts), min_size=len(slots), max_size=len(slots)),
    )


def test_a_change_needs_a_staging_slot() -> None:
    with pytest.raises(ValueError, match=r"staging_slots \(0\) must be at least 1"):
        layouts_between(layout({0}, {1}), layout({1}, {0}), [1, 1], staging_slots=0)
    assert layouts_between(layout({0}, {1}), layout({1}, {0}), [1, 1], staging_slots=1) == [
        layout({1}, {0})
    ]
