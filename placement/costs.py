"""Seconds and bytes of serving: with `placement.training_costs`, where every formula lives.

Planners predict with these functions and paced devices wait by them, so a prediction and a paced
measurement differ only by what the formulas leave out (scheduling, links, Python).

Sources:
- A layer takes max(FLOPs / rate, bytes / bandwidth): the roofline of Williams, Waterman and
  Patterson, "Roofline: an insightful visual performance model", CACM 52(4), 2009. Layers run one
  after another, so a stage takes the sum of its layers' maxima, not the maximum of its sums.
- A step of T rows, each choosing k of E experts at random, touches an expected fraction
  1 - (1 - k/E)^T of the experts (occupancy; rows are taken as independent, so a trained router's
  skew makes this an upper bound).
- Activations: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer
  Models", 2022, count 34 bytes per hidden element of a layer at 2 bytes each, that is 17 rows.
  Inference keeps one layer's worth at a time, so 17 rows cover it; the KV that attention gathers
  is not counted.

- A rate or a layer that was measured bends the roofline: between two measured row counts the rate,
  or the ratio of measured to predicted seconds, is interpolated linearly over log(rows), and held
  beyond the ends. So a measured point is met exactly and the roofline gives the shape between.

Limits: attention FLOPs count `context_tokens` once per sequence, exact for decoding and low for
long prompt chunks; kernel launch times are known only where a layer was measured.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from placement.measured import LayerSample
from placement.topology import Device, Link, LinkRate
from placement.workload import LayerCost, ModelProfile

ACTIVATION_ROWS = 17
LOGIT_BYTES = 4
"""Logits are sampled in float32."""
LOGIT_COPIES = 2
"""The logits and the probabilities made of them."""
LEAST_HEADROOM_FRACTION = 0.1
"""Allocators fragment and libraries keep workspaces; a plan to the last byte does not run."""

Table = tuple[tuple[float, float], ...]
"""(log of the rows, value), ascending."""


class LayerSeconds(NamedTuple):
    """A layer's cost on one device, with the device's rates already divided in."""

    compute_s_per_token: float
    compute_s_per_context_token: float
    dense_read_s: float
    routed_read_s: float
    expert_miss: float
    """Probability that one row does not choose a given expert."""
    kv_read_s_per_context_token: float
    slowdowns: Table = ()
    """Peak rate over the rate measured at that many rows; empty: the peak at every size."""
    corrections: Table = ()
    """Measured over predicted seconds at that many rows; empty: not measured."""

    def step_s(self, tokens: int, context_tokens: int, pairs: int | None = None) -> float:
        """Return the seconds of one step of `tokens` rows (at least 1).

        `context_tokens` KV tokens are read; the rows attend to `pairs` (row, KV token) pairs in
        sum. None: one row a sequence, as in decoding, so as many pairs as KV tokens.
        """
        attended = context_tokens if pairs is None else pairs
        compute_s = self.compute_s_per_token * tokens + self.compute_s_per_context_token * attended
        if self.slowdowns:
            compute_s *= interpolate(self.slowdowns, tokens)
        read_s = self.dense_read_s + self.kv_read_s_per_context_token * context_tokens
        if self.routed_read_s:
            read_s += self.routed_read_s * _hit_fraction(self.expert_miss, tokens)
        roofline_s = compute_s if compute_s > read_s else read_s
        return (
            roofline_s * interpolate(self.corrections, tokens) if self.corrections else roofline_s
        )


@dataclass(frozen=True, slots=True)
class StageCost:
    """A stage's cost on one device, prepared so that one step is priced in about a microsecond."""

    embedding_s_per_token: float
    layers: tuple[tuple[int, LayerSeconds], ...]
    """(how many, cost of one) of each distinct layer."""
    head: LayerSeconds | None

    def step_s(self, tokens: int, context_tokens: int, head_tokens: int | None = None) -> float:
        """Return the seconds of one step of `tokens` rows.

        `context_tokens` sums, over the sequences of the step, the KV tokens each attends to.
        `head_tokens` rows go through the head; None means all of them.
        """
        if tokens <= 0:
            return 0.0
        total_s = self.embedding_s_per_token * tokens
        for count, layer in self.layers:
            total_s += count * layer.step_s(tokens, context_tokens)
        if self.head is not None:
            rows = tokens if head_tokens is None else head_tokens
            if rows > 0:
                total_s += self.head.step_s(rows, 0)
        return total_s


