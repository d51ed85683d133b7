"""A map of experts as a stage's links divide rows by it: with where its devices are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actors import wire
from actors.engine.expert_calls import ExpertError, Piece
from actors.expert_links import ExpertNode
from placement.sharding.division import RowDivision
from placement.sharding.expert_map import ExpertMap


class MapRoutes:
    """One version of the map (see `actors.expert_links.NodeRoutes`)."""

    def __init__(
        self, division: RowDivision, layers: Sequence[int], workers: Mapping[str, wire.Address]
    ) -> None:
        """`layers` are the model's layers with experts, in the map's order; `workers` by device.

        Raises:
            ExpertError: A device of the map has no worker.
        """
        self._division = division
        self._index = {layer: index for index, layer in enumerate(layers)}
        self.nodes = nodes_of(division.map, workers)

    @property
    def version(self) -> int:
        return self._division.map.version

    def split(
        self, layer: int, counts_E: Sequence[int], *, with_guests: bool = True
    ) -> list[Piece]:
        parts = self._division.divide(self._index[layer], counts_E, with_guests=with_guests)
        return [Piece(*part) for part in parts]


def nodes_of(current: ExpertMap, workers: Mapping[str, wire.Address]) -> list[ExpertNode]:
    """Return the map's nodes with their workers; the first device of each is its front.

    Raises:
        ExpertError: A device of the map has no worker.
    """
    if missing := [device_id for device_id in current.device_ids if device_id not in workers]:
        raise ExpertError(
            f"expert map {current.version} names {missing}, where no worker is; use a map of the "
            f"devices {sorted(workers)}"
        )
    by_node: dict[str, dict[str, wire.Address]] = {}
    for device in current.devices:
        by_node.setdefault(device.node, {})[device.id] = workers[device.id]
    return [ExpertNode(next(iter(own)), own) for own in by_node.values()]


def held_by(current: ExpertMap, layers: Sequence[int], device_id: str) -> dict[int, list[int]]:
    """Return what a device holds, by the model's layers."""
    held = current.held(device_id)
    return {layer: sorted(own) for layer, own in zip(layers, held, strict=True) if own}
