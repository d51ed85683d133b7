"""What a serving plan does, step by step: its lanes' steps over its stages and links.

A closed line: a lane's next step begins when its last one has left the last stage. Stages and
links take what arrives in order; every step of every lane costs the same.
"""

from __future__ import annotations

from placement.stages import StagesPlan
from placement.trace import Event

LINK_KIND = "hop"
STEP_KIND = "step"


def serving_events(plan: StagesPlan, *, lanes: int, steps: int = 8) -> list[Event]:
    """Return when each stage computes and each link carries, for `steps` steps of every lane.

    A hop's event is on `link_id` of the stage it leaves; it lasts while the link is busy.
    O(lanes x steps x stages).

    Raises:
        ValueError: No lanes or no steps.
    """
    if lanes < 1 or steps < 1:
        raise ValueError(f"lanes ({lanes}) and steps ({steps}) must be at least 1")
    events = []
    stage_free_s = [0.0] * len(plan.stages)
    link_free_s = [0.0] * len(plan.stages)
    ready_s = [0.0] * lanes
    for step in range(steps):
        for lane in range(lanes):
            at_s = ready_s[lane]
            for stage in plan.stages:
                index = stage.index
                start_s = max(at_s, stage_free_s[index])
                at_s = stage_free_s[index] = start_s + stage.step_s
                events.append(_event(stage.device_id, start_s, at_s, STEP_KIND, index, lane, step))
                if stage.hop_s:
                    depart_s = max(at_s, link_free_s[index])
                    link_free_s[index] = depart_s + stage.hop_busy_s
                    track = link_id(plan, index)
                    events.append(
                        _event(track, depart_s, link_free_s[index], LINK_KIND, index, lane, step)
                    )
                    at_s = depart_s + stage.hop_s
            ready_s[lane] = at_s
    return events


def link_id(plan: StagesPlan, index: int) -> str:
    """Return the name of the track on which the hop after a stage is drawn."""
    return f"{plan.stages[index].device_id} -> {plan.stages[index + 1].device_id}"


def track_nodes(plan: StagesPlan) -> dict[str, str]:
    """Return the node of every track of `serving_events`; a hop belongs to its sender."""
    nodes = {stage.device_id: stage.node for stage in plan.stages}
    hops = [stage for stage in plan.stages if stage.hop_s]
    return nodes | {link_id(plan, stage.index): stage.node for stage in hops}


def _event(
    track: str, start_s: float, end_s: float, kind: str, stage: int, lane: int, step: int
) -> Event:
    return Event(
        device_id=track,
        start_s=start_s,
        end_s=end_s,
        kind=kind,
        stage=stage,
        micro_batch=lane,
        round_index=step,
    )
