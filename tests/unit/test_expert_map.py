from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.experts import ExpertDevice, plan_experts
from placement.packing.weights import solve_weights
from placement.sharding.expert_map import ExpertMap, LayerMap, weighted_layer
from placement.sharding.routing import RoutingTable


def device(name: str, *, slots: int = 2, speed: float = 1.0, node: str = "n") -> ExpertDevice:
    return ExpertDevice(id=name, node=node, rows_per_s=speed, slots_per_layer=slots)


DEVICES = (device("a", speed=2.0), device("b"))
LAYER = LayerMap(experts=((0, 1), (1, 2)), weights=((1.0, 0.25), (0.75, 1.0)))


def small_map(layer: LayerMap = LAYER, **changes: Any) -> ExpertMap:
    fields: dict[str, Any] = {
        "version": 4,
        "checkpoint": "abc",
        "num_experts": 3,
        "devices": DEVICES,
        "layers": (layer,),
    }
    return ExpertMap(**fields | changes)


def test_a_map_survives_json() -> None:
    one = small_map()
    assert ExpertMap.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_the_next_map_differs_by_whole_layers() -> None:
    old = small_map(layers=(LAYER, LAYER))
    other = LayerMap(experts=((0,), (1, 2)), weights=((1.0,), (1.0, 1.0)))
    new = old.with_layers({1: other})
    assert (new.version, new.layers) == (5, (LAYER, other))
    assert old.layers == (LAYER, LAYER)
    assert new.held("a") == (frozenset({0, 1}), frozenset({0}))


def test_a_map_is_made_from_a_plan() -> None:
    loads = np.array([[4.0, 3.0, 2.0], [1.0, 1.0, 7.0]])
    plan = plan_experts(loads, DEVICES, expert_bytes=10)
    made = ExpertMap.from_plan(plan, DEVICES, checkpoint="abc")
    assert made.device_ids == plan.device_ids
    assert [layer.experts for layer in made.layers] == [layer.experts for layer in plan.layers]
    with pytest.raises(ValueError, match="places experts on b, which are not among 1 devices"):
        ExpertMap.from_plan(plan, DEVICES[:1], checkpoint="abc")


