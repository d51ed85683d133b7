"""Expert maps for tests: who holds what, and rows cut evenly between replicas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from actors.engine.checkpoint import Checkpoint
from actors.engine.expert_calls import Piece
from actors.engine.expert_host import ExpertHost
from actors.engine.expert_slots import ExpertSlots
from actors.expert_links import ExpertNode


@dataclass(frozen=True)
class EvenRoutes:
    """Every layer alike: `holders[expert]` are the devices of its replicas."""

    version: int
    holders: Sequence[Sequence[str]]
    nodes: Sequence[ExpertNode] = ()

    def split(
        self, layer: int, counts_E: Sequence[int], *, with_guests: bool = True
    ) -> list[Piece]:
        """Cut an expert's rows evenly; who comes first is another replica in every layer."""
        pieces = []
        for expert, count in enumerate(counts_E):
            devices = self.holders[expert]
            for i in range(len(devices)):
                rows = (count + i) // len(devices)
                if rows:
                    pieces.append(Piece(devices[(i + layer) % len(devices)], expert, rows))
        return pieces

    def held_by(self, device: str) -> list[int]:
        return [expert for expert, devices in enumerate(self.holders) if device in devices]


@dataclass(frozen=True)
class GuestRoutes(EvenRoutes):
    """The rows of some experts, by expert, go to a device that does not hold it."""

    guests: Mapping[int, str] = field(default_factory=dict)

    def split(
        self, layer: int, counts_E: Sequence[int], *, with_guests: bool = True
    ) -> list[Piece]:
        brought = self.guests if with_guests else {}
        pieces = [piece for piece in super().split(layer, counts_E) if piece.expert not in brought]
        pieces += [
            Piece(device, expert, counts_E[expert], is_guest=True)
            for expert, device in brought.items()
            if counts_E[expert]
        ]
        return sorted(pieces, key=lambda piece: piece.expert)


def spread(
    devices: Sequence[str], num_experts: int, *, replicas: int = 1, version: int = 0, shift: int = 0
) -> EvenRoutes:
    """Deal experts out to devices in turn, `replicas` of each on devices that follow each other."""
    return EvenRoutes(
        version,
        [
            [devices[(expert + shift + i) % len(devices)] for i in range(replicas)]
            for expert in range(num_experts)
        ],
    )


def experts_by_layer(layers: Iterable[int], experts: Sequence[int]) -> dict[int, list[int]]:
    return {layer: list(experts) for layer in layers}


def open_hosts(
    checkpoint: Checkpoint, devices: Sequence[str], routes: EvenRoutes, *, spare: int = 0
) -> Mapping[str, ExpertHost]:
    """Hosts that hold what the routes say, each with `spare` slots more for every layer."""
    hosts = {}
    for device in devices:
        held = routes.held_by(device)
        slots = ExpertSlots(checkpoint, max(1, len(held) + spare) * checkpoint.num_layers)
        hosts[device] = ExpertHost(slots)
        hosts[device].prepare(routes.version, experts_by_layer(slots.layers, held))
    return hosts
