"""A device of the map is lost: who takes over, and which experts must be read again.

Replicas elsewhere take over at once, with weights solved anew. An expert without a replica goes to
the device that would finish it first: into a free slot, or into that of a replica which its expert
can spare. Its rows wait there until it is read from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from placement.errors import InfeasiblePlanError
from placement.experts import ExpertDevice, ExpertObjective, layer_problems
from placement.sharding.chains import Layout
from placement.sharding.expert_map import ExpertMap, weighted_layer


@dataclass(frozen=True, kw_only=True, slots=True)
class Reload:
    """An expert to be read from the checkpoint."""

    layer: int
    expert: int
    device_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """The map without what was lost, and what it takes to make it true."""

    map: ExpertMap
    reloads: tuple[Reload, ...]
    """Layers without any serve at once."""


def recover(
    known: ExpertMap,
    devices: Sequence[ExpertDevice],
    rows_LE: NDArray[np.float64],
    *,
    objective: ExpertObjective = "rows",
) -> Recovery:
    """Return the next version of `known` on `devices`, those that are left or have joined.

    Nothing that is held moves. `rows_LE` are rows per step of every layer's experts.

    Raises:
        InfeasiblePlanError: The devices cannot hold one copy of every expert.
    """
    check_slots(devices, known.num_experts)
    layers, reloads = [], []
    position = {device_id: index for index, device_id in enumerate(known.device_ids)}
    for index, problem in enumerate(layer_problems(rows_LE, devices, objective)):
        experts = known.layers[index].experts
        held = tuple(
            _hottest(experts[position[d.id]], problem.loads, d.slots_per_layer)
            if d.id in position
            else frozenset[int]()
            for d in devices
        )
        placed = _with_orphans(held, problem.loads, problem.speeds, problem.slots)
        layers.append(weighted_layer(placed, problem.loads, problem.speeds))
        reloads += [
            Reload(layer=index, expert=expert, device_id=device.id)
            for device, before, after in zip(devices, held, placed, strict=True)
            for expert in sorted(after - before)
        ]
    made = replace(known, version=known.version + 1, devices=tuple(devices), layers=tuple(layers))
    return Recovery(map=made, reloads=tuple(reloads))


def check_slots(devices: Sequence[ExpertDevice], num_experts: int) -> None:
    """Refuse devices that cannot hold one copy of every expert of a layer.

    Raises:
        InfeasiblePlanError: They cannot.
    """
    num_slots = sum(device.slots_per_layer for device in devices)
    if num_slots < num_experts:
        raise InfeasiblePlanError(
            f"{len(devices)} expert devices offer {num_slots} slots a layer and a copy of each of "
            f"{num_experts} experts needs as many; add a device, or raise slots_per_layer"
        )


def _hottest(experts: Sequence[int], loads: Sequence[float], slots: int) -> frozenset[int]:
    """Return what fits: a device may have come back with fewer slots."""
    return frozenset(sorted(experts, key=lambda expert: (-loads[expert], expert))[:slots])


def _with_orphans(
    held: Layout, loads: Sequence[float], speeds: Sequence[float], slots: Sequence[int]
) -> Layout:
    """Find a device for every expert that none holds, the heaviest first."""
    now = [set(here) for here in held]
    num_copies = [sum(expert in here for here in now) for expert in range(len(loads))]
    orphans = sorted((e for e, n in enumerate(num_copies) if not n), key=lambda e: (-loads[e], e))
    rows_on = [sum(loads[e] / num_copies[e] for e in sorted(here)) for here in now]
    for orphan in orphans:
        # (finish, device, replica that makes room; -1: a slot is free).
        choices = []
        for device, here in enumerate(now):
            spare = [e for e in here if num_copies[e] > 1]
            if len(here) < slots[device]:
                choices.append(((rows_on[device] + loads[orphan]) / speeds[device], device, -1))
            elif spare:
                given_up = min(spare, key=lambda e: (loads[e] / num_copies[e], e))
                rows = rows_on[device] - loads[given_up] / num_copies[given_up]
                choices.append(((rows + loads[orphan]) / speeds[device], device, given_up))
        _, device, given_up = min(choices)
        if given_up >= 0:
            now[device].remove(given_up)
            num_copies[given_up] -= 1
        now[device].add(orphan)
        num_copies[orphan] = 1
        rows_on[device] = sum(loads[e] / num_copies[e] for e in sorted(now[device]))
    return tuple(map(frozenset, now))
