"""Why there is no plan, and why a device has no part in one; in words, with the numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from placement.costs import LEAST_HEADROOM_FRACTION, stage_kv_bytes, stage_weight_bytes
from placement.cutting.pricing import Floats, StagePrices

_MOST_NAMED = 8


def left_out_reasons(
    prices: StagePrices,
    spans: Sequence[tuple[int, int, int]],
    objective: str,
    value: float,
    device_order: str,
    is_exact: bool,
    why_left_out: str | None,
) -> tuple[tuple[str, str], ...]:
    """Return (device id, reason) for every device without one of the (device, first, end) spans.

    `why_left_out` is the reason of all, where the caller knows it; `value` is the plan's
    objective: seconds, or joules per token.
    """
    used = [device for device, _, _ in spans]
    unused = sorted(set(range(len(prices.devices))) - set(used))
    if why_left_out is not None:
        return tuple((prices.devices[index].id, why_left_out) for index in unused)
    nodes = sorted(set(prices.node_of[used].tolist()))
    least = _least_of_one_layer(prices, objective)
    where = " in this order" if device_order == "given" else ""
    proof = f"no cut with it{where} brings" if is_exact else "no cut was found in which it brings"
    return tuple(
        (
            prices.devices[index].id,
            _no_memory(prices, index)
            or _no_link(prices, index, nodes)
            or _no_gain(float(least[prices.make_of[index]]), objective, value, proof),
        )
        for index in unused
    )


def _least_of_one_layer(prices: StagePrices, objective: str) -> Floats:
    costs = prices.steps_j if objective == "energy" else prices.steps_s
    assert costs is not None
    least: Floats = np.diagonal(costs, offset=1, axis1=1, axis2=2).min(axis=1)
    return least / prices.workload.sequences_per_lane if objective == "energy" else least


def _no_memory(prices: StagePrices, index: int) -> str | None:
    if prices.holds_a_layer[prices.make_of[index]]:
        return None
    return (
        f"its {prices.cap_bytes_of[index]} bytes after headroom hold no layer; "
        f"the smallest stage needs {_smallest_need_bytes(prices)}"
    )


def _no_link(prices: StagePrices, index: int, used_nodes: Sequence[int]) -> str | None:
    node = int(prices.node_of[index])
    hops = np.concatenate((prices.hop_s[node, used_nodes], prices.hop_s[used_nodes, node]))
    if np.isfinite(hops).any():
        return None
    return (
        f"no link joins its node {prices.nodes[node]} to those in use "
        f"({_listed([prices.nodes[used] for used in used_nodes])}); "
        f"declare one in links, or set default_link"
    )


def _no_gain(one_layer: float, objective: str, value: float, proof: str) -> str:
    of = {
        "throughput": "the period of a step",
        "latency": "a step through all stages",
        "energy": "the energy of a token",
    }[objective]
    is_energy = objective == "energy"
    shown = f"{value:.3g} J" if is_energy else _ms(value)
    if one_layer > value:
        layer = f"costs {one_layer:.3g} J a token" if is_energy else f"takes {_ms(one_layer)}"
        return f"one layer {layer} there; {of} is {shown} without it"
    return f"it would not improve the {objective}: {proof} {of} below {shown}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def over_cap(prices: StagePrices, device: int, first_layer: int, end_layer: int) -> str:
    """Say that a forced stage exceeds its device's cap."""
    return (
        f"layer_counts puts layers [{first_layer}, {end_layer}) on {prices.devices[device].id}, "
        f"which with KV and activations need {int(prices.need_bytes[first_layer, end_layer])} "
        f"bytes; it offers {prices.cap_bytes_of[device]} after a headroom of "
        f"{prices.headroom_fraction:.0%}. Give it fewer layers, or lower kv_tokens "
        f"({prices.workload.kv_tokens}) or step_tokens ({prices.workload.step_tokens})."
    )


def shortfall(prices: StagePrices, device_order: str, *, is_proven: bool) -> str:
    """Say why no cut is allowed: memory, or links where memory would do."""
    profile, workload = prices.profile, prices.workload
    weight_bytes = stage_weight_bytes(profile, 0, profile.num_layers)
    kv_bytes = stage_kv_bytes(profile, 0, profile.num_layers, workload.kv_tokens)
    caps = list(prices.cap_bytes_of)
    order = "any order" if device_order == "free" else "their order"
    headroom = " or headroom_fraction"
    if prices.headroom_fraction <= LEAST_HEADROOM_FRACTION:
        headroom = f" (headroom_fraction is at its least, {LEAST_HEADROOM_FRACTION})"
    found = "no cut in" if is_proven else "no cut was found in"
    return (
        f"{profile.num_layers} layers need {weight_bytes + kv_bytes} bytes "
        f"({weight_bytes} of weights, {kv_bytes} of KV for {workload.kv_tokens} tokens) and "
        f"up to {prices.activation_bytes(0, profile.num_layers)} of activations on every device; "
        f"{len(caps)} devices offer {sum(caps)} bytes ({_listed(caps)}) after a headroom of "
        f"{prices.headroom_fraction:.0%}, and {found} {order} fits. The smallest stage needs "
        f"{_smallest_need_bytes(prices)} bytes, the largest device offers {max(caps)}."
        f"{_unreachable(prices)} Add devices or memory, lower kv_tokens (max_lanes "
        f"or lanes, sequences_per_lane, context_tokens), step_tokens{headroom}, or use a smaller "
        f"dtype."
    )


def _unreachable(prices: StagePrices) -> str:
    pairs = np.argwhere(np.isinf(prices.hop_s))
    if not len(pairs):
        return ""
    named = [f"{prices.nodes[source]} to {prices.nodes[target]}" for source, target in pairs]
    return (
        f" {len(pairs)} of {prices.hop_s.size} node pairs are not linked ({_listed(named)}), so "
        f"not all of this memory can be joined: declare them in links, or set default_link."
    )


def _smallest_need_bytes(prices: StagePrices) -> int:
    return int(np.diagonal(prices.need_bytes, offset=1).min())


def _listed(values: Sequence[object]) -> str:
    named = ", ".join(map(str, values[:_MOST_NAMED]))
    more = len(values) - _MOST_NAMED
    return f"{named} and {more} more" if more > 0 else named
