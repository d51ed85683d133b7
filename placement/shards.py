"""Stages without their experts, and the experts spread over every device that has room.

The alternative to stages that hold their layers' experts: attention and norms are cut into stages
as ever, the routed experts go to whoever has memory and speed, and every layer sends one message to
each remote node with rows for it and gets one back (the order of HALO's phases, Piper 2026).

A layer then takes its slowest node: message there, slowest device, message back. Experts computed
on the stage's own node need no message. What is left out: that messages of several lanes share a
link, and that experts and stages of one device overlap less than perfectly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placement.costs import (
    ACTIVATION_ROWS,
    expert_read_s,
    expert_row_s,
    expert_weight_bytes,
    layer_seconds,
    memory_cap_bytes,
    transfer_s,
)
from placement.experts import (
    ExpertDevice,
    ExpertObjective,
    ExpertPlan,
    plan_experts,
)
from placement.measured import MeasuredLayer
from placement.stages import StagesPlan, plan_stages
from placement.topology import Device, Topology
from placement.workload import DeviceOrder, LayerCost, ModelProfile, Objective, ServingWorkload

_EXPERTS_SHARE = 0.5
"""Of a training device's memory, to frozen experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertShards:
    """Where the routed experts of a model are."""

    experts: ExpertPlan
    """One layer for each layer with experts, in their order."""
    devices: tuple[ExpertDevice, ...]
    """All that the experts were planned over, by node, then id; also those that hold none."""
    spare_slots: int
    """Experts for which each device keeps room beside those it holds."""
    guest_slots: int
    """And for so many guests (`placement.sharding.reactive`) where devices share a node."""
    expert_layers: tuple[int, ...]
    """The model's layer of each layer of `experts`."""

    def num_slots(self, device: ExpertDevice) -> int:
        """Return for how many experts of any layer a device has room; 0: it holds none."""
        if not device.slots_per_layer:
            return 0
        most = min(device.slots_per_layer, len(self.experts.holdings(0)))
        return most * len(self.expert_layers) + self.spare_slots + self.num_guests(device)

    def num_guests(self, device: ExpertDevice) -> int:
        """Return for how many guests a device has room: they come from others of its node."""
        nodes = [other.node for other in self.devices]
        return _num_guests(nodes, device.node, self.guest_slots)

    def kept_bytes(self, profile: ModelProfile) -> dict[str, int]:
        """Return by device what experts take of its memory; `profile` is of the whole model."""
        bytes_each = expert_weight_bytes(profile.layers[self.expert_layers[0]])
        return {device.id: self.num_slots(device) * bytes_each for device in self.devices}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardsPlan(ExpertShards):
    """Stages of the dense part, shards of the experts, and what both predict together."""

    stages: StagesPlan
    """Of the model without its routed experts."""
    device_s: tuple[tuple[str, float], ...]
    """(device id, seconds it computes for one step, as stage and as shard)."""
    message_s: float
    """Messages to and from shards, summed over the layers of one step."""
    latency_s: float
    period_s: float
    """The largest of the busiest device, the busiest link and latency / lanes."""
    predicted_tokens_per_s: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {
            "stages": self.stages.to_json(),
            "experts": self.experts.to_json(),
            "devices": [asdict(device) for device in self.devices],
            "expert_layers": list(self.expert_layers),
            "device_s": [list(pair) for pair in self.device_s],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ShardsPlan:
        """Rebuild a plan from the values of `to_json`."""
        values = dict(value)
        values["stages"] = StagesPlan.from_json(value["stages"])
        values["experts"] = ExpertPlan.from_json(value["experts"])
        values["devices"] = tuple(ExpertDevice(**device) for device in value["devices"])
        values["expert_layers"] = tuple(value["expert_layers"])
        values["device_s"] = tuple((pair[0], pair[1]) for pair in value["device_s"])
        return cls(**values)


def plan_shards(
    profile: ModelProfile,
    topology: Topology,
    *,
    workload: ServingWorkload,
    headroom_fraction: float = 0.1,
    objective: Objective = "throughput",
    device_order: DeviceOrder = "free",
    layer_counts: Sequence[int] | None = None,
    expert_load: NDArray[np.float64] | None = None,
    spare_slots: int = 0,
    guest_slots: int = 0,
    num_spread: int = 0,
) -> ShardsPlan:
    """Cut the dense part into stages, then spread the experts over the memory that is left.

    Every device keeps room for `spare_slots` experts of any layer on the move, and devices that
    share a node for `guest_slots` guests. The
    `num_spread` hottest experts of a layer are held on two nodes while slots allow.
    `expert_load` [layers with experts, experts]: how often each is chosen, in any unit; None:
    equally often. Experts are balanced by rows, or by activated experts where reading their
    weights outlasts their rows on most of the devices.

    Raises:
        InfeasiblePlanError: The dense part, or one copy of every expert, does not fit.
        ValueError: The model has no experts, or layers with unequal ones, or the load is malformed.
    """
    layers = _expert_layers(profile)
    kind = profile.layers[layers[0]]
    stages = plan_stages(
        without_experts(profile),
        _topology_without_experts(topology),
        workload=workload,
        headroom_fraction=headroom_fraction,
        objective=objective,
        device_order=device_order,
        layer_counts=layer_counts,
    )
    rows = _rows(kind, len(layers), workload.sequences_per_lane, expert_load)
    # What arrives at a shard and what its experts make of it.
    activation_bytes = ACTIVATION_ROWS * profile.hidden_bytes_per_token * workload.step_tokens
    # What is not for slots on every device.
    nodes = [device.node for device in topology.devices]
    bytes_each = expert_weight_bytes(kind)
    kept_bytes = {
        device.id: (spare_slots + _num_guests(nodes, device.node, guest_slots)) * bytes_each
        for device in topology.devices
    }
    held_bytes = {d.id: activation_bytes + kept_bytes[d.id] for d in topology.devices}
    held_bytes |= {s.device_id: s.need_bytes + kept_bytes[s.device_id] for s in stages.stages}
    devices = _expert_devices(
        topology, stages, kind, len(layers), workload, held_bytes, headroom_fraction
    )
    experts = plan_experts(
        rows,
        devices,
        expert_bytes=expert_weight_bytes(kind),
        objective=_objective(devices, rows),
        num_spread=num_spread,
    )
    made = _assemble(profile, topology, workload, stages, experts, layers, devices)
    return replace(made, spare_slots=spare_slots, guest_slots=guest_slots)


def plan_training_shards(
    profile: ModelProfile,
    topology: Topology,
    *,
    rows: int,
    headroom_fraction: float = 0.1,
    spare_slots: int = 0,
    guest_slots: int = 0,
    num_spread: int = 0,
) -> ExpertShards:
    """Spread frozen experts over half of every device's memory; slots of training have the rest.

    Balanced for `rows` of a micro-batch that choose all experts equally often.

    Raises:
        InfeasiblePlanError: One copy of every expert does not fit.
        ValueError: The model has no experts, or layers with unequal ones.
    """
    layers = _expert_layers(profile)
    kind = profile.layers[layers[0]]
    bytes_each = expert_weight_bytes(kind)
    nodes = [device.node for device in topology.devices]
    devices = []
    for device in topology.devices:
        cap_bytes = memory_cap_bytes(device.memory_bytes, headroom_fraction)
        others = spare_slots + _num_guests(nodes, device.node, guest_slots)
        free_bytes = int(cap_bytes * _EXPERTS_SHARE) - others * bytes_each
        devices.append(
            ExpertDevice(
                id=device.id,
                node=device.node,
                rows_per_s=1.0 / expert_row_s(device, kind),
                slots_per_layer=max(0, free_bytes // (bytes_each * len(layers))),
                expert_read_s=expert_read_s(device, kind),
            )
        )
    return ExpertShards(
        experts=plan_experts(
            _rows(kind, len(layers), rows, None),
            devices,
            expert_bytes=bytes_each,
            num_spread=num_spread,
        ),
        devices=tuple(sorted(devices, key=lambda device: (device.node, device.id))),
        spare_slots=spare_slots,
        guest_slots=guest_slots,
        expert_layers=tuple(layers),
    )


def without_experts(profile: ModelProfile) -> ModelProfile:
    """Return the model as its stages see it when the routed experts live elsewhere."""

    return replace(profile, layers=tuple(_dense(layer) for layer in profile.layers))


def topology_of_stages(
    topology: Topology, expert_bytes: Mapping[str, int], headroom_fraction: float
) -> Topology:
    """Return the devices as stages see them: without the memory that is kept for experts.

    `expert_bytes` by device id; what was measured of whole layers holds for their dense part.
    """
    dense = _topology_without_experts(topology)
    devices = []
    for device in dense.devices:
        kept_bytes = math.ceil(expert_bytes.get(device.id, 0) / (1.0 - headroom_fraction))
        devices.append(replace(device, memory_bytes=max(1, device.memory_bytes - kept_bytes)))
    return replace(dense, devices=tuple(devices))


def _topology_without_experts(topology: Topology) -> Topology:
    return replace(topology, devices=tuple(_measured_without_experts(d) for d in topology.devices))


def _dense(layer: LayerCost) -> LayerCost:
    if not layer.routed_bytes:
        return layer
    per_row = layer.flops_per_token * _routed_share(layer)
    return replace(
        layer,
        flops_per_token=layer.flops_per_token - per_row,
        weight_bytes=layer.weight_bytes - layer.routed_bytes,
        routed_bytes=0,
        num_experts=0,
        experts_per_token=0,
    )


def _measured_without_experts(device: Device) -> Device:
    """Carry what was measured of layers with experts over to their dense part.

    Measured over predicted seconds of the whole layer is taken to hold for both of its parts.
    """
    bare = replace(device, measured_layers=())
    measured = []
    for each in device.measured_layers:
        whole, dense = layer_seconds(bare, each.layer), layer_seconds(bare, _dense(each.layer))
        samples = tuple(
            replace(
                sample,
                forward_s=sample.forward_s
                * dense.step_s(sample.tokens, sample.context_tokens, sample.pairs)
                / whole.step_s(sample.tokens, sample.context_tokens, sample.pairs),
            )
            for sample in each.samples
        )
        measured.append(MeasuredLayer(layer=_dense(each.layer), samples=samples))
    return replace(bare, measured_layers=tuple(measured))


def _slowdown(device: Device, layer: LayerCost, workload: ServingWorkload) -> float:
    """Return a layer's seconds as measured over those of peak rate and bandwidth alone."""
    rows, context_tokens = workload.sequences_per_lane, workload.context_tokens
    peak = replace(device, measured_layers=(), matmul_rates=())
    return layer_seconds(device, layer).step_s(rows, context_tokens) / layer_seconds(
        peak, layer
    ).step_s(rows, context_tokens)


def _routed_share(layer: LayerCost) -> float:
    """Share of a row's FLOPs that its chosen experts do: FLOPs go with the weights they use."""
    chosen_bytes = expert_weight_bytes(layer) * layer.experts_per_token
    return chosen_bytes / (layer.weight_bytes - layer.routed_bytes + chosen_bytes)


def _num_guests(nodes: Sequence[str], node: str, guest_slots: int) -> int:
    """Return a device's room for guests; `nodes` of all devices."""
    return guest_slots if nodes.count(node) > 1 else 0


def _expert_layers(profile: ModelProfile) -> list[int]:
    layers = [index for index, layer in enumerate(profile.layers) if layer.routed_bytes]
    if not layers:
        raise ValueError(
            f"{profile.name} has no routed experts; plan its stages alone (plan.experts: stages; "
            "to train, training.experts: layers)"
        )
    kinds = {(profile.layers[i].num_experts, profile.layers[i].routed_bytes) for i in layers}
    if len(kinds) > 1:
        raise ValueError(
            f"{profile.name} has {len(kinds)} sizes of expert layers; shards need one size"
        )
    return layers


def _rows(
    kind: LayerCost, num_layers: int, rows: int, expert_load: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """Return the rows of one step that each expert of each layer gets."""
    shape = (num_layers, kind.num_experts)
    load = np.ones(shape) if expert_load is None else np.asarray(expert_load, dtype=np.float64)
    if load.shape != shape:
        raise ValueError(f"expert_load has shape {load.shape}; the model needs {shape}")
    sums = load.sum(axis=1, keepdims=True)
    if not (np.isfinite(load).all() and (load >= 0).all() and (sums > 0).all()):
        raise ValueError("expert_load must be finite, 0 or more, and above 0 in every layer")
    return np.asarray(load / sums * rows * kind.experts_per_token)


def _expert_devices(
    topology: Topology,
    stages: StagesPlan,
    kind: LayerCost,
    num_layers: int,
    workload: ServingWorkload,
    held_bytes: Mapping[str, int],
    headroom_fraction: float,
) -> list[ExpertDevice]:
    expert_bytes = expert_weight_bytes(kind)
    stage_nodes = {stage.node for stage in stages.stages}
    reachable = {
        device.node
        for device in topology.devices
        if all(
            topology.rate(node, device.node) and topology.rate(device.node, node)
            for node in stage_nodes
        )
    }
    devices = []
    for device in topology.devices:
        free_bytes = memory_cap_bytes(device.memory_bytes, headroom_fraction)
        free_bytes -= held_bytes[device.id]
        can_hold = device.node in reachable and free_bytes > 0
        slots = free_bytes // (expert_bytes * num_layers) if can_hold else 0
        slowdown = _slowdown(device, kind, workload)
        devices.append(
            ExpertDevice(
                id=device.id,
                node=device.node,
                rows_per_s=1.0 / (expert_row_s(device, kind) * slowdown),
                slots_per_layer=slots,
                expert_read_s=expert_read_s(device, kind) * slowdown,
            )
        )
    return devices


def _objective(devices: Sequence[ExpertDevice], rows: NDArray[np.float64]) -> ExpertObjective:
    """Count what takes longer on most devices: an expert's rows, or reading its weights."""
    mean_rows = float(rows.mean())
    read_bound = [(d.expert_read_s or 0.0) > mean_rows / d.rows_per_s for d in devices]
    return "activated" if 2 * sum(read_bound) > len(devices) else "rows"


def _assemble(
    profile: ModelProfile,
    topology: Topology,
    workload: ServingWorkload,
    stages: StagesPlan,
    experts: ExpertPlan,
    layers: Sequence[int],
    devices: Sequence[ExpertDevice],
) -> ShardsPlan:
    node_of = {device.id: device.node for device in topology.devices}
    stage_of = {
        layer: stage.node
        for stage in stages.stages
        for layer in range(stage.first_layer, stage.end_layer)
    }
    row_bytes = profile.hidden_bytes_per_token * workload.sequences_per_lane
    latency_s, message_s = stages.latency_s, 0.0
    for index, layer in enumerate(layers):
        compute_s, with_messages_s = _layer_s(
            topology, experts, index, node_of, stage_of[layer], row_bytes
        )
        latency_s += with_messages_s
        message_s += with_messages_s - compute_s
    busy_s = _busy_s(stages, experts)
    period_s = max(max(busy_s.values()), stages.busiest_hop_s, latency_s / workload.lanes)
    return ShardsPlan(
        stages=stages,
        experts=experts,
        devices=tuple(sorted(devices, key=lambda device: (device.node, device.id))),
        spare_slots=0,
        guest_slots=0,
        expert_layers=tuple(layers),
        device_s=tuple(sorted(busy_s.items())),
        message_s=message_s,
        latency_s=latency_s,
        period_s=period_s,
        predicted_tokens_per_s=workload.sequences_per_lane / period_s,
    )


def _layer_s(
    topology: Topology,
    experts: ExpertPlan,
    index: int,
    node_of: Mapping[str, str],
    stage_node: str,
    row_bytes: int,
) -> tuple[float, float]:
    """Return one layer's slowest device, and its slowest node with messages.

    A message carries at most every row of the step once: a node fans rows out to its experts.
    """
    by_node: dict[str, float] = {}
    for device_id, seconds in zip(experts.device_ids, experts.layers[index].device_s, strict=True):
        if seconds > 0:
            node = node_of[device_id]
            by_node[node] = max(by_node.get(node, 0.0), seconds)
    slowest_s = max(by_node.values(), default=0.0)
    finish_s = [
        seconds
        if node == stage_node
        else seconds
        + transfer_s(topology.link(stage_node, node), row_bytes)
        + transfer_s(topology.link(node, stage_node), row_bytes)
        for node, seconds in by_node.items()
    ]
    return slowest_s, max(finish_s, default=0.0)


def _busy_s(stages: StagesPlan, experts: ExpertPlan) -> dict[str, float]:
    busy_s = {stage.device_id: stage.step_s for stage in stages.stages}
    for position, device_id in enumerate(experts.device_ids):
        expert_s = sum(layer.device_s[position] for layer in experts.layers)
        busy_s[device_id] = busy_s.get(device_id, 0.0) + expert_s
    return busy_s
