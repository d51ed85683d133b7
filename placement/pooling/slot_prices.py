"""What a slot costs on every device: seconds of its micro-batches, and bytes while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

from placement.pooling.pool import SlotOption
from placement.training import RecomputeGrain, Slot, TrainingCosts

BOUNDARY_BUFFERS = 4
"""One micro-batch's boundary activations: an input and an output, each twice, so that copies
overlap compute."""
_Number = TypeVar("_Number", int, float)


class SlotPrices:
    """Prefix sums over the layers, so that any contiguous range is priced in O(1) per device."""

    def __init__(self, costs: TrainingCosts, *, fused_forward_overlaps: bool = False) -> None:
        self.costs = costs
        self._fused_forward_overlaps = fused_forward_overlaps
        self._forward_s = [_prefix(row) for row in costs.forward_s]
        self._recompute_s = [_prefix(row) for row in costs.recompute_s]
        self._backward_s = [_prefix(row) for row in costs.backward_s]
        self._upload_s = [_prefix(row) for row in costs.weight_upload_s]
        self._weight_bytes = _prefix(costs.layer_weight_bytes)
        self._gradient_bytes = _prefix(costs.layer_gradient_bytes)
        self._activation_bytes = _prefix(costs.layer_activation_bytes)

    def options(
        self, slot: Slot, grain: RecomputeGrain, devices: Sequence[int] | None = None
    ) -> tuple[SlotOption, ...]:
        """Return the slot on each of `devices` (None: all)."""
        if devices is None:
            devices = range(self.costs.num_devices)
        return tuple(self.option(slot, grain, device) for device in devices)

    def option(self, slot: Slot, grain: RecomputeGrain, device: int) -> SlotOption:
        """Return the slot on one device.

        Only what needs nothing from the slot before leads: of a backward slot the recompute, and
        at layer grain that of its last layer, for the next recompute follows a backward pass.
        """
        upload_s = _between(self._upload_s[device], slot)
        forward_s = _between(self._forward_s[device], slot)
        backward_s = _between(self._backward_s[device], slot)
        if slot.kind == "forward":
            return SlotOption(device, 0.0, forward_s, upload_s)
        if slot.kind == "fused":
            forward_s += self.costs.head_forward_s[device]
            total_s = forward_s + backward_s + self.costs.head_backward_s[device]
            lead_s = forward_s if self._fused_forward_overlaps else 0.0
            upload_s += self.costs.head_upload_s[device]
            return SlotOption(device, lead_s, total_s, upload_s)
        if grain == "keep":
            return SlotOption(device, 0.0, backward_s, 0.0)
        lead_s = recompute_s = _between(self._recompute_s[device], slot)
        if grain == "layer":
            lead_s = self.costs.recompute_s[device][slot.end_layer - 1]
        return SlotOption(device, lead_s, recompute_s + backward_s, upload_s)

    def weight_bytes(self, slot: Slot, grain: RecomputeGrain = "none") -> int:
        """Return the weights that are brought for a slot, head included where it has it; none
        where they stayed with the activations."""
        if grain == "keep":
            return 0
        head_bytes = self.costs.head_weight_bytes if slot.kind == "fused" else 0
        return _between(self._weight_bytes, slot) + head_bytes

    def resident_bytes(self, slot: Slot, grain: RecomputeGrain) -> int:
        """Return weights, gradients and one micro-batch's activations, without the prefetch.

        Activations kept: all layers' in a fused slot, which recomputes nothing, and at stage
        grain; one layer's at layer grain and in a forward slot. What stays from a forward slot to
        its backward slot is `kept_bytes`; both still work on one layer's.
        """
        total = self.weight_bytes(slot, grain) + BOUNDARY_BUFFERS * self.costs.boundary_bytes
        if slot.kind == "fused":
            total += self.costs.head_gradient_bytes
        if slot.kind != "forward":
            total += _between(self._gradient_bytes, slot)
        if slot.kind == "fused" or grain == "stage":
            return total + _between(self._activation_bytes, slot)
        layers = self.costs.layer_activation_bytes[slot.first_layer : slot.end_layer]
        return total + max(layers, default=0)

    def kept_bytes(self, slot: Slot, micro_batches: int) -> int:
        """Return what stays of a forward slot for its backward slot: the activations of a round's
        micro-batches, and the weights that their backward passes need again."""
        return self.weight_bytes(slot) + micro_batches * _between(self._activation_bytes, slot)

    def alone_bytes(self, slot: Slot, grain: RecomputeGrain) -> int:
        """Return what a device needs to run nothing but this slot: weights once more, because
        the next slot's are brought while this one runs."""
        return self.resident_bytes(slot, grain) + self.weight_bytes(slot, grain)


def _prefix(values: Sequence[_Number]) -> list[_Number]:
    return list(accumulate(values, initial=values[0] - values[0]))


def _between(prefix: Sequence[_Number], slot: Slot) -> _Number:
    return prefix[slot.end_layer] - prefix[slot.first_layer]
