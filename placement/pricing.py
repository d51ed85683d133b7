"""What every possible stage would cost: bytes on any device, seconds on each that can hold it."""

from __future__ import annotations

from placement.costs import (
    embedding_step_s,
    layer_step_s,
    stage_activation_bytes,
    stage_kv_bytes,
    stage_weight_bytes,
)
from placement.topology import Device
from placement.workload import ModelProfile, ServingWorkload


class StagePrices:
    """The price list of one planning question."""

    def __init__(
        self,
        profile: ModelProfile,
        devices: tuple[Device, ...],
        workload: ServingWorkload,
        headroom_fraction: float,
    ) -> None:
        self.profile = profile
        self.devices = devices
        self.workload = workload
        self.headroom_fraction = headroom_fraction
        num_layers = profile.num_layers
        self.need_bytes = [
            [self._need_bytes(first, end) for end in range(first + 1, num_layers + 1)]
            for first in range(num_layers)
        ]
        """need_bytes[first_layer][n - 1]: weights, KV and activations of n layers."""
        self.steps_s = [self._steps_s(device) for device in devices]
        """steps_s[device][first_layer][n - 1]: one step of n layers, as far as they fit."""

    def cap_bytes(self, device: Device) -> int:
        """Return what a device offers after the headroom."""
        return int(device.memory_bytes * (1.0 - self.headroom_fraction))

    def fixed_bytes(self, first_layer: int, end_layer: int) -> int:
        """Return weights and activations: what a stage needs before its first KV token."""
        return stage_weight_bytes(self.profile, first_layer, end_layer) + stage_activation_bytes(
            self.profile,
            first_layer,
            end_layer,
            step_tokens=self.workload.step_tokens,
            head_tokens=self.workload.sequences_per_lane,
        )

    def unit_steps_s(self, device: Device) -> list[float]:
        """Return each layer's seconds, the embedding in the first and the head in the last."""
        rows, context_tokens = self.workload.sequences_per_lane, self.workload.context_tokens
        seconds_of = {
            layer: layer_step_s(device, layer, rows, context_tokens)
            for layer in dict.fromkeys(self.profile.layers)
        }
        units = [seconds_of[layer] for layer in self.profile.layers]
        units[0] += embedding_step_s(device, self.profile, rows)
        units[-1] += layer_step_s(device, self.profile.head, rows, 0)
        return units

    def lower_bound_s(self) -> float:
        """Return a time that the slowest stage of no cut can beat, in any order of the devices.

        Let t[d][l] be layer l's seconds on device d, and T[d] their sum. The larger of:
        - the largest over the layers of min over d of t[d][l]: a layer cannot be split;
        - sum over l of min over d of (t[d][l] / T[d]), over the sum of 1 / T[d]: the value of a
          feasible dual of the relaxation that lets every layer be shared out. Where one speed
          per device tells everything it is the total work over the combined speed.
        Devices whose memory holds no layer are left out; memory is otherwise ignored.
        """
        units = [
            self.unit_steps_s(device)
            for device, steps_s in zip(self.devices, self.steps_s, strict=True)
            if any(steps_s)
        ]
        totals = [sum(row) for row in units]
        layers = range(self.profile.num_layers)
        largest_s = max(min(row[layer] for row in units) for layer in layers)
        shares = sum(
            min(row[layer] / total for row, total in zip(units, totals, strict=True))
            for layer in layers
        )
        return max(largest_s, shares / sum(1.0 / total for total in totals))

    def _need_bytes(self, first_layer: int, end_layer: int) -> int:
        kv_bytes = stage_kv_bytes(self.profile, first_layer, end_layer, self.workload.kv_tokens)
        return self.fixed_bytes(first_layer, end_layer) + kv_bytes

    def _steps_s(self, device: Device) -> list[list[float]]:
        units = self.unit_steps_s(device)
        cap_bytes = self.cap_bytes(device)
        rows: list[list[float]] = []
        for first, needs in enumerate(self.need_bytes):
            row: list[float] = []
            step_s = 0.0
            # A longer stage never needs less memory, so the first misfit ends the row.
            for unit_s, need in zip(units[first:], needs, strict=True):
                if need > cap_bytes:
                    break
                step_s += unit_s
                row.append(step_s)
            rows.append(row)
        return rows
