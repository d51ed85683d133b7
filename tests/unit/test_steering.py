"""What the controller shows of itself survives its way to JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from cluster.steering import controller_document, controller_status, experts_document
from placement.experts import ExpertDevice
from placement.sharding.decision import RebalanceSettings
from placement.sharding.expert_map import ExpertMap, weighted_layer
from placement.sharding.rebalance_values import DeviceMadeGood, MapChange
from placement.sharding.rebalancer import ExpertRebalancer
from placement.steering.state import ControllerState, MoveRecord, Outcome
from placement.topology import Link


def record(epoch: int, outcome: Outcome, *, is_recovery: bool = False) -> MoveRecord:
    return MoveRecord(
        at_s=10.0 * epoch, epoch=epoch, reason="slow", is_recovery=is_recovery,
        is_roll_back=False, outcome=outcome, pause_s=0.25 if outcome == "kept" else None,
    )  # fmt: skip


STATE = ControllerState(
    plan=None, epoch=4, phase="moving", halt_reason="", num_lanes=2, lost_devices=(),
    drains={"n": "waits"}, unused={}, slowness={"a": 2.0},
    moves=(
        record(1, "kept"), record(2, "rolled back"), record(3, "done", is_recovery=True),
        record(4, "under way"),
    ),
    why_not="too small a gain",
)  # fmt: skip


def test_outcomes_are_counted_and_pauses_summed() -> None:
    status = controller_status(STATE)
    value = json.loads(json.dumps(asdict(status)))
    assert value["moves"] == {"kept": 1, "rolled back": 1, "recovery": 1}
    assert (value["num_pauses"], value["pause_s"], value["last_pause_s"]) == (1, 0.25, 0.25)
    assert (value["phase"], value["epoch"]) == ("moving", 4)


def test_moves_are_shown_with_the_cuts_before_and_after_them() -> None:
    cuts = {0: {"a": 4, "b": 4}, 1: {"a": 3, "b": 5}, 3: {"b": 8}}
    document = json.loads(json.dumps(controller_document(STATE, cuts, [], 1000.0)))
    assert document["reason"] == "too small a gain"
    assert document["draining"] == ["n"]
    assert document["factors"] == {"a": 2.0}
    shown = [(m["at_s"], m["from"], m["to"], m["outcome"]) for m in document["moves"]]
    assert shown == [
        (1010.0, {"a": 4, "b": 4}, {"a": 3, "b": 5}, "kept"),
        (1020.0, {"a": 3, "b": 5}, {}, "rolled back"),
        (1030.0, {"a": 3, "b": 5}, {"b": 8}, "recovery"),
        (1040.0, {"b": 8}, {}, "running"),
    ]


def test_links_are_shown_as_they_were_measured() -> None:
    link = Link(source_node="n", target_node="m", bandwidth_bytes_per_s=2.5e6, latency_s=0.001)
    document = json.loads(json.dumps(controller_document(STATE, {}, [link], 0.0)))
    assert document["links"] == [
        {
            "source_node": "n", "target_node": "m", "bandwidth_bytes_per_s": 2.5e6,
            "latency_s": 0.001,
        }
    ]  # fmt: skip


def test_what_is_told_of_sharded_experts() -> None:
    devices = tuple(
        ExpertDevice(id=name, node="n", rows_per_s=1.0, slots_per_layer=2) for name in "ab"
    )
    layer = weighted_layer([frozenset({0, 1}), frozenset({1})], [1.0, 1.0], [1.0, 1.0])
    made = ExpertMap(
        version=4, checkpoint="c", num_experts=2, devices=devices, layers=(layer, layer)
    )
    settings = RebalanceSettings(expert_bytes=1, copy_bytes_per_s=1.0, step_budget_bytes=1)
    past = DeviceMadeGood(device_id="b", seconds=0.5, reason="it was lost")

    change = MapChange(at_s=2.0, version=4, reason="skewed", copies=(("a", 1, 0),))

    told = experts_document(
        ExpertRebalancer(made, settings), (1, 3), num_maps=3, changes=[change], recoveries=[past],
        guests={"b": 2}, unix_offset_s=1000.0,
    )  # fmt: skip
    document = json.loads(json.dumps(told))

    assert document == {
        "version": 4,
        "reason": "",
        "is_moving": False,
        "maps": 3,
        "copies": {"a": 4, "b": 2},
        "nodes": {"a": "n", "b": "n"},
        "guests": {"b": 2},
        "layers": [1, 3],
        "loads": [[1.0, 1.0], [1.0, 1.0]],
        "replicas": [[1, 2], [1, 2]],
        "changes": [
            {
                "at_s": 1002.0,
                "version": 4,
                "reason": "skewed",
                "copies": [{"device_id": "a", "layer": 3, "expert": 0}],
            }
        ],
        "recoveries": [{"device_id": "b", "seconds": 0.5, "reason": "it was lost"}],
    }
