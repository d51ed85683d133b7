from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from placement.errors import InfeasiblePlanError
from placement.experts import ExpertDevice, plan_experts
from placement.sharding.decision import RebalanceSettings, decide, finish_s, refreshed_weights
from placement.sharding.expert_map import ExpertMap
from placement.sharding.recovery import recover

EXPERT_BYTES = 100
DEVICES = [
    ExpertDevice(id=name, node=node, rows_per_s=speed, slots_per_layer=slots)
    for name, node, speed, slots in (
        ("a", "x", 200.0, 14), ("b", "x", 120.0, 10), ("c", "y", 70.0, 6), ("d", "y", 70.0, 10),
    )
]  # fmt: skip
ZIPF = 100.0 / np.arange(1, 33) ** 0.8


def settings(**changes: Any) -> RebalanceSettings:
    fields: dict[str, Any] = {
        "expert_bytes": EXPERT_BYTES,
        "copy_bytes_per_s": 1e4,
        "step_budget_bytes": 1000,
        "staging_slots": 2,
    }
    return RebalanceSettings(**fields | changes)


def mapped(rows_LE: np.ndarray, devices: list[ExpertDevice] = DEVICES) -> ExpertMap:
    plan = plan_experts(rows_LE, devices, expert_bytes=EXPERT_BYTES)
    return ExpertMap.from_plan(plan, devices, checkpoint="c")


def test_a_balanced_placement_stays() -> None:
    rows = np.array([ZIPF, ZIPF[::-1]])
    made = decide(mapped(rows), rows, settings())
    assert made.layers == ()
    assert made.imbalance == pytest.approx(1.0, abs=0.01)
    assert "1.00" in made.reason


def test_a_layer_whose_hot_experts_changed_moves_and_the_other_does_not() -> None:
    rows = np.array([ZIPF, ZIPF])
    made = decide(mapped(rows), np.array([ZIPF, ZIPF[::-1]]), settings())
    [(layer, replan)] = made.layers
    assert layer == 1
    assert replan.new_s <= replan.bound_s * 1.01
    assert made.moved_bytes == replan.num_loads * EXPERT_BYTES
    assert made.gain_s == pytest.approx(replan.old_s - replan.new_s)


def test_bytes_that_cost_more_than_they_save_do_not_move() -> None:
    rows = np.array([ZIPF])
    made = decide(mapped(rows), rows[:, ::-1], settings(copy_bytes_per_s=1e-3))
    assert made.layers == ()
    assert "least_gain_fraction" in made.reason
    assert made.imbalance > 1.1


def test_drift_asks_for_a_plan_below_the_imbalance_threshold() -> None:
    rows, later = np.array([ZIPF]), np.array([ZIPF[::-1]])
    patient = settings(least_imbalance=100.0)
    assert not decide(mapped(rows), later, patient, drift=0.05).layers
    assert decide(mapped(rows), later, patient, drift=0.2).layers
    assert decide(mapped(rows), later, patient, is_forced=True).layers


def test_weights_are_refreshed_where_the_load_left_them_behind() -> None:
    rows = np.array([ZIPF, ZIPF])
    current = mapped(rows)
    later = np.array([ZIPF, np.where(np.arange(32) == 0, ZIPF * 1.3, ZIPF)])
    changed = refreshed_weights(current, later, settings(least_gain_fraction=0.001))
    assert list(changed) == [1]
    speeds = [device.rows_per_s for device in current.devices]
    assert finish_s(changed[1], later[1], speeds) < finish_s(current.layers[1], later[1], speeds)
    assert changed[1].experts == current.layers[1].experts


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"step_budget_bytes \(0\) must be at least 1"):
        settings(step_budget_bytes=0)
    with pytest.raises(ValueError, match=r"copy_bytes_per_s \(0\.0\) must be above 0"):
        settings(copy_bytes_per_s=0.0)
    with pytest.raises(ValueError, match=r"least_drift \(2\) must be from 0 to 1"):
        settings(least_drift=2)
    with pytest.raises(ValueError, match=r"cool_down_steps \(-1\) must be 0 or more"):
        settings(cool_down_steps=-1)


def test_replicas_take_over_and_the_rest_is_reloaded_where_it_ends_first() -> None:
    rows = np.array([ZIPF])
    current = mapped(rows)
    left = [device for device in current.devices if device.id != "c"]
    made = recover(current, left, rows)
    assert made.map.version == current.version + 1
    assert made.map.device_ids == tuple(device.id for device in left)
    lost = current.held("c")[0]
    others = frozenset[int]().union(*(current.held(device.id)[0] for device in left))
    assert {reload.expert for reload in made.reloads} == lost - others
    for reload in made.reloads:
        assert reload.expert in made.map.held(reload.device_id)[0]
    # What is held elsewhere and was not in the way stays where it is.
    assert sum(len(made.map.held(d.id)[0] & current.held(d.id)[0]) for d in left) >= len(others)


def test_a_device_that_joins_starts_empty() -> None:
    rows = np.array([ZIPF])
    current = mapped(rows)
    new = ExpertDevice(id="e", node="z", rows_per_s=50.0, slots_per_layer=4)
    made = recover(current, [*current.devices, new], rows)
    assert made.reloads == ()
    assert made.map.held("e") == (frozenset(),)


def test_a_loss_that_leaves_too_few_slots_says_so() -> None:
    current = mapped(np.array([ZIPF]))
    with pytest.raises(InfeasiblePlanError, match="1 expert devices offer 14 slots a layer"):
        recover(current, current.devices[:1], np.array([ZIPF]))


def test_the_hottest_experts_survive_any_node() -> None:
    rows = np.array([ZIPF])
    plan = plan_experts(rows, DEVICES, expert_bytes=EXPERT_BYTES, num_spread=3)
    current = ExpertMap.from_plan(plan, DEVICES, checkpoint="c")
    roomy = [
        ExpertDevice(id=d.id, node=d.node, rows_per_s=d.rows_per_s, slots_per_layer=20)
        for d in current.devices
    ]
    for node in ("x", "y"):
        made = recover(current, [d for d in roomy if d.node != node], rows)
        assert not {0, 1, 2} & {reload.expert for reload in made.reloads}
