"""Serving stages: cut a model's layers over unequal devices, for one of three objectives.

- `throughput`: the least period of a step, max(slowest stage, busiest link, latency / lanes). With
  many lanes in flight every stage and every link works on some lane's step, so the slowest one
  sets the rate; with few, a lane's next step waits for its last.
- `latency`: the least time of one step through all stages, hops included.
- `energy`: the fewest joules per token above idling.

Memory caps hold always. Devices are taken in the order given, or in any (`device_order="free"`),
and each may stay out. A link that two hops of one plan share is priced for each alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np

from placement.cutting.bounds import Bounds, bounds_of
from placement.cutting.order import best_order
from placement.cutting.plan import (
    Span,
    StagePlacement,
    StagesPlan,
    plan_of,
    spans_of,
    split_verdict,
)
from placement.cutting.pricing import StagePrices
from placement.cutting.reasons import over_cap, shortfall
from placement.cutting.search import best_counts, energy_costs
from placement.errors import InfeasiblePlanError
from placement.topology import Topology
from placement.workload import DeviceOrder, ModelProfile, Objective, ServingWorkload

__all__ = [
    "StagePlacement",
    "StagesPlan",
    "best_single",
    "plan_stages",
    "split_verdict",
]


def plan_stages(
    profile: ModelProfile,
    topology: Topology,
    *,
    workload: ServingWorkload,
    headroom_fraction: float = 0.1,
    layer_counts: Sequence[int] | None = None,
    objective: Objective = "throughput",
    device_order: DeviceOrder = "given",
) -> StagesPlan:
    """Cut the layers over the devices so that the objective is as small as it can be.

    In the order given exact: O(devices x (layers^2 + nodes x layers)) a sweep, see
    `placement.cutting.search`. In any order exact up to 12 devices (more where they are alike), a
    local search beyond, see `placement.cutting.order`; whatever order they come in, the plan is the
    same. Ties (within a part in 10^9): the fewest devices, the least latency, then the
    lexicographically smallest counts, so equal inputs give equal plans.

    `layer_counts` forces the cut: one count per device, 0 leaves it out.

    Raises:
        InfeasiblePlanError: No cut (or not the forced one) fits the memories and the links.
        ValueError: An option is malformed, or the objective is energy and the active power of
            some device is not known.
    """
    prices = prices_of(profile, topology, workload, headroom_fraction, device_order)
    if objective not in get_args(Objective):
        raise ValueError(f"objective is {objective!r}; use one of {', '.join(get_args(Objective))}")
    if objective == "energy":
        energy_costs(prices)
    bounds = bounds_of(prices)
    why_not = None
    if layer_counts is None:
        spans, is_exact = search_spans(prices, objective, device_order, bounds)
    else:
        spans, is_exact = _forced_spans(prices, layer_counts, device_order), False
        why_not = "layer_counts gives it 0 layers"
    return plan_of(
        prices, spans, objective, device_order, bounds, is_exact=is_exact, why_left_out=why_not
    )


def best_single(
    profile: ModelProfile,
    topology: Topology,
    *,
    workload: ServingWorkload,
    headroom_fraction: float = 0.1,
    objective: Objective = "throughput",
) -> StagesPlan | None:
    """Return the best plan that keeps the whole model on one device; None: it fits none.

    Ties go to the device with the smaller id. O(makes x layers^2).

    Raises:
        ValueError: As `plan_stages`.
    """
    prices = prices_of(profile, topology, workload, headroom_fraction, "free")
    costs = energy_costs(prices).stage if objective == "energy" else prices.steps_s
    whole = costs[prices.make_of, 0, -1]
    best = int(np.argmin(whole))
    if np.isinf(whole[best]):
        return None
    spans = [Span(best, 0, prices.num_layers)]
    why_not = "the plan is for one device alone"
    bounds = bounds_of(prices)
    return plan_of(prices, spans, objective, "free", bounds, is_exact=False, why_left_out=why_not)


def prices_of(
    profile: ModelProfile,
    topology: Topology,
    workload: ServingWorkload,
    headroom_fraction: float,
    device_order: DeviceOrder,
) -> StagePrices:
    """Price the question; where the order is free, devices are first sorted by their ids.

    Raises:
        ValueError: An option is malformed.
    """
    if device_order not in get_args(DeviceOrder):
        raise ValueError(
            f"device_order is {device_order!r}; use one of {', '.join(get_args(DeviceOrder))}"
        )
    if device_order == "free":
        devices = tuple(sorted(topology.devices, key=lambda device: device.id))
        topology = replace(topology, devices=devices)
    return StagePrices(profile, topology, workload, headroom_fraction)


def search_spans(
    prices: StagePrices, objective: Objective, device_order: DeviceOrder, bounds: Bounds
) -> tuple[list[Span], bool]:
    """Return the best cut found, and whether it is proven the best."""
    order, is_exact = tuple(range(len(prices.devices))), True
    if device_order == "free":
        order, is_exact = best_order(prices, objective, bounds)
    counts = best_counts(prices.only(order), objective, bounds.bottleneck_s) if order else None
    if counts is None:
        raise InfeasiblePlanError(shortfall(prices, device_order, is_proven=is_exact))
    return spans_of(order, counts), is_exact


def _forced_spans(
    prices: StagePrices, layer_counts: Sequence[int], device_order: DeviceOrder
) -> list[Span]:
    if device_order == "free":
        raise ValueError(
            "layer_counts has a count per device in the order given, but device_order is 'free'; "
            "set device_order to 'given', or leave layer_counts out"
        )
    num_devices, num_layers = len(prices.devices), prices.num_layers
    counts = list(layer_counts)
    if len(counts) != num_devices:
        raise ValueError(
            f"layer_counts has {len(counts)} entries for {num_devices} devices; "
            f"give one per device, 0 to leave it out"
        )
    if min(counts) < 0 or sum(counts) != num_layers:
        raise ValueError(
            f"layer_counts {counts} must be 0 or more each and sum to the model's "
            f"{num_layers} layers (they sum to {sum(counts)})"
        )
    spans = spans_of(range(num_devices), counts)
    for span in spans:
        if np.isinf(prices.steps_s[prices.make_of[span.device], span.first, span.end]):
            raise InfeasiblePlanError(over_cap(prices, *span))
    nodes = [prices.devices[span.device].node for span in spans]
    for source, target in itertools.pairwise(nodes):
        prices.topology.link(source, target)
    return spans
