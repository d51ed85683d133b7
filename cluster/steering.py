"""What the controller shows of itself, in the words of the gateway. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cluster.backend import ControllerStatus
from placement.sharding.rebalance_values import DeviceMadeGood, MapChange
from placement.sharding.rebalancer import ExpertRebalancer
from placement.stages import StagesPlan
from placement.steering.state import ControllerState, MoveRecord
from placement.topology import Link

Cut = Mapping[str, int]
"""Device id: number of layers."""
_LEAST_ROWS = 1e-9
"""So that a layer without any row has no load, and not none that is a number."""


def cut_of(plan: StagesPlan) -> dict[str, int]:
    return {stage.device_id: stage.num_layers for stage in plan.stages}


def controller_status(state: ControllerState) -> ControllerStatus:
    """Return the figures that are exported as metrics."""
    pauses = [move.pause_s for move in state.moves if move.pause_s is not None]
    return ControllerStatus(
        phase=state.phase,
        epoch=state.epoch,
        # A plain one: a Counter does not survive `asdict`.
        moves=dict(Counter(_outcome(m) for m in state.moves if m.outcome != "under way")),
        num_pauses=len(pauses),
        pause_s=sum(pauses),
        last_pause_s=pauses[-1] if pauses else 0.0,
    )


def controller_document(
    state: ControllerState, cuts: Mapping[int, Cut], links: Sequence[Link], unix_offset_s: float
) -> dict[str, Any]:
    """Return what `Backend.controller_json` promises.

    Args:
        state: Of this moment.
        cuts: Of the plans that have been in force, by epoch.
        links: As they have been measured lately.
        unix_offset_s: From the controller's clock to Unix time.
    """
    return {
        "phase": state.phase,
        "epoch": state.epoch,
        "reason": state.halt_reason or state.why_not,
        "draining": list(state.drains),
        "drains": dict(state.drains),
        "num_lanes": state.num_lanes,
        "factors": dict(state.slowness),
        "links": [asdict(link) for link in links],
        "moves": [_move(move, cuts, unix_offset_s) for move in state.moves],
    }


def experts_document(
    rebalancer: ExpertRebalancer,
    layers: Sequence[int],
    *,
    num_maps: int,
    changes: Sequence[MapChange],
    recoveries: Sequence[DeviceMadeGood],
    guests: Mapping[str, int],
    unix_offset_s: float,
) -> dict[str, Any]:
    """Return what `Backend.controller_json` promises of sharded experts.

    Args:
        rebalancer: With the map in force and the loads.
        layers: The model's layers with experts, in the map's order.
        num_maps: That came into force.
        changes: The last of them, the newest last.
        recoveries: From losses.
        guests: Experts that each device has taken in for the rows of a step.
        unix_offset_s: From the changes' clock to Unix time.
    """
    current, decision = rebalancer.map, rebalancer.last_decision
    rows_LE = rebalancer.loads
    mean_L1 = np.maximum(rows_LE.mean(axis=1, keepdims=True), _LEAST_ROWS)
    return {
        "version": current.version,
        "reason": rebalancer.halted or ("" if decision is None else decision.reason),
        "is_moving": rebalancer.is_moving,
        "maps": num_maps,
        "layers": list(layers),
        "loads": np.round(rows_LE / mean_L1, 2).tolist(),
        "replicas": [
            np.bincount(
                [expert for held in layer.experts for expert in held],
                minlength=current.num_experts,
            ).tolist()
            for layer in current.layers
        ],
        "changes": [_change(change, layers, unix_offset_s) for change in changes],
        "copies": {
            device.id: sum(len(layer.experts[position]) for layer in current.layers)
            for position, device in enumerate(current.devices)
        },
        "nodes": {device.id: device.node for device in current.devices},
        "guests": dict(guests),
        "recoveries": [asdict(each) for each in recoveries],
    }


def _change(change: MapChange, layers: Sequence[int], unix_offset_s: float) -> dict[str, Any]:
    return {
        "at_s": change.at_s + unix_offset_s,
        "version": change.version,
        "reason": change.reason,
        "copies": [
            {"device_id": device_id, "layer": layers[index], "expert": expert}
            for device_id, index, expert in change.copies
        ],
    }


def _move(move: MoveRecord, cuts: Mapping[int, Cut], unix_offset_s: float) -> dict[str, Any]:
    before = max((epoch for epoch in cuts if epoch < move.epoch), default=None)
    return {
        "at_s": move.at_s + unix_offset_s,
        "epoch": move.epoch,
        "from": {} if before is None else dict(cuts[before]),
        "to": dict(cuts.get(move.epoch, {})),
        "reason": move.reason,
        "predicted_gain": move.predicted_gain,
        "measured_gain": move.measured_gain,
        "pause_s": move.pause_s,
        "outcome": _outcome(move),
    }


def _outcome(move: MoveRecord) -> str:
    if move.is_recovery and move.outcome == "done":
        return "recovery"
    words = {"under way": "running", "on trial": "running", "superseded": "failed", "done": "kept"}
    return words.get(move.outcome, move.outcome)
