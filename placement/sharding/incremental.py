"""A better placement of one layer that moves little: from what is held, not from nothing.

Two ways are priced: the descent of `placement.packing.search` from the placement in force, every
step of which moves one or two copies, and a placement made from scratch, handed out among equal
devices so that few bytes move. The price of a placement is its slowest device's seconds per step
over the steps that the load is expected to last, plus the seconds of copying what is not held; so a
descent stops where a further change would cost more than it saves.

Copies that a new placement does not need stay where slots allow: they cost nothing and stand in
when a device is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from placement.experts import ExpertDevice
from placement.moving.handout import hand_out
from placement.moving.moves import Piece
from placement.packing.search import LayerProblem, LayerState, Trials, improvements, search_layer
from placement.packing.spread import hottest_experts, on_two_nodes, spread_experts
from placement.packing.starts import greedy_starts
from placement.sharding.chains import Layout

FROM_SCRATCH_GAP = 0.02
"""Gap to the bound that a descent may leave before a placement from scratch is tried too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplanTerms:
    """What a copy costs and for how long a placement is expected to pay."""

    copy_s: float
    """Seconds to copy one expert."""
    horizon_steps: float
    """Steps until the load is expected to differ again."""
    num_spread: int = 0
    """Hottest experts to hold on two nodes while slots allow, whatever that costs."""
    max_trials: int = 200
    """Placements of one layer that are solved exactly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReplan:
    """What one layer should hold next."""

    layout: Layout
    num_loads: int
    """Copies that their devices do not hold yet."""
    is_for_spread: bool
    """Some are there to put a hottest expert on a second node."""
    old_s: float
    """Slowest device per step with exact weights, as held."""
    new_s: float
    bound_s: float
    """No placement is below (see `placement.packing.bounds`)."""


def replan_layer(
    problem: LayerProblem, held: Layout, devices: Sequence[ExpertDevice], terms: ReplanTerms
) -> LayerReplan:
    """Return the cheapest placement found, which may be the one that is held.

    `problem` and `held` are in the order of `devices`. Deterministic.
    """
    nodes = [device.node for device in devices]
    hottest = hottest_experts(problem.loads, terms.num_spread)
    start = LayerState(problem, _holders(held, len(problem.loads)), _pinned(held, hottest, nodes))
    if hottest:
        # Being spread comes before what it costs.
        start = spread_experts(start, nodes, hottest, max_trials=0)
    states = [start, *improvements(start, Trials(terms.max_trials))]
    if states[-1].bottleneck_s > problem.bound_s * (1.0 + FROM_SCRATCH_GAP) and not hottest:
        states.append(_from_scratch(problem, held, devices, terms.max_trials))
    old_s = LayerState(problem, _holders(held, len(problem.loads))).bottleneck_s

    def price(state: LayerState) -> tuple[float, float]:
        loads = _num_loads(state, held)
        return state.bottleneck_s * terms.horizon_steps + loads * terms.copy_s, loads

    best = min(states, key=price)
    return LayerReplan(
        layout=settle(best, held),
        num_loads=_num_loads(best, held),
        is_for_spread=_num_loads(start, held) > 0,
        old_s=old_s,
        new_s=best.bottleneck_s,
        bound_s=min(problem.bound_s, best.bottleneck_s),
    )


def settle(state: LayerState, held: Layout) -> Layout:
    """Return what devices hold: what the placement needs, and of the rest the hottest that fit."""
    layout = []
    for device, wanted in enumerate(_by_device(state)):
        spare = sorted(
            held[device] - wanted, key=lambda expert: (-state.problem.loads[expert], expert)
        )
        layout.append(wanted | set(spare[: state.problem.slots[device] - len(wanted)]))
    return tuple(map(frozenset, layout))


def _holders(layout: Layout, num_experts: int) -> list[list[int]]:
    return [[d for d, here in enumerate(layout) if e in here] for e in range(num_experts)]


def _by_device(state: LayerState) -> list[set[int]]:
    layout: list[set[int]] = [set() for _ in state.problem.slots]
    for expert, holders in enumerate(state.holders):
        for device in holders:
            layout[device].add(expert)
    return layout


def _num_loads(state: LayerState, held: Layout) -> int:
    return sum(len(new - old) for new, old in zip(_by_device(state), held, strict=True))


def _pinned(
    held: Layout, hottest: Sequence[int], nodes: Sequence[str]
) -> frozenset[tuple[int, int]]:
    """Return copies of the hottest experts that already are on two nodes, one on each."""
    pinned = set()
    for expert in hottest:
        holders = [device for device, here in enumerate(held) if expert in here]
        if on_two_nodes(holders, nodes):
            second = next(device for device in holders if nodes[device] != nodes[holders[0]])
            pinned |= {(expert, holders[0]), (expert, second)}
    return frozenset(pinned)


def _from_scratch(
    problem: LayerProblem, held: Layout, devices: Sequence[ExpertDevice], max_trials: int
) -> LayerState:
    """Place anew, then let equal devices of a node take each other's part so that little moves."""
    made = _by_device(search_layer(problem, list(greedy_starts(problem)), max_trials))
    groups: dict[tuple[object, ...], list[str]] = {}
    for device in devices:
        key = (device.node, device.rows_per_s, device.expert_read_s, device.slots_per_layer)
        groups.setdefault(key, []).append(device.id)
    pieces = [Piece(part="expert", expert=expert) for expert in range(len(problem.loads))]
    held_pieces, planned = (
        {
            device.id: frozenset(pieces[expert] for expert in here)
            for device, here in zip(devices, layout, strict=True)
        }
        for layout in (held, made)
    )
    taken = hand_out(held_pieces, planned, list(groups.values()), dict.fromkeys(pieces, 1))
    position = {device.id: index for index, device in enumerate(devices)}
    layout: list[frozenset[int]] = [frozenset()] * len(devices)
    for planned_id, actual_id in taken.items():
        layout[position[actual_id]] = frozenset(made[position[planned_id]])
    return LayerState(problem, _holders(tuple(layout), len(problem.loads)))
