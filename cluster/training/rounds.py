"""The visits of one round: what each needs, what it hands on, and what may be forgotten.

Pure bookkeeping over opaque references (`Reference`, a Ray object in production): no Ray, no
torch, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from actors.engine.training_values import (
    EMBEDDING_UNIT,
    LossScales,
    MicroBatch,
    RouterLoads,
    layer_unit,
)
from placement.train import PlannedSlot

Reference = Any


_NONE = -1
BoundaryKind = Literal["hidden", "gradient"]


class Boundary(NamedTuple):
    """The activations in front of a layer, or their gradient."""

    kind: BoundaryKind
    layer: int


class Visit:
    """One slot of one round: where it runs and how far it is."""

    def __init__(self, round_: Round, slot: PlannedSlot) -> None:
        self.round = round_
        self.slot = slot
        self.needs = _needs(slot)
        self.kinds: tuple[BoundaryKind, ...] = tuple(dict.fromkeys(b.kind for b in self.needs))
        """What it is fed, each kind in a stream of its own."""
        self.attempt = _NONE
        """Which assignment of the run this is; what an earlier one sends is not listened to."""
        self.device_id: str | None = None
        self.num_fed = dict.fromkeys(self.kinds, 0)
        """Micro-batches whose inputs were sent to the device."""
        self.left: dict[int, bool] = {}
        """Micro-batches whose last result stayed on the device."""
        self.local_from: Visit | None = None
        """The visit before, when it runs on the same device right before this one."""
        self.is_prepared = False
        """Its weights are on the device."""
        self.is_done = False

    @property
    def order(self) -> tuple[int, int]:
        """(round, slot): by and large the order in which visits are dispatched."""
        return self.round.index, self.slot.index

    @property
    def is_fed(self) -> bool:
        """All its inputs were sent: it ends without waiting for another visit."""
        return all(count == self.round.num_micro_batches for count in self.num_fed.values())

    def has_next(self, kind: BoundaryKind) -> bool:
        """Whether the inputs of the next micro-batch exist and were not sent yet."""
        m = self.num_fed[kind]
        if m == self.round.num_micro_batches:
            return False
        if any((b, m) not in self.round.outputs for b in self.boundaries(kind)):
            return False
        return kind == "hidden" or m in self.round.final_loads

    def boundaries(self, kind: BoundaryKind) -> list[Boundary]:
        """Return what it needs of a kind."""
        return [boundary for boundary in self.needs if boundary.kind == kind]

    def loads(self, kind: BoundaryKind, micro_batch: int) -> RouterLoads | None:
        """Return the router loads that go with an input: below the slot, or of all layers."""
        if kind == "gradient":
            return self.round.final_loads[micro_batch]
        return self.round.loads.get((self.slot.first_layer, micro_batch))

    def is_local(self, kind: BoundaryKind, micro_batch: int) -> bool:
        """Whether the input is still on the device, left there by the visit before."""
        before = self.local_from
        if before is None or not before.left.get(micro_batch):
            return False
        made = "hidden" if before.slot.kind == "forward" else "gradient"
        # A backward slot may need saved inputs besides; only the newest result is left there.
        return kind == made and len(self.boundaries(kind)) == 1 and kind == self.kinds[-1]

    def reset(self) -> None:
        """Forget where it ran; it will be dispatched again."""
        self.attempt = _NONE
        self.device_id = None
        self.num_fed = dict.fromkeys(self.kinds, 0)
        self.left = {}
        self.local_from = None
        self.is_prepared = False
        self.is_done = False


@dataclass(eq=False)
class Round:
    """Micro-batches on their way through all slots of a plan."""

    index: int
    """Counted over the whole run."""
    step: int
    """From 0."""
    number: int
    """Within the step."""
    slots: tuple[PlannedSlot, ...]
    batches: tuple[MicroBatch, ...]
    batches_reference: Reference
    first_micro_batch: int
    """The number of its first micro-batch within the step."""
    scales: LossScales
    version: int
    """Of the weights: how many optimizer steps are in them."""
    declared_s: Mapping[tuple[int, str], tuple[float, float]] = field(default_factory=dict)
    """(slot, paced device): seconds of a micro-batch, and how much of them needs no gradient."""
    is_trained: bool = True
    outputs: dict[tuple[Boundary, int], Reference] = field(default_factory=dict)
    loads: dict[tuple[int, int], RouterLoads | None] = field(default_factory=dict)
    """(layer, micro-batch): router loads of all layers below."""
    final_loads: dict[int, RouterLoads | None] = field(default_factory=dict)
    """Per micro-batch: of all layers."""
    losses: dict[int, float] = field(default_factory=dict)
    """Per micro-batch: summed cross-entropy."""
    visits: tuple[Visit, ...] = ()

    def __post_init__(self) -> None:
        self.use_slots(self.slots, self.declared_s)

    @property
    def has_begun(self) -> bool:
        """Some visit was sent to a device."""
        return any(visit.device_id is not None or visit.is_done for visit in self.visits)

    def use_slots(
        self,
        slots: tuple[PlannedSlot, ...],
        declared_s: Mapping[tuple[int, str], tuple[float, float]],
    ) -> None:
        """Go through other slots; only while the round has not begun."""
        self.slots, self.declared_s = slots, declared_s
        kinds = slots if self.is_trained else _forward_only(slots)
        self.visits = tuple(Visit(self, slot) for slot in kinds)

    @property
    def num_micro_batches(self) -> int:
        return len(self.batches)

    @property
    def is_done(self) -> bool:
        return all(visit.is_done for visit in self.visits)

    def saves(self, slot: PlannedSlot) -> tuple[int, ...]:
        """Return the layers in a forward slot whose inputs a backward slot will need.

        Its own input is somebody else's output already.
        """
        if slot.kind != "forward":
            return ()
        inner = range(slot.first_layer + 1, slot.end_layer)
        wanted = {boundary.layer for visit in self.visits for boundary in _inputs(visit)}
        return tuple(layer for layer in inner if layer in wanted)

    def declared(self, slot: PlannedSlot, device_id: str) -> tuple[float, float]:
        """Return what a paced device takes for a micro-batch of a slot: (all, its lead)."""
        declared: tuple[float, float] = self.declared_s[slot.index, device_id]
        return declared

    def partner(self, slot: PlannedSlot) -> Visit | None:
        """Return the visit that shares kept activations with a slot."""
        kept_with: int | None = getattr(slot, "kept_with", None)
        if kept_with is None or not self.is_trained:
            return None
        return self.visits[kept_with]

    def note(
        self, slot: PlannedSlot, micro_batch: int, loads: RouterLoads | None, loss: float | None
    ) -> None:
        """Take down what a forward or fused slot says of a micro-batch."""
        if slot.kind == "forward":
            self.loads[slot.end_layer, micro_batch] = loads
        elif slot.kind == "fused":
            self.final_loads[micro_batch] = loads
            assert loss is not None
            self.losses[micro_batch] = loss

    def lost_with(self, device_id: str) -> list[Visit]:
        """Return finished visits whose kept activations are gone with a device."""
        return [
            visit
            for visit in self.visits
            if visit.is_done
            and visit.device_id == device_id
            and visit.slot.kind == "forward"
            and (partner := self.partner(visit.slot)) is not None
            and not partner.is_done
        ]

    def forget_used(self) -> None:
        """Drop what no visit needs that runs, or may have to run again."""
        needed = set()
        for visit in self.visits:
            partner = self.partner(visit.slot)
            if not visit.is_done or (partner is not None and not partner.is_done):
                needed |= set(visit.needs)
        for key in [key for key in self.outputs if key[0] not in needed]:
            del self.outputs[key]


def units_of(slot: PlannedSlot, *, is_tied: bool, head_unit: str) -> tuple[str, ...]:
    """Return the units whose weights a slot needs, in order."""
    names = [layer_unit(layer) for layer in range(slot.first_layer, slot.end_layer)]
    if slot.kind == "fused":
        names.append(head_unit)
    if slot.first_layer == 0 or (slot.kind == "fused" and is_tied):
        names.insert(0, EMBEDDING_UNIT)
    return tuple(names)


def _forward_only(slots: Iterable[PlannedSlot]) -> list[PlannedSlot]:
    return [slot for slot in slots if slot.kind != "backward"]


def _inputs(visit: Visit) -> list[Boundary]:
    return [b for b in visit.needs if visit.slot.kind == "backward" and b.kind == "hidden"]


def _needs(slot: PlannedSlot) -> tuple[Boundary, ...]:
    """Return what a slot takes besides tokens and weights; what comes late is last."""
    first, end = slot.first_layer, slot.end_layer
    if slot.kind != "backward":
        return (Boundary("hidden", first),) if first else ()
    layers: Iterable[int] = {"keep": (), "layer": range(first, end)}.get(slot.grain, (first,))
    saved = tuple(Boundary("hidden", layer) for layer in layers if layer)
    return (*saved, Boundary("gradient", end))