def layer_seconds(device: Device, layer: LayerCost) -> LayerSeconds:
    """Divide a layer's figures by a device's rates; bend them to what was measured there."""
    roofline = _roofline_seconds(device, layer)
    samples = layer_samples(device, layer)
    if not samples:
        return roofline
    return roofline._replace(
        corrections=sample_table(
            samples,
            [s.forward_s / roofline.step_s(s.tokens, s.context_tokens, s.pairs) for s in samples],
        )
    )


def _roofline_seconds(device: Device, layer: LayerCost) -> LayerSeconds:
    return LayerSeconds(
        compute_s_per_token=layer.flops_per_token / device.flops_per_s,
        compute_s_per_context_token=layer.attention_flops_per_context_token / device.flops_per_s,
        dense_read_s=(layer.weight_bytes - layer.routed_bytes) / device.memory_bytes_per_s,
        routed_read_s=layer.routed_bytes / device.memory_bytes_per_s,
        expert_miss=_expert_miss(layer),
        kv_read_s_per_context_token=layer.kv_bytes_per_token / device.memory_bytes_per_s,
        slowdowns=tuple(
            (math.log(rate.rows), device.flops_per_s / rate.flops_per_s)
            for rate in device.matmul_rates
        ),
    )


def expert_weight_bytes(layer: LayerCost) -> int:
    """Return the bytes of one of a layer's routed experts."""
    return -(-layer.routed_bytes // layer.num_experts)


def expert_read_s(device: Device, layer: LayerCost) -> float:
    """Return the seconds to read one routed expert's weights."""
    return expert_weight_bytes(layer) / device.memory_bytes_per_s


def expert_row_s(device: Device, layer: LayerCost) -> float:
    """Return the compute seconds of one row in one routed expert.

    A row's FLOPs go with the weights it uses: a share of the dense ones and of its k experts.
    """
    expert_bytes = layer.routed_bytes / layer.num_experts
    used_bytes = layer.weight_bytes - layer.routed_bytes + layer.experts_per_token * expert_bytes
    return layer.flops_per_token * expert_bytes / used_bytes / device.flops_per_s


def experts_s(device: Device, layer: LayerCost, rows: Iterable[int]) -> float:
    """Return the seconds of one call: so many rows through each of several routed experts.

    Each expert's weights are read once, while its rows are computed.
    """
    read_s, row_s = expert_read_s(device, layer), expert_row_s(device, layer)
    return sum(max(read_s, count * row_s) for count in rows)


def layer_read_bytes(layer: LayerCost, tokens: int) -> float:
    """Return the weight bytes that a step of `tokens` rows is expected to read."""
    if tokens <= 0:
        return 0.0
    dense_bytes = layer.weight_bytes - layer.routed_bytes
    if not layer.routed_bytes:
        return float(dense_bytes)
    return dense_bytes + layer.routed_bytes * _hit_fraction(_expert_miss(layer), tokens)


def layer_step_s(device: Device, layer: LayerCost, tokens: int, context_tokens: int) -> float:
    """Return the seconds of one layer for one step of `tokens` rows."""
    if tokens <= 0:
        return 0.0
    return layer_seconds(device, layer).step_s(tokens, context_tokens)


def embedding_step_s(device: Device, profile: ModelProfile, tokens: int) -> float:
    """Return the seconds to look up `tokens` rows: one hidden row read per token."""
    return tokens * profile.hidden_bytes_per_token / device.memory_bytes_per_s


def stage_cost(
    device: Device, profile: ModelProfile, first_layer: int, end_layer: int
) -> StageCost:
    """Prepare the cost of layers [first_layer, end_layer), with embedding and head when owned."""
    check_range(profile, first_layer, end_layer)
    counts: dict[LayerCost, int] = {}
    for layer in profile.layers[first_layer:end_layer]:
        counts[layer] = counts.get(layer, 0) + 1
    return StageCost(
        embedding_s_per_token=embedding_step_s(device, profile, 1) if first_layer == 0 else 0.0,
        layers=tuple((count, layer_seconds(device, layer)) for layer, count in counts.items()),
        head=layer_seconds(device, profile.head) if end_layer == profile.num_layers else None,
    )


def stage_step_s(
    device: Device,
    profile: ModelProfile,
    first_layer: int,
    end_layer: int,
    *,
    tokens: int,
    context_tokens: int,
    head_tokens: int | None = None,
) -> float:
    """Return the seconds of one step of a stage; prepare a `StageCost` to price many."""
    cost = stage_cost(device, profile, first_layer, end_layer)
    return cost.step_s(tokens, context_tokens, head_tokens)


def transfer_s(link: Link | LinkRate, num_bytes: float) -> float:
    """Return the seconds until the last byte of a message arrives."""
    return link.latency_s + num_bytes / link.bandwidth_bytes_per_s


def occupied_s(link: Link | LinkRate, num_bytes: float) -> float:
    """Return the seconds a message keeps a link from carrying the next one."""
    return num_bytes / link.bandwidth_bytes_per_s


def step_energy_j(device: Device, step_s: float) -> float:
    """Return the joules that `step_s` of computing cost above idling; 0 when power is unknown."""
    return (device.active_power_w or 0.0) * step_s


def memory_cap_bytes(memory_bytes: int, headroom_fraction: float) -> int:
    """Return what a plan may use of a memory.

    Raises:
        ValueError: The headroom is below `LEAST_HEADROOM_FRACTION`, or leaves nothing.
    """
    if not LEAST_HEADROOM_FRACTION <= headroom_fraction < 1.0:
        raise ValueError(
            f"headroom_fraction ({headroom_fraction}) must be at least "
            f"{LEAST_HEADROOM_FRACTION} and below 1"
        )
    return int(memory_bytes * (1.0 - headroom_fraction))


def stage_weight_bytes(profile: ModelProfile, first_layer: int, end_layer: int) -> int:
    """Return the bytes of weights a stage holds; a tied head is held once with the embedding."""
    check_range(profile, first_layer, end_layer)
    total = sum(layer.weight_bytes for layer in profile.layers[first_layer:end_layer])
    if first_layer == 0:
        total += profile.embedding.weight_bytes
    if end_layer == profile.num_layers and not (first_layer == 0 and profile.head_is_embedding):
        total += profile.head.weight_bytes
    return total


def stage_kv_bytes(profile: ModelProfile, first_layer: int, end_layer: int, num_tokens: int) -> int:
    """Return the bytes of `num_tokens` KV tokens over the layers of a stage."""
    check_range(profile, first_layer, end_layer)
    per_token = sum(layer.kv_bytes_per_token for layer in profile.layers[first_layer:end_layer])
    return per_token * num_tokens


def stage_activation_bytes(
    profile: ModelProfile,
    first_layer: int,
    end_layer: int,
    *,
    step_tokens: int,
    head_tokens: int = 0,
) -> int:
    """Return an upper bound on the bytes of intermediate results of one step."""
    check_range(profile, first_layer, end_layer)
    total = ACTIVATION_ROWS * profile.hidden_bytes_per_token * step_tokens
    if end_layer == profile.num_layers:
        # One head row per vocabulary entry, each as wide as a hidden row.
        vocab_size = -(-profile.head.weight_bytes // profile.hidden_bytes_per_token)
        total += LOGIT_COPIES * LOGIT_BYTES * vocab_size * head_tokens
    return total


def layer_samples(device: Device, layer: LayerCost) -> tuple[LayerSample, ...]:
    for measured in device.measured_layers:
        if measured.layer == layer:
            return measured.samples
    return ()


def sample_table(samples: Sequence[LayerSample], values: Sequence[float]) -> Table:
    """Pair each sample's token count with a value, for `interpolate`."""
    logs = (math.log(sample.tokens) for sample in samples)
    return tuple(zip(logs, values, strict=True))


def interpolate(table: Table, tokens: float) -> float:
    """Return the table's value at `tokens` rows: linear over their log, held beyond the ends."""
    at = math.log(tokens)
    after = bisect_right(table, (at, math.inf))
    if after == 0 or after == len(table):
        return table[min(after, len(table) - 1)][1]
    (low, low_value), (high, high_value) = table[after - 1], table[after]
    return low_value + (high_value - low_value) * (at - low) / (high - low)


def _expert_miss(layer: LayerCost) -> float:
    return 1.0 - layer.experts_per_token / layer.num_experts if layer.num_experts else 1.0


def _hit_fraction(expert_miss: float, tokens: int) -> float:
    """Return the expected fraction of experts that at least one of `tokens` rows chooses."""
    return 1.0 - float(expert_miss**tokens)


def check_range(profile: ModelProfile, first_layer: int, end_layer: int) -> None:
    """Refuse a range that is no stage of the model."""
    if not 0 <= first_layer < end_layer <= profile.num_layers:
        raise ValueError(
            f"layers [{first_layer}, {end_layer}) are not a part of {profile.name}'s "
            f"{profile.num_layers}; a stage owns at least 1 layer"
        )
