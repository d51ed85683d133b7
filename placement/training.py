"""What training one micro-batch costs on every device of a pool, and the visits a round makes.

Values only. A round sends its micro-batches through slots: forward stages in ascending order, one
fused stage that runs forward, loss and backward of the last layers in one visit, then backward
stages in descending order. The two partitions are independent of each other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

SlotKind = Literal["forward", "fused", "backward"]
RecomputeGrain = Literal["none", "stage", "layer", "keep"]
"""What a slot repeats before its backward passes: nothing (forward and fused slots), the whole
stage at once, or one layer at a time, which keeps one layer's activations instead of all. "keep":
nothing either, because a forward slot of the same layers kept its activations on this device."""
Grains = Literal["auto", "recompute"]
"""What a planner may choose from: anything, or nothing that keeps activations."""
Dispatch = Literal["earliest_finish", "round_robin"]
"""Which device a slot goes to: the one that is predicted to finish the slot's whole round first
(ties to the lowest index), or slot i, counted over all rounds, to device i mod D."""
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingCosts:
    """Seconds per micro-batch of every layer on every device, and bytes.

    D devices, L layers. Tuples over devices follow `device_ids`. What an embedding costs is part
    of layer 0; the head includes the final norm and the loss.
    """

    device_ids: tuple[str, ...]
    nodes: tuple[str, ...]
    """[D] The machine of each device."""
    forward_s: tuple[tuple[float, ...], ...]
    """[D][L] Without gradients."""
    recompute_s: tuple[tuple[float, ...], ...]
    """[D][L] The forward pass that a backward slot repeats."""
    backward_s: tuple[tuple[float, ...], ...]
    """[D][L] Without the recompute."""
    head_forward_s: tuple[float, ...]
    head_backward_s: tuple[float, ...]
    hand_off_s: tuple[tuple[float, ...], ...]
    """[D][D] Seconds to hand one micro-batch's boundary activations, or their gradients, from the
    first device to the second; 0 on the diagonal."""
    weight_upload_s: tuple[tuple[float, ...], ...]
    """[D][L] Seconds to bring a layer's weights; overlaps compute."""
    head_upload_s: tuple[float, ...]
    """[D] The same of the head's."""
    layer_weight_bytes: tuple[int, ...]
    layer_gradient_bytes: tuple[int, ...]
    """[L] In float32 whatever the weights are in; 0 where a layer is frozen."""
    head_weight_bytes: int
    head_gradient_bytes: int
    layer_activation_bytes: tuple[int, ...]
    """[L] What one micro-batch keeps of a layer between its forward (or recompute) and backward."""
    boundary_bytes: int
    """One micro-batch's activations between two layers."""
    memory_bytes: tuple[int, ...]
    """[D] What a slot may use, headroom already taken off."""

    def __post_init__(self) -> None:
        self._check_devices()
        num_layers = len(self.layer_weight_bytes)
        if not num_layers:
            raise ValueError("layer_weight_bytes has 0 entries; give one per layer, at least 1")
        for field in ("forward_s", "recompute_s", "backward_s", "weight_upload_s"):
            rows = getattr(self, field)
            self._check_length(field, rows, len(self.device_ids), "devices")
            for device_id, row in zip(self.device_ids, rows, strict=True):
                self._check_length(f"{field} of {device_id}", row, num_layers, "layers")
                _check_numbers(f"{field} of {device_id}", row, zero=field == "weight_upload_s")
        for field in ("head_forward_s", "head_backward_s", "head_upload_s"):
            self._check_length(field, getattr(self, field), len(self.device_ids), "devices")
            _check_numbers(field, getattr(self, field), zero=field == "head_upload_s")
        self._check_hand_offs()
        self._check_bytes(num_layers)

    @classmethod
    def uniform(
        cls,
        *,
        num_devices: int,
        num_layers: int,
        forward_s: float,
        backward_s: float,
        head_forward_s: float,
        head_backward_s: float,
        hand_off_s: float,
        speeds: Sequence[float] | None = None,
        layer_weight_bytes: int = 0,
        layer_gradient_bytes: int = 0,
        head_weight_bytes: int = 0,
        head_gradient_bytes: int = 0,
        layer_activation_bytes: int = 0,
        boundary_bytes: int = 0,
        memory_bytes: int = 0,
    ) -> TrainingCosts:
        """Return equal layers on devices that differ in speed only.

        A recompute takes as long as a forward pass and uploads take no time, as in published
        profiles. `speeds` divides the seconds of each device (not the hand-offs); 1 each when
        left out. Without bytes nothing is bounded by memory.
        """
        factors = [1.0] * num_devices if speeds is None else list(speeds)
        _check_numbers("speeds", factors, zero=False)
        if len(factors) != num_devices:
            raise ValueError(f"speeds has {len(factors)} entries for {num_devices} devices")
        names = tuple(f"gpu{index:0{len(str(num_devices - 1))}d}" for index in range(num_devices))
        forward = tuple((forward_s / factor,) * num_layers for factor in factors)
        return cls(
            device_ids=names,
            nodes=("node0",) * num_devices,
            forward_s=forward,
            recompute_s=forward,
            backward_s=tuple((backward_s / factor,) * num_layers for factor in factors),
            head_forward_s=tuple(head_forward_s / factor for factor in factors),
            head_backward_s=tuple(head_backward_s / factor for factor in factors),
            hand_off_s=tuple(
                tuple(0.0 if a == b else hand_off_s for b in range(num_devices))
                for a in range(num_devices)
            ),
            weight_upload_s=((0.0,) * num_layers,) * num_devices,
            head_upload_s=(0.0,) * num_devices,
            layer_weight_bytes=(layer_weight_bytes,) * num_layers,
            layer_gradient_bytes=(layer_gradient_bytes,) * num_layers,
            head_weight_bytes=head_weight_bytes,
            head_gradient_bytes=head_gradient_bytes,
            layer_activation_bytes=(layer_activation_bytes,) * num_layers,
            boundary_bytes=boundary_bytes,
            memory_bytes=(memory_bytes,) * num_devices,
        )

    @property
    def num_devices(self) -> int:
        return len(self.device_ids)

    @property
    def num_layers(self) -> int:
        return len(self.layer_weight_bytes)

    @property
    def is_uniform(self) -> bool:
        """All devices have equal costs, memory and links: no slot prefers one of them."""
        rows = zip(
            self.forward_s,
            self.recompute_s,
            self.backward_s,
            self.weight_upload_s,
            self.head_forward_s,
            self.head_backward_s,
            self.head_upload_s,
            self.memory_bytes,
            strict=True,
        )
        links = {
            seconds
            for source, row in enumerate(self.hand_off_s)
            for target, seconds in enumerate(row)
            if source != target
        }
        return len(set(rows)) == 1 and len(links) <= 1

    def in_order(self, order: Sequence[int]) -> TrainingCosts:
        """Return the costs of the devices `order`, which may leave some out."""

        def rows(values: Sequence[_Value]) -> tuple[_Value, ...]:
            return tuple(values[index] for index in order)

        return TrainingCosts(
            device_ids=rows(self.device_ids),
            nodes=rows(self.nodes),
            forward_s=rows(self.forward_s),
            recompute_s=rows(self.recompute_s),
            backward_s=rows(self.backward_s),
            head_forward_s=rows(self.head_forward_s),
            head_backward_s=rows(self.head_backward_s),
            hand_off_s=tuple(rows(row) for row in rows(self.hand_off_s)),
            weight_upload_s=rows(self.weight_upload_s),
            head_upload_s=rows(self.head_upload_s),
            layer_weight_bytes=self.layer_weight_bytes,
            layer_gradient_bytes=self.layer_gradient_bytes,
            head_weight_bytes=self.head_weight_bytes,
            head_gradient_bytes=self.head_gradient_bytes,
            layer_activation_bytes=self.layer_activation_bytes,
            boundary_bytes=self.boundary_bytes,
            memory_bytes=rows(self.memory_bytes),
        )

    def slowed(self, factors: Mapping[str, float]) -> TrainingCosts:
        """Return the costs with the seconds of some devices, by id, times a factor each."""
        by_device = [factors.get(device_id, 1.0) for device_id in self.device_ids]

        def rows(values: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
            return tuple(
                tuple(factor * seconds for seconds in row)
                for factor, row in zip(by_device, values, strict=True)
            )

        [head_forward_s] = zip(*rows([[seconds] for seconds in self.head_forward_s]), strict=True)
        [head_backward_s] = zip(*rows([[seconds] for seconds in self.head_backward_s]), strict=True)
        return replace(
            self,
            forward_s=rows(self.forward_s),
            recompute_s=rows(self.recompute_s),
            backward_s=rows(self.backward_s),
            head_forward_s=head_forward_s,
            head_backward_s=head_backward_s,
        )

    def _check_devices(self) -> None:
        if not self.device_ids:
            raise ValueError("the pool has 0 devices; give at least 1")
        for device_id, count in Counter(self.device_ids).items():
            if not device_id:
                raise ValueError("a device has an empty id; give every device a name")
            if count > 1:
                raise ValueError(f"{count} devices are called {device_id}; give each its own id")
        self._check_length("nodes", self.nodes, len(self.device_ids), "devices")

    def _check_hand_offs(self) -> None:
        self._check_length("hand_off_s", self.hand_off_s, len(self.device_ids), "devices")
        for index, (device_id, row) in enumerate(
            zip(self.device_ids, self.hand_off_s, strict=True)
        ):
            self._check_length(f"hand_off_s of {device_id}", row, len(self.device_ids), "devices")
            _check_numbers(f"hand_off_s of {device_id}", row, zero=True)
            if row[index]:
                raise ValueError(
                    f"hand_off_s from {device_id} to itself is {row[index]}; it must be 0"
                )

    def _check_bytes(self, num_layers: int) -> None:
        for field in ("layer_weight_bytes", "layer_gradient_bytes", "layer_activation_bytes"):
            self._check_length(field, getattr(self, field), num_layers, "layers")
            _check_numbers(field, getattr(self, field), zero=True)
        self._check_length("memory_bytes", self.memory_bytes, len(self.device_ids), "devices")
        _check_numbers("memory_bytes", self.memory_bytes, zero=True)
        for field in ("head_weight_bytes", "head_gradient_bytes", "boundary_bytes"):
            _check_numbers(field, [getattr(self, field)], zero=True)

    @staticmethod
    def _check_length(field: str, values: Sequence[object], expected: int, of: str) -> None:
        if len(values) != expected:
            raise ValueError(f"{field} has {len(values)} entries for {expected} {of}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One visit of layers [first_layer, end_layer) to some device in every round."""

    kind: SlotKind
    first_layer: int
    end_layer: int
    """The fused slot ends at the last layer and may hold none: then it is the head alone."""


def slots_from_counts(
    forward: Sequence[int], fused: int, backward: Sequence[int]
) -> tuple[Slot, ...]:
    """Return a round's slots from layer counts in the order in which the stages run.

    `forward` ascends from layer 0, `fused` takes the last layers (0: the head alone), and
    `backward` descends to layer 0.

    Raises:
        ValueError: A count is below 1 (below 0 for `fused`), or the two partitions differ.
    """
    if min((*forward, *backward), default=1) < 1 or fused < 0:
        raise ValueError(
            f"layer counts {list(forward)}, {fused}, {list(backward)} must be at least 1 each, "
            f"the fused one at least 0"
        )
    if sum(forward) != sum(backward):
        raise ValueError(
            f"forward stages hold {sum(forward)} layers and backward stages {sum(backward)}; "
            f"both must hold all layers below the fused stage"
        )
    slots = []
    first = 0
    for count in forward:
        slots.append(Slot(kind="forward", first_layer=first, end_layer=first + count))
        first += count
    slots.append(Slot(kind="fused", first_layer=first, end_layer=first + fused))
    for count in backward:
        slots.append(Slot(kind="backward", first_layer=first - count, end_layer=first))
        first -= count
    return tuple(slots)


def _check_numbers(field: str, values: Sequence[float], *, zero: bool) -> None:
    for index, value in enumerate(values):
        # The negated form refuses NaN as well.
        if not (math.isfinite(value) and (value >= 0 if zero else value > 0)):
            bound = "0 or more" if zero else "above 0"
            raise ValueError(f"{field}: entry {index} ({value}) must be {bound} and finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotSchedule:
    """How a pool of devices works through rounds."""

    slots: tuple[Slot, ...]
    micro_batches: int
    """In one round; a slot runs all of them back to back on one device."""
    dispatch: Dispatch = "earliest_finish"
    grains: tuple[RecomputeGrain, ...] | None = None
    """One per slot; None: whole stages."""
    devices: tuple[tuple[int, ...], ...] | None = None
    """Per slot, the indices of the devices that may run it; None: all."""
    rounds_per_step: int | None = None
    """Rounds between two optimizer steps. A round waits for all rounds of the steps before the
    last `staleness` ones; None: rounds wait for nothing, as if steps were far apart."""
    staleness: int = 1
    """1: gradients may be one step old (asynchronous optimizer); 0: never (flush at each step)."""
    fused_forward_overlaps: bool = False
    """Let the fused slot's forward pass begin before its input has arrived, like a recompute.
    Impossible on a machine, yet how the published RoundPipe figures were simulated."""

    @property
    def num_forward(self) -> int:
        """How many forward slots precede the fused one."""
        return sum(slot.kind == "forward" for slot in self.slots)

    @property
    def grain_list(self) -> tuple[RecomputeGrain, ...]:
        """One grain per slot, also where `grains` is left out."""
        if self.grains is not None:
            return self.grains
        return tuple("stage" if slot.kind == "backward" else "none" for slot in self.slots)

    def __post_init__(self) -> None:
        if not self.slots:
            raise ValueError("a schedule has 0 slots; give at least the fused one")
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches ({self.micro_batches}) must be at least 1")
        if self.rounds_per_step is not None and self.rounds_per_step < 1:
            raise ValueError(f"rounds_per_step ({self.rounds_per_step}) must be at least 1")
        if self.staleness not in (0, 1):
            raise ValueError(f"staleness ({self.staleness}) must be 0 or 1")
        for field in ("grains", "devices"):
            values = getattr(self, field)
            if values is not None and len(values) != len(self.slots):
                raise ValueError(f"{field} has {len(values)} entries for {len(self.slots)} slots")
        for index, devices in enumerate(self.devices or ()):
            if not devices:
                raise ValueError(f"slot {index} may run on 0 devices; give at least 1")
        self._check_kept()

    @property
    def kept_with(self) -> tuple[int | None, ...]:
        """Per slot, the slot that runs on the same device in the same round because activations
        stay there: of a backward slot of grain "keep" the forward slot of its layers, and back."""
        forward = {
            (slot.first_layer, slot.end_layer): index
            for index, slot in enumerate(self.slots)
            if slot.kind == "forward"
        }
        partners: list[int | None] = [None] * len(self.slots)
        for index, (slot, grain) in enumerate(zip(self.slots, self.grain_list, strict=True)):
            if grain == "keep":
                source = forward[slot.first_layer, slot.end_layer]
                partners[source], partners[index] = index, source
        return tuple(partners)

    def _check_kept(self) -> None:
        ranges = [
            (slot.first_layer, slot.end_layer) for slot in self.slots if slot.kind == "forward"
        ]
        for index, (slot, grain) in enumerate(zip(self.slots, self.grain_list, strict=True)):
            if grain != "keep":
                continue
            if slot.kind != "backward" or (slot.first_layer, slot.end_layer) not in ranges:
                raise ValueError(
                    f"slot {index} ({slot.kind}, layers [{slot.first_layer}, {slot.end_layer})) "
                    f"keeps activations, yet no forward slot has just these layers"
                )
            if self.dispatch == "round_robin":
                raise ValueError(
                    f"slot {index} keeps activations on the device of its forward slot; "
                    f"round_robin may send it elsewhere, so use earliest_finish"
                )
