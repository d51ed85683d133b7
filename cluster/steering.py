"""What the controller shows of itself, in the words of the gateway. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cluster.backend import ControllerStatus
from placement.stages import StagesPlan
from placement.steering.state import ControllerState, MoveRecord
from placement.topology import Link

Cut = Mapping[str, int]
"""Device id: number of layers."""


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
