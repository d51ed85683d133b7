"""EPLB: the expert load balancer that DeepSeek published, as a mode and as a baseline.

Every device counts as equal and takes the same number of slots; an expert's rows are split equally
over its slots; nothing is known of the placement in force. Two slots of one expert may land on one
device. The steps are those of github.com/deepseek-ai/EPLB (MIT), worked anew from its description,
and reproduce the example of its README.

Ties go to the lower index everywhere, so equal loads give equal placements.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class EplbPlacement(NamedTuple):
    """Which expert every slot holds; slot p lies on device p // (slots / devices)."""

    expert_of_slot: NDArray[np.int64]
    """[layers, slots] the expert in each slot."""
    slots_of_expert: NDArray[np.int64]
    """[layers, experts, most replicas] its slots in ascending order, padded with -1."""
    num_replicas: NDArray[np.int64]
    """[layers, experts] how many slots each expert has."""


def rebalance_experts(
    load_rows: NDArray[np.float64],
    *,
    num_slots: int,
    num_devices: int,
    num_nodes: int = 1,
    num_groups: int = 1,
) -> EplbPlacement:
    """Place `load_rows` [layers, experts] on equal devices, each layer on its own.

    When the nodes divide the groups (consecutive experts), a group stays on one node: groups are
    packed onto nodes, experts replicated within a node, replicas packed onto its devices.
    Otherwise the same with one group and one node.
    O(layers x (slots log slots + slots log devices)).

    Raises:
        ValueError: The devices do not divide the slots, the nodes the devices or the groups the
            experts, or there are fewer slots than experts.
    """
    num_experts = load_rows.shape[1]
    _check_divides("num_slots", num_slots, "num_devices", num_devices)
    _check_divides("num_devices", num_devices, "num_nodes", num_nodes)
    _check_divides("experts", num_experts, "num_groups", num_groups)
    if num_slots < num_experts:
        raise ValueError(
            f"num_slots ({num_slots}) must hold every one of {num_experts} experts; raise it"
        )
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    layers = [
        _rebalance_layer(loads.tolist(), num_slots, num_devices, num_nodes, num_groups)
        for loads in load_rows
    ]
    expert_of_slot = np.array(layers, dtype=np.int64).reshape(len(layers), num_slots)
    return _indexed(expert_of_slot, num_experts)


def pack_balanced(loads: Sequence[float], num_bins: int) -> list[int]:
    """Return a bin for every item: as many items in each bin, the fullest as light as possible.

    Longest first into the lightest bin that is not full; O(items log items).
    """
    if len(loads) == num_bins:
        return list(range(num_bins))
    items_per_bin = len(loads) // num_bins
    lightest = [(0.0, index) for index in range(num_bins)]
    num_items = [0] * num_bins
    bins = [0] * len(loads)
    for item in _heaviest_first(loads):
        load, index = lightest[0]
        bins[item] = index
        num_items[index] += 1
        if num_items[index] < items_per_bin:
            heapq.heapreplace(lightest, (load + loads[item], index))
        else:
            heapq.heappop(lightest)
    return bins


def replicate(loads: Sequence[float], num_replicas: int) -> tuple[list[int], list[int]]:
    """Return the expert of every replica, and how many replicas each expert has.

    Each spare replica goes to the expert with the most rows per replica, which minimises that
    maximum exactly; O(replicas log experts).
    """
    experts = list(range(len(loads)))
    counts = [1] * len(loads)
    fullest = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(fullest)
    for _ in range(num_replicas - len(loads)):
        expert = fullest[0][1]
        counts[expert] += 1
        experts.append(expert)
        heapq.heapreplace(fullest, (-loads[expert] / counts[expert], expert))
    return experts, counts


def _rebalance_layer(
    loads: Sequence[float], num_slots: int, num_devices: int, num_nodes: int, num_groups: int
) -> list[int]:
    """Return the expert of every slot of one layer."""
    experts_per_group = len(loads) // num_groups
    group_loads = [
        sum(loads[first : first + experts_per_group])
        for first in range(0, len(loads), experts_per_group)
    ]
    node_of_group = pack_balanced(group_loads, num_nodes)
    slots: list[int] = []
    for node in range(num_nodes):
        # In the order in which the groups joined their node: the heaviest first.
        joined = list(range(num_groups))
        if num_groups > num_nodes:
            joined = _heaviest_first(group_loads)
        experts = [
            group * experts_per_group + offset
            for group in joined
            if node_of_group[group] == node
            for offset in range(experts_per_group)
        ]
        slots += _fill_node(experts, loads, num_slots // num_nodes, num_devices // num_nodes)
    return slots


def _fill_node(
    experts: Sequence[int], loads: Sequence[float], num_slots: int, num_devices: int
) -> list[int]:
    """Return the expert of every slot of a node, device by device."""
    replicas, counts = replicate([loads[expert] for expert in experts], num_slots)
    shares = [loads[experts[local]] / counts[local] for local in replicas]
    bins = pack_balanced(shares, num_devices)
    order = _heaviest_first(shares) if num_slots > num_devices else range(num_slots)
    # The sort is stable, so a device keeps its replicas in the order in which it got them.
    return [experts[replicas[slot]] for slot in sorted(order, key=lambda slot: bins[slot])]


def _heaviest_first(loads: Sequence[float]) -> list[int]:
    return sorted(range(len(loads)), key=lambda item: -loads[item])


def _indexed(expert_of_slot: NDArray[np.int64], num_experts: int) -> EplbPlacement:
    """Add the way back from an expert to its slots."""
    num_layers, num_slots = expert_of_slot.shape
    num_replicas = np.zeros((num_layers, num_experts), dtype=np.int64)
    for layer, experts in enumerate(expert_of_slot):
        num_replicas[layer] = np.bincount(experts, minlength=num_experts)
    slots_of_expert = np.full(
        (num_layers, num_experts, int(num_replicas.max(initial=1))), -1, dtype=np.int64
    )
    for layer, experts in enumerate(expert_of_slot.tolist()):
        rank = [0] * num_experts
        for slot in range(num_slots):
            slots_of_expert[layer, experts[slot], rank[experts[slot]]] = slot
            rank[experts[slot]] += 1
    return EplbPlacement(expert_of_slot, slots_of_expert, num_replicas)


def _check_divides(total_name: str, total: int, parts_name: str, parts: int) -> None:
    if parts < 1 or total < 1 or total % parts:
        raise ValueError(
            f"{parts_name} ({parts}) must divide {total_name} ({total}) and both be at least 1"
        )
