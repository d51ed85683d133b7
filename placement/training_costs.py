"""Seconds and bytes of training: with `placement.costs`, where every formula lives.

Sources:
- A backward pass does two products for each of the forward's, one for the input's gradient and
  one for the weights' (Kaplan et al., "Scaling Laws for Neural Language Models", 2020, section
  2.1): twice the forward's seconds where it was not measured.
- Memory of a training pipeline: the resource model of Piper (Dash and Wang, 2026), with its
  attention term re-derived: see `saved_activation_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from placement.costs import (
    check_range,
    embedding_step_s,
    interpolate,
    layer_samples,
    layer_seconds,
    memory_cap_bytes,
    sample_table,
    stage_weight_bytes,
    transfer_s,
)
from placement.measured import LayerSample
from placement.topology import Device, Topology
from placement.training import TrainingCosts
from placement.workload import LayerCost, ModelProfile, TrainingWorkload

BACKWARD_PER_FORWARD = 2.0
TRAINING_STATE_BYTES = 16.0
"""Of one parameter in mixed precision: 2 of weight, 2 of gradient, 4 of master weight and 8 of
AdamW moments (Piper; the same as ZeRO's count)."""
_GRADIENT_BYTES = 4
"""Of one parameter in a pool: gradients are summed in float32 whatever the weights are in."""


def saved_activation_bytes(
    *,
    hidden_size: int,
    query_size: int,
    key_value_size: int,
    expert_size: int,
    experts_per_token: int,
    dtype_bytes: int,
) -> int:
    """Return what one row of one layer leaves behind for its backward pass.

    Piper writes 12 b s d for attention and 2 b s k (3 f + d) for the experts, at 2 bytes a number.
    The first are six rows of width d: the input, its norm, q, k, v and the attention's output.
    Re-derived: with grouped queries k and v are `key_value_size` wide, q and the output
    `query_size`, so it is 2 d + 2 q + 2 kv. A dense layer is one expert of every token.
    As printed, Piper's attention terms also lack the division of the batch over data-parallel
    devices; here the caller multiplies by the rows that this device really sees.
    Scores, 4 b H s^2 in Piper, are left out: see `LayerCost.score_bytes_per_token_pair`.
    """
    attention = 2 * (hidden_size + query_size + key_value_size)
    experts = experts_per_token * (3 * expert_size + hidden_size)
    return (attention + experts) * dtype_bytes


def layer_activation_bytes(device: Device, layer: LayerCost, tokens: int, pairs: int) -> int:
    """Return what `tokens` rows of one layer, with `pairs` (row, context token) pairs, keep.

    Measured bytes a row win over the formula where the device has some.
    """
    measured = [
        (s, s.activation_bytes)
        for s in layer_samples(device, layer)
        if s.activation_bytes is not None
    ]
    if measured:
        per_row = sample_table([s for s, _ in measured], [size / s.tokens for s, size in measured])
        return math.ceil(interpolate(per_row, tokens) * tokens)
    return layer.activation_bytes_per_token * tokens + layer.score_bytes_per_token_pair * pairs


def stage_training_bytes(
    profile: ModelProfile,
    first_layer: int,
    end_layer: int,
    *,
    tokens: int,
    pairs: int = 0,
    in_flight: int = 1,
    expert_shards: int = 1,
    dtype_bytes: int = 2,
    state_bytes_per_parameter: float = TRAINING_STATE_BYTES,
) -> int:
    """Return the bytes of a training stage that holds its weights, optimizer and activations.

    Piper's resource model: state of every parameter, routed experts shared over `expert_shards`,
    and the activations of `in_flight` micro-batches (stages - index under 1F1B, so the first stage
    is the feasibility test) of `tokens` rows each. `dtype_bytes` is that of the profile's weights.
    """
    check_range(profile, first_layer, end_layer)
    total = 0.0
    for layer in profile.layers[first_layer:end_layer]:
        held_bytes = layer.weight_bytes - layer.routed_bytes + layer.routed_bytes / expert_shards
        total += held_bytes / dtype_bytes * state_bytes_per_parameter
        kept = layer.activation_bytes_per_token * tokens + layer.score_bytes_per_token_pair * pairs
        total += in_flight * kept
    ends = stage_weight_bytes(profile, first_layer, end_layer) - sum(
        layer.weight_bytes for layer in profile.layers[first_layer:end_layer]
    )
    return math.ceil(total + ends / dtype_bytes * state_bytes_per_parameter)


class TrainingSeconds(NamedTuple):
    """One layer, one micro-batch, one device."""

    forward_s: float
    recompute_s: float
    backward_s: float


def layer_training_s(device: Device, layer: LayerCost, tokens: int, pairs: int) -> TrainingSeconds:
    """Return the seconds of a layer's forward, recompute and backward pass over `tokens` rows.

    What was not measured follows from the forward pass: a recompute repeats it, a backward pass
    takes twice as long.
    """
    forward_s = layer_seconds(device, layer).step_s(tokens, tokens, pairs)
    samples = layer_samples(device, layer)
    recomputed = [(s, s.recompute_s / s.forward_s) for s in samples if s.recompute_s is not None]
    reversed_ = [(s, s.backward_s / s.forward_s) for s in samples if s.backward_s is not None]
    return TrainingSeconds(
        forward_s,
        forward_s * _ratio(recomputed, tokens, 1.0),
        forward_s * _ratio(reversed_, tokens, BACKWARD_PER_FORWARD),
    )


def _ratio(points: Sequence[tuple[LayerSample, float]], tokens: int, unmeasured: float) -> float:
    if not points:
        return unmeasured
    return interpolate(sample_table([s for s, _ in points], [ratio for _, ratio in points]), tokens)


def training_costs(
    profile: ModelProfile,
    topology: Topology,
    workload: TrainingWorkload,
    *,
    weight_dtype_bytes: int = 4,
    headroom_fraction: float = 0.1,
    hand_off_s: float = 0.0,
) -> TrainingCosts:
    """Price one micro-batch of every layer on every device, for `placement.train`.

    Weights come from the host memory of the device's own node. The embedding belongs to layer 0,
    also where the head has its matrix as well (tied): a fused slot over all layers is taken to
    hold it twice. `weight_dtype_bytes` is that of the profile's weights.
    Activations that differ between devices are taken at their largest. A hand-off between two
    devices takes at least `hand_off_s`: what the control plane takes to pass one result on.

    Raises:
        InfeasiblePlanError: Two nodes cannot reach each other; a pool hands on between any two.
        ValueError: The headroom is too small, or `hand_off_s` is below 0 or not finite.
    """
    if not (math.isfinite(hand_off_s) and hand_off_s >= 0):
        raise ValueError(f"hand_off_s ({hand_off_s}) must be 0 or more and finite")
    devices, layers = topology.devices, profile.layers
    kinds = list(dict.fromkeys(layers))
    rows = [_layer_rows(device, profile, workload) for device in devices]
    boundary_bytes = profile.hidden_bytes_per_token * workload.tokens
    weight_bytes = [layer.weight_bytes for layer in layers]
    weight_bytes[0] += profile.embedding.weight_bytes
    head_bytes = profile.head.weight_bytes
    gradient_per_weight = workload.trained_fraction * _GRADIENT_BYTES / weight_dtype_bytes
    return TrainingCosts(
        device_ids=tuple(device.id for device in devices),
        nodes=tuple(device.node for device in devices),
        forward_s=tuple(tuple(row.forward_s for row in table) for table in rows),
        recompute_s=tuple(tuple(row.recompute_s for row in table) for table in rows),
        backward_s=tuple(tuple(row.backward_s for row in table) for table in rows),
        head_forward_s=tuple(_head(device, profile, workload).forward_s for device in devices),
        head_backward_s=tuple(_head(device, profile, workload).backward_s for device in devices),
        hand_off_s=tuple(
            tuple(
                _hand_off_s(topology, source, target, boundary_bytes, hand_off_s)
                for target in devices
            )
            for source in devices
        ),
        weight_upload_s=tuple(
            tuple(_upload_s(device, size) for size in weight_bytes) for device in devices
        ),
        head_upload_s=tuple(_upload_s(device, head_bytes) for device in devices),
        layer_weight_bytes=tuple(weight_bytes),
        layer_gradient_bytes=tuple(math.ceil(size * gradient_per_weight) for size in weight_bytes),
        head_weight_bytes=head_bytes,
        head_gradient_bytes=math.ceil(head_bytes * gradient_per_weight),
        layer_activation_bytes=_activations(devices, layers, kinds, workload),
        boundary_bytes=boundary_bytes,
        memory_bytes=tuple(
            memory_cap_bytes(device.memory_bytes, headroom_fraction) for device in devices
        ),
    )


def _layer_rows(
    device: Device, profile: ModelProfile, workload: TrainingWorkload
) -> list[TrainingSeconds]:
    tokens, pairs = workload.tokens, workload.context_tokens
    seconds_of = {
        layer: layer_training_s(device, layer, tokens, pairs)
        for layer in dict.fromkeys(profile.layers)
    }
    rows = [seconds_of[layer] for layer in profile.layers]
    lookup_s = embedding_step_s(device, profile, tokens)
    first = rows[0]
    # Looked up forward, scattered back: a row is read, or its gradient added, once each.
    rows[0] = TrainingSeconds(
        first.forward_s + lookup_s, first.recompute_s + lookup_s, first.backward_s + lookup_s
    )
    return rows


def _head(device: Device, profile: ModelProfile, workload: TrainingWorkload) -> TrainingSeconds:
    return layer_training_s(device, profile.head, workload.tokens, 0)


def _hand_off_s(
    topology: Topology, source: Device, target: Device, num_bytes: int, least_s: float
) -> float:
    if source.id == target.id:
        return 0.0
    return max(least_s, transfer_s(topology.link(source.node, target.node), num_bytes))


def _upload_s(device: Device, num_bytes: int) -> float:
    return num_bytes / device.host_bytes_per_s if device.host_bytes_per_s else 0.0


def _activations(
    devices: Sequence[Device],
    layers: Sequence[LayerCost],
    kinds: Sequence[LayerCost],
    workload: TrainingWorkload,
) -> tuple[int, ...]:
    tokens, pairs = workload.tokens, workload.context_tokens
    bytes_of = {
        layer: max(layer_activation_bytes(device, layer, tokens, pairs) for device in devices)
        for layer in kinds
    }
    return tuple(bytes_of[layer] for layer in layers)
