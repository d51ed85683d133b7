"""Who takes each device's part of a new plan, so that the fewest bytes move.

Devices with equal figures on the same node have equal links too, so they may take each other's part
without changing what the plan costs. Which of them takes which is an assignment problem, solved
exactly for every group of interchangeable devices on its own.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from scipy.optimize import linear_sum_assignment

from placement.moving.moves import Piece
from placement.stages import StagesPlan
from placement.topology import Topology

Holdings = Mapping[str, Sequence[AbstractSet[int]]]
"""Device id -> per layer, the experts it holds a copy of."""
Pieces = dict[str, frozenset[Piece]]
"""By device; every device of the topology has an entry."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Renaming:
    """A part of the new plan goes to an interchangeable device."""

    planned: str
    actual: str
    layer: int | None = None
    """Of experts; None: all that the plan gave the device."""


def interchangeable_groups(
    topology: Topology, named: Sequence[Collection[str]] | None, room: Mapping[str, int]
) -> list[list[str]]:
    """Return the devices that may take each other's part, every device in one group."""
    by_key: dict[Hashable, list[str]] = {}
    group_of: dict[str, int] = {}
    for index, group in enumerate(named or ()):
        check_known(group, topology)
        for device_id in group:
            if group_of.setdefault(device_id, index) != index:
                raise ValueError(f"interchangeable names {device_id} in 2 groups; keep it in one")
    for device in topology.devices:
        key: Hashable = (replace(device, id="any"), room.get(device.id))
        if named is not None:
            key = group_of.get(device.id, device.id)
        by_key.setdefault(key, []).append(device.id)
    return [sorted(group) for group in by_key.values()]


def hand_out(
    held: Pieces,
    planned: Pieces,
    groups: Sequence[Sequence[str]],
    piece_bytes: Mapping[Piece, int],
) -> dict[str, str]:
    """Return who takes each device's part so that the fewest bytes move, then the fewest parts.

    Exact while bytes times devices stay below 2^53, as the assignment is solved in floats.
    """
    actual = {}
    for group in groups:
        # Scaled, so that keeping a part where it was planned decides between equal bytes only.
        scale = len(group) + 1
        missing_bytes = [
            [
                scale * sum(piece_bytes[p] for p in planned[part] - held[device_id])
                - (part == device_id)
                for device_id in group
            ]
            for part in group
        ]
        for part, device_id in zip(*linear_sum_assignment(missing_bytes), strict=True):
            actual[group[part]] = group[device_id]
    return actual


def hand_out_layers(
    held: Pieces,
    planned: Pieces,
    groups: Sequence[Sequence[str]],
    piece_bytes: Mapping[Piece, int],
    num_layers: int,
) -> tuple[Pieces, list[Renaming]]:
    """Hand out each layer's experts on their own."""
    wanted: dict[str, set[Piece]] = {device_id: set() for device_id in planned}
    renamed = []
    for layer in range(num_layers):
        held_here, planned_here = (
            {d: frozenset(p for p in pieces if p.layer == layer) for d, pieces in part.items()}
            for part in (held, planned)
        )
        actual = hand_out(held_here, planned_here, groups, piece_bytes)
        for part, device_id in actual.items():
            wanted[device_id] |= planned_here[part]
        renamed += renamings(actual, layer)
    return {device_id: frozenset(pieces) for device_id, pieces in wanted.items()}, renamed


def renamings(actual: Mapping[str, str], layer: int | None) -> list[Renaming]:
    return [
        Renaming(planned=part, actual=device_id, layer=layer)
        for part, device_id in sorted(actual.items())
        if part != device_id
    ]


def renamed_stages(plan: StagesPlan, renamed: Sequence[Renaming], topology: Topology) -> StagesPlan:
    """Return the stages that a migration reaches: the new plan on the devices it was given."""
    actual = {renaming.planned: renaming.actual for renaming in renamed}
    devices = {device.id: device for device in topology.devices}
    stages = []
    for stage in plan.stages:
        device = devices[actual.get(stage.device_id, stage.device_id)]
        stages.append(replace(stage, device_id=device.id, node=device.node, kind=device.kind))
    left_out = tuple((actual.get(device_id, device_id), why) for device_id, why in plan.left_out)
    return replace(plan, stages=tuple(stages), left_out=left_out)


def renamed_holdings(
    holdings: Holdings, renamed: Sequence[Renaming]
) -> dict[str, tuple[frozenset[int], ...]]:
    """Return the experts that a migration reaches, by device."""
    actual = {(renaming.planned, renaming.layer): renaming.actual for renaming in renamed}
    num_layers = max(map(len, holdings.values()), default=0)
    reached: dict[str, list[frozenset[int]]] = {}
    for device_id in {*holdings, *(renaming.actual for renaming in renamed)}:
        reached[device_id] = [frozenset()] * num_layers
    for planned, layers in holdings.items():
        everywhere = actual.get((planned, None), planned)
        for layer, experts in enumerate(layers):
            reached[actual.get((planned, layer), everywhere)][layer] = frozenset(experts)
    return {device_id: tuple(layers) for device_id, layers in sorted(reached.items())}


def check_known(device_ids: Collection[str], topology: Topology) -> None:
    """Refuse devices that the topology lacks."""
    known = {device.id for device in topology.devices}
    if unknown := sorted(set(device_ids) - known):
        raise ValueError(
            f"{len(unknown)} devices are not in the topology ({', '.join(unknown)}); it has "
            f"{', '.join(sorted(known))}"
        )
