"""What every possible stage and hop would cost: bytes, seconds and joules, as arrays.

Devices with equal figures are one *make* and are priced once; nodes are numbered by first use.
An entry that is not allowed (no layers, memory exceeded, nodes not joined) costs infinity, so a
search needs no second mask.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from placement.costs import (
    embedding_step_s,
    layer_step_s,
    memory_cap_bytes,
    occupied_s,
    stage_activation_bytes,
    stage_kv_bytes,
    stage_weight_bytes,
    transfer_s,
)
from placement.topology import Device, LinkRate, Topology
from placement.workload import ModelProfile, ServingWorkload

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_MOST_BYTES = 2**62
"""Sums of bytes stay within 64-bit integers."""


class StagePrices:
    """The price list of one planning question.

    O(makes x layers^2 + nodes^2) to build.

    Raises:
        ValueError: `headroom_fraction` is out of range, or the model needs 4 EiB or more.
    """

    def __init__(
        self,
        profile: ModelProfile,
        topology: Topology,
        workload: ServingWorkload,
        headroom_fraction: float,
    ) -> None:
        self.profile = profile
        self.topology = topology
        self.devices = topology.devices
        self.workload = workload
        self.headroom_fraction = headroom_fraction

        numbers: dict[Hashable, int] = {}
        make_of = [numbers.setdefault(_figures(device), len(numbers)) for device in self.devices]
        self.make_of: Ints = np.array(make_of, dtype=np.int64)
        """[device]"""
        self.makes = tuple(self.devices[make_of.index(make)] for make in range(len(numbers)))
        """One device of each make."""
        self.cap_bytes_of = tuple(
            memory_cap_bytes(device.memory_bytes, headroom_fraction) for device in self.devices
        )
        self.need_bytes = self._need_bytes()
        """[first layer, end layer] weights, KV and activations; meaningless where end <= first."""
        self.units_s = self._units_s()
        """[make, layer] one step, the embedding in the first and the head in the last."""
        self.steps_s = self._steps_s()
        """[make, first layer, end layer] one step of a stage; infinite where it does not fit."""
        self.holds_a_layer: NDArray[np.bool_] = np.isfinite(self.steps_s.min(axis=(1, 2)))
        """[make] whether any stage fits its memory."""

        self.nodes = tuple(dict.fromkeys(device.node for device in self.devices))
        numbers_of = {node: number for number, node in enumerate(self.nodes)}
        self.node_of: Ints = np.array([numbers_of[d.node] for d in self.devices], dtype=np.int64)
        """[device]"""
        self.hop_s, self.occupied_s = self._hops(numbers_of)
        """[node, node] until the rows of one step arrive, and while they keep the link busy;
        infinite where one cannot reach the other."""

    @property
    def num_layers(self) -> int:
        return self.profile.num_layers

    @property
    def hop_bytes(self) -> int:
        """Bytes of one step between two stages: a hidden row for every sequence."""
        return self.workload.sequences_per_lane * self.profile.hidden_bytes_per_token

    @property
    def watts(self) -> Floats | None:
        """[make] active power; None when some device's is not known."""
        watts = [device.active_power_w for device in self.makes]
        known = [value for value in watts if value is not None]
        return np.array(known) if len(known) == len(watts) else None

    @property
    def steps_j(self) -> Floats | None:
        """[make, first layer, end layer] joules of one step; None when some power is not known."""
        watts = self.watts
        return None if watts is None else self.steps_s * watts[:, None, None]

    def only(self, devices: Sequence[int]) -> StagePrices:
        """Return the prices of some of the devices; O(their makes x layers^2)."""
        part = copy(self)
        part.devices = tuple(self.devices[device] for device in devices)
        part.cap_bytes_of = tuple(self.cap_bytes_of[device] for device in devices)
        makes, part.make_of = np.unique(self.make_of[list(devices)], return_inverse=True)
        nodes, part.node_of = np.unique(self.node_of[list(devices)], return_inverse=True)
        part.makes = tuple(self.makes[make] for make in makes)
        part.nodes = tuple(self.nodes[node] for node in nodes)
        part.units_s, part.steps_s = self.units_s[makes], self.steps_s[makes]
        part.holds_a_layer = self.holds_a_layer[makes]
        joined = np.ix_(nodes, nodes)
        part.hop_s, part.occupied_s = self.hop_s[joined], self.occupied_s[joined]
        return part

    def fixed_bytes(self, first_layer: int, end_layer: int) -> int:
        """Return weights and activations: what a stage needs before its first KV token."""
        return stage_weight_bytes(self.profile, first_layer, end_layer) + self.activation_bytes(
            first_layer, end_layer
        )

    def activation_bytes(self, first_layer: int, end_layer: int) -> int:
        """Return the bytes of a stage's intermediate results."""
        return stage_activation_bytes(
            self.profile,
            first_layer,
            end_layer,
            step_tokens=self.workload.step_tokens,
            head_tokens=self.workload.sequences_per_lane,
        )

    def _whole_need_bytes(self, first_layer: int, end_layer: int) -> int:
        kv_bytes = stage_kv_bytes(self.profile, first_layer, end_layer, self.workload.kv_tokens)
        return self.fixed_bytes(first_layer, end_layer) + kv_bytes

    def _need_bytes(self) -> Ints:
        """Price the inner layers by running sums; the ends add what they add to any stage."""
        last = self.num_layers
        whole = self._whole_need_bytes(0, last)
        if whole >= _MOST_BYTES:
            raise ValueError(
                f"{self.profile.name} needs {whole} bytes with KV and activations, more than any "
                f"machine; lower kv_tokens ({self.workload.kv_tokens}) or step_tokens "
                f"({self.workload.step_tokens})"
            )
        layers = [
            layer.weight_bytes + layer.kv_bytes_per_token * self.workload.kv_tokens
            for layer in self.profile.layers
        ]
        sums = np.concatenate(([0], np.cumsum(np.array(layers, dtype=np.int64))))
        needs: Ints = sums[None, :] - sums[:-1, None]
        if last > 1:
            needs[:, :last] += self.activation_bytes(0, 1)
            needs[0, :last] += self._whole_need_bytes(0, 1) - needs[0, 1]
            needs[:, last] += self._whole_need_bytes(last - 1, last) - needs[last - 1, last]
        needs[0, last] = whole
        return needs

    def _units_s(self) -> Floats:
        rows, context_tokens = self.workload.sequences_per_lane, self.workload.context_tokens
        kinds = {layer: index for index, layer in enumerate(dict.fromkeys(self.profile.layers))}
        kind_of = [kinds[layer] for layer in self.profile.layers]
        units = np.array(
            [
                [layer_step_s(device, layer, rows, context_tokens) for layer in kinds]
                for device in self.makes
            ]
        )[:, kind_of]
        units[:, 0] += [embedding_step_s(device, self.profile, rows) for device in self.makes]
        units[:, -1] += [layer_step_s(device, self.profile.head, rows, 0) for device in self.makes]
        return units

    def _steps_s(self) -> Floats:
        last = self.num_layers
        first, end = np.arange(last)[:, None], np.arange(last + 1)[None, :]
        caps = np.zeros(len(self.makes), dtype=np.int64)
        caps[self.make_of] = [min(cap, _MOST_BYTES) for cap in self.cap_bytes_of]
        steps = np.zeros((len(self.makes), last, last + 1))
        # Summed from each first layer on, not as differences of one sum: no cancellation.
        ahead = np.where(end[:, 1:] > first, self.units_s[:, None, :], 0.0)
        np.cumsum(ahead, axis=2, out=steps[:, :, 1:])
        steps[(end <= first) | (self.need_bytes > caps[:, None, None])] = np.inf
        return steps

    def _hops(self, numbers_of: dict[str, int]) -> tuple[Floats, Floats]:
        size = len(self.nodes)
        # Only pairs that a link names, and a node with itself, can differ from the default.
        named = {(node, node) for node in self.nodes}
        for link in self.topology.links:
            if link.source_node in numbers_of and link.target_node in numbers_of:
                named.add((link.source_node, link.target_node))
                named.add((link.target_node, link.source_node))
        hop_s = np.full((size, size), self._transfer_s(self.topology.default_link))
        busy_s = np.full((size, size), self._occupied_s(self.topology.default_link))
        for source, target in sorted(named):
            at, rate = (numbers_of[source], numbers_of[target]), self.topology.rate(source, target)
            hop_s[at], busy_s[at] = self._transfer_s(rate), self._occupied_s(rate)
        return hop_s, busy_s

    def _transfer_s(self, rate: LinkRate | None) -> float:
        return np.inf if rate is None else transfer_s(rate, self.hop_bytes)

    def _occupied_s(self, rate: LinkRate | None) -> float:
        return np.inf if rate is None else occupied_s(rate, self.hop_bytes)


def _figures(device: Device) -> Hashable:
    """Return all of a device that its prices depend on."""
    return (
        device.flops_per_s,
        device.memory_bytes_per_s,
        device.memory_bytes,
        device.active_power_w,
        device.matmul_rates,
        device.measured_layers,
    )