@pytest.mark.parametrize(
    ("experts", "weights", "message"),
    [
        (((0,), (1,)), ((1.0,), (1.0,)), r"1 of 3 experts have no replica \(expert 2 first\)"),
        (((0, 0), (1, 2)), ((0.5, 0.5), (1.0, 1.0)), "a holds expert 0 twice"),
        (((1, 0), (1, 2)), ((0.5, 1.0), (0.5, 1.0)), "a lists expert 0 after 1"),
        (((0, 1, 2), ()), ((1.0, 1.0, 1.0), ()), "holds 3 experts and has slots_per_layer 2"),
        (((0, 3), (1, 2)), ((1.0, 1.0), (1.0, 1.0)), "holds expert 3; a layer has experts 0 to 2"),
        (((0, 1), (1, 2)), ((1.0, 0.5), (0.6, 1.0)), r"weights of expert 1 sum to 1\.1"),
        (((0, 1), (2,)), ((1.0, float("nan")), (1.0,)), "expert 1 has weight nan on a"),
        (((0, 1), (1, 2)), ((1.0,), (0.5, 1.0)), "equally long, for each of the 2 devices"),
        (((0, 1, 2),), ((1.0, 1.0, 1.0),), "experts of 1 devices"),
    ],
)
def test_a_map_that_cannot_be_is_refused(experts: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_map(LayerMap(experts=experts, weights=weights))


def test_a_map_of_another_model_or_device_is_refused() -> None:
    one = small_map()
    one.check_same_model("abc", 1, 3)
    with pytest.raises(ValueError, match="for checkpoint abc and other is loaded"):
        one.check_same_model("other", 1, 3)
    with pytest.raises(ValueError, match="for experts a layer 3 and 8 is loaded"):
        one.check_same_model("abc", 1, 8)
    with pytest.raises(ValueError, match="map 4 has no device z; it has a, b"):
        one.held("z")
    with pytest.raises(ValueError, match="2 devices are called a"):
        small_map(devices=(DEVICES[0], DEVICES[0]))


def test_json_of_another_kind_is_refused() -> None:
    value = small_map().to_json()
    with pytest.raises(ValueError, match="lacks num_experts"):
        ExpertMap.from_json({key: part for key, part in value.items() if key != "num_experts"})
    with pytest.raises(ValueError, match=r"version \('4'\) must be int"):
        ExpertMap.from_json(value | {"version": "4"})


def test_weights_are_exact_for_the_loads() -> None:
    layer = weighted_layer([{0, 1}, {1, 2}], [4.0, 6.0, 1.0], [2.0, 1.0])
    rows = np.array([4, 6, 1])
    table = RoutingTable.of_layer(layer, 3)
    assert table.device_rows(rows[table.expert_R] * table.weight_R) == pytest.approx(
        [22 / 3, 11 / 3]
    )


def test_rows_are_divided_by_largest_remainder_and_in_order() -> None:
    table = RoutingTable.of_layer(LAYER, 3)
    rows_R = table.split(np.array([2, 5, 1]))
    # 5 rows at 0.25 and 0.75: 1.25 and 3.75, the odd one to the larger remainder.
    assert rows_R.tolist() == [2, 1, 4, 1]
    experts = np.array([1, 0, 1, 2, 1, 0, 1, 1])
    assert table.devices_of_rows(experts, rows_R).tolist() == [0, 0, 1, 1, 1, 0, 1, 1]


@settings(deadline=None)
@given(st.data())
def test_every_row_goes_to_a_holder_of_its_expert_and_shares_are_met(data: st.DataObject) -> None:
    num_experts, num_devices = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    held = [set(data.draw(st.sets(st.integers(0, num_experts - 1)))) for _ in range(num_devices)]
    held[0] |= set(range(num_experts)) - set().union(*held)
    loads = data.draw(st.lists(st.integers(0, 50), min_size=num_experts, max_size=num_experts))
    layer = weighted_layer(
        held, [float(load) for load in loads], [1.0 + d for d in range(num_devices)]
    )
    table = RoutingTable.of_layer(layer, num_experts)
    expert_N = np.array(data.draw(st.lists(st.integers(0, num_experts - 1))), dtype=np.int64)
    rows_E = np.bincount(expert_N, minlength=num_experts)
    for rows_R in (table.split(rows_E), table.balanced_rows(rows_E, [1.0] * num_devices)):
        assert (rows_R >= 0).all()
        assert (np.bincount(table.expert_R, weights=rows_R, minlength=num_experts) == rows_E).all()
        for expert, device_index in zip(
            expert_N, table.devices_of_rows(expert_N, rows_R), strict=True
        ):
            assert expert in held[device_index]
    speeds = [1.0] * num_devices
    best = solve_weights(table.holders(), rows_E.tolist(), speeds).bottleneck_s
    # Every replica is off by less than a row.
    slack = np.bincount(table.device_R).max()
    balanced_R = table.balanced_rows(rows_E, speeds)
    assert best - 1e-9 <= table.device_rows(balanced_R).max() <= best + slack
    quota_R = rows_E[table.expert_R] * table.weight_R
    assert (np.abs(table.split(rows_E) - quota_R) < 1 + 1e-9).all()


def test_rows_of_a_step_are_balanced_for_that_step() -> None:
    stale = replace(LAYER, weights=((1.0, 1.0), (0.0, 1.0)))
    table = RoutingTable.of_layer(stale, 3)
    rows = np.array([10, 10, 0])
    assert table.device_rows(table.split(rows)).tolist() == [20, 0]
    assert table.device_rows(table.balanced_rows(rows, [1.0, 1.0])).tolist() == [10, 10]
