"""The Pareto front of serving plans: what period, latency and energy can be had together.

Exact where the number of labels allows; otherwise every other plan is covered within a factor
1 + epsilon on each axis, and the value says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from placement.cutting.bounds import Bounds, bounds_of
from placement.cutting.pareto import (
    Chain,
    Cut,
    Question,
    Stages,
    cheapest_before,
    front_of,
    search_front,
)
from placement.cutting.plan import Span, StagesPlan, plan_of
from placement.cutting.pricing import Ints, StagePrices
from placement.cutting.search import TIE
from placement.cutting.subsets import Groups
from placement.stages import prices_of, search_spans
from placement.topology import Topology
from placement.workload import DeviceOrder, ModelProfile, Objective, ServingWorkload

DevicesOf = Callable[[Sequence[int]], Sequence[int]]
"""Names the devices of a chain's positions."""

MOST_LABELS = 1_000_000
"""Labels that one search may look at: about a second."""
_EXACT_SHARE = 8
"""The first, exact try gets this fraction of them before it is given up for coarser ones."""
_EPSILONS = (1.0, 0.5, 0.25, 0.12, 0.06, 0.03, 0.01, 0.0)
_MOST_POSITIONS = 600
"""(devices in use, last device) pairs of a search over all orders: six different devices take 192,
seven 448."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFront:
    """Plans of which none is better than another on every axis, by ascending latency."""

    model: str
    device_order: DeviceOrder
    axes: tuple[str, ...]
    """Fields of a plan: energy is one when every device's active power is known."""
    plans: tuple[StagesPlan, ...]
    """One for each point; their `objective` is throughput."""
    epsilon: float | None
    """No plan is better than all of these by more than this proportion, on every axis: for each
    there is one here at most 1 + epsilon times as high on each. 0: exact. None: not known, as
    only some orders of the devices, or too few labels, were looked at."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "model": self.model,
            "device_order": self.device_order,
            "axes": list(self.axes),
            "plans": [plan.to_json() for plan in self.plans],
            "epsilon": self.epsilon,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StageFront:
        """Rebuild a front from the values of `to_json`."""
        fields = dict(value)
        fields["axes"] = tuple(value["axes"])
        fields["plans"] = tuple(StagesPlan.from_json(plan) for plan in value["plans"])
        return cls(**fields)


def plan_front(
    profile: ModelProfile,
    topology: Topology,
    *,
    workload: ServingWorkload,
    headroom_fraction: float = 0.1,
    device_order: DeviceOrder = "given",
    most_labels: int = MOST_LABELS,
) -> StageFront:
    """Return the plans that are not beaten in period, latency and energy per token at once.

    O(labels x log labels) for each device and layer, see `placement.cutting.pareto`. The labels of
    an exact front can grow with the number of cuts: where `most_labels` do not do, the search
    starts anew with an epsilon, which then shrinks as far as they allow. In free order all orders
    are searched while there are few (up to 7 different devices); beyond, the orders that are best
    for one objective each.

    Raises:
        InfeasiblePlanError: As `plan_stages`.
        ValueError: As `plan_stages`.
    """
    prices = prices_of(profile, topology, workload, headroom_fraction, device_order)
    bounds = bounds_of(prices)
    cuts, epsilon = _front(prices, device_order, bounds, most_labels)
    plans = [
        plan_of(
            prices, [Span(*each) for each in cut], "throughput", device_order, bounds,
            is_exact=False, why_left_out="this plan of the front does without it",
        )
        for cut in cuts
    ]  # fmt: skip
    return StageFront(
        model=profile.name,
        device_order=device_order,
        axes=("period_s", "latency_s", *(["energy_j_per_token"] if _has_energy(prices) else [])),
        plans=tuple(sorted(plans, key=lambda plan: (plan.latency_s, plan.period_s))),
        epsilon=epsilon,
    )


def _has_energy(prices: StagePrices) -> bool:
    return prices.watts is not None


def _front(
    prices: StagePrices, device_order: DeviceOrder, bounds: Bounds, most_labels: int
) -> tuple[list[Stages], float | None]:
    """Return the cuts of the front and its epsilon."""
    objectives: list[Objective] = ["throughput", "latency"]
    if _has_energy(prices):
        objectives.append("energy")
    found = [search_spans(prices, each, device_order, bounds) for each in objectives]
    best = [spans for spans, _ in found]
    question = _question(prices)
    known = [Cut(_values(question, spans), tuple(spans)) for spans in best]
    # The least period is known where its search is exact, but for ties.
    least_s = known[0].values[0] * (1.0 - 2.0 * TIE) if found[0][1] else bounds.period_s
    question = question._replace(least_s=least_s)
    if device_order == "given":
        chain = _line(prices, range(len(prices.devices)))
        return _refined(question, chain, known, most_labels, lambda positions: positions)
    groups = Groups(prices)
    if groups.is_small and np.count_nonzero(groups.digits) <= _MOST_POSITIONS:
        chain, group_of = _lattice(groups)
        return _refined(
            question,
            chain,
            known,
            most_labels,
            lambda positions: groups.named(group_of[list(positions)].tolist()),
        )
    for spans in best:
        order = tuple(span.device for span in spans)
        cuts, _ = _refined(question, _line(prices, order), known, most_labels, _picker(order))
        known = [Cut(_values(question, cut), cut) for cut in cuts]
    return [cut.stages for cut in known], None


def _picker(order: Sequence[int]) -> DevicesOf:
    return lambda positions: [order[position] for position in positions]


def _refined(
    question: Question,
    chain: Chain,
    known: Sequence[Cut],
    most_labels: int,
    devices_of: DevicesOf,
) -> tuple[list[Stages], float | None]:
    """Search exactly if that is short, else with as small an epsilon as labels allow."""
    tries = [(0.0, most_labels // _EXACT_SHARE), *((epsilon, most_labels) for epsilon in _EPSILONS)]
    cuts, reached = front_of(known), None
    before = cheapest_before(question, chain)
    for epsilon, budget in tries:
        values = [cut.values for cut in cuts]
        found = search_front(question, chain, before, values, epsilon, budget)
        if found is None and budget < most_labels:
            continue
        if found is None:
            break
        fresh = [Cut(cut.values, _spans(cut.stages, devices_of)) for cut in found]
        cuts, reached = front_of([*cuts, *fresh]), epsilon
        if not epsilon:
            break
    return [cut.stages for cut in cuts], reached


def _spans(stages: Stages, devices_of: DevicesOf) -> Stages:
    positions, firsts, ends = zip(*stages, strict=True)
    return tuple(map(Span, devices_of(positions), firsts, ends))


def _question(prices: StagePrices) -> Question:
    joules = prices.steps_j
    return Question(prices, np.zeros_like(prices.steps_s) if joules is None else joules, 0.0)


def _values(question: Question, spans: Stages | Sequence[Span]) -> tuple[float, float, float]:
    """Return the period, latency and energy of a step."""
    prices = question.prices
    at = [(int(prices.make_of[device]), first, end) for device, first, end in spans]
    nodes = [int(prices.node_of[device]) for device, _, _ in spans]
    steps_s = [float(prices.steps_s[each]) for each in at]
    hops = list(pairwise(nodes))
    latency_s = sum(steps_s) + sum(float(prices.hop_s[hop]) for hop in hops)
    busy_s = [float(prices.occupied_s[hop]) for hop in hops]
    period_s = max(*steps_s, *busy_s, latency_s / prices.workload.lanes)
    return period_s, latency_s, sum(float(question.joules[each]) for each in at)


def _line(prices: StagePrices, order: Sequence[int]) -> Chain:
    """Return the chain of devices in a fixed order."""
    size, positions = len(order), list(order)
    return Chain(
        makes=prices.make_of[positions],
        nodes=prices.node_of[positions],
        following=tuple(tuple(range(at + 1, size)) for at in range(size)),
        is_first=(True,) * size,
        is_later=tuple(at > 0 for at in range(size)),
        most_stages=min(size, prices.num_layers),
    )


def _lattice(groups: Groups) -> tuple[Chain, Ints]:
    """Return the chain of all orders, over (devices in use, last one); and its groups."""
    digits, strides = groups.digits, groups.strides
    in_use = digits.sum(axis=1)
    pairs = sorted(np.argwhere(digits > 0).tolist(), key=lambda pair: (in_use[pair[0]], *pair))
    number_of = {(state, group): number for number, (state, group) in enumerate(pairs)}
    following = [
        tuple(
            number_of[state + int(stride), other]
            for other, stride in enumerate(strides)
            if digits[state, other] < len(groups.members[other])
        )
        for state, _ in pairs
    ]
    group_of = np.array([group for _, group in pairs], dtype=np.int64)
    counts = [int(in_use[state]) for state, _ in pairs]
    return Chain(
        makes=groups.makes[group_of],
        nodes=groups.nodes[group_of],
        following=tuple(following),
        is_first=tuple(count == 1 for count in counts),
        is_later=tuple(count > 1 for count in counts),
        most_stages=max(counts),
    ), group_of
