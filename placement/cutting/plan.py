"""A serving plan as a value: stages with their figures, certificates, and what to say of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from placement.costs import stage_kv_bytes, stage_weight_bytes
from placement.cutting.bounds import Bounds
from placement.cutting.pricing import StagePrices
from placement.cutting.reasons import left_out_reasons
from placement.cutting.search import TIE
from placement.topology import DeviceKind
from placement.workload import DeviceOrder, Objective


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlacement:
    """Layers [first_layer, end_layer) on one device, with what they are predicted to cost."""

    index: int
    device_id: str
    node: str
    kind: DeviceKind
    first_layer: int
    end_layer: int
    weight_bytes: int
    kv_bytes: int
    """For the workload's `kv_tokens`."""
    activation_bytes: int
    """Intermediate results of the largest step."""
    memory_cap_bytes: int
    """What the device offers after the headroom."""
    step_s: float
    share_of_bottleneck: float
    """This stage's step over the slowest stage's: the share of time it is busy at best."""
    hop_s: float
    """Until the rows of a step arrive at the next stage; 0 for the last."""
    hop_busy_s: float
    """While they keep the link to the next stage from carrying others; 0 for the last."""
    num_experts: int
    """Routed experts held, summed over its layers."""

    @property
    def num_layers(self) -> int:
        return self.end_layer - self.first_layer

    @property
    def need_bytes(self) -> int:
        """Weights, KV and activations: at most `memory_cap_bytes`."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class StagesPlan:
    """Which device runs which layers, what that should cost, and how good it could be."""

    epoch: int = 0
    model: str
    objective: Objective
    device_order: DeviceOrder
    stages: tuple[StagePlacement, ...]
    left_out: tuple[tuple[str, str], ...]
    """(device id, why it has no stage)."""
    bottleneck_s: float
    """One step of the slowest stage at the workload."""
    busiest_hop_s: float
    """The longest time that one step keeps a link busy; 0 with one stage."""
    latency_s: float
    """One step through all stages, transfers between them included."""
    period_s: float
    """Between two steps, all lanes together: the largest of the slowest stage, the busiest link
    and latency / lanes."""
    energy_j_per_token: float | None
    """Above idling; None when the active power of some stage's device is not known."""
    lower_bound_s: float
    """No cut over these devices, in any order, has a bottleneck below this
    (see `placement.cutting.bounds.bottleneck_bound_s`)."""
    objective_value: float
    """`period_s`, `latency_s` or `energy_j_per_token`."""
    objective_lower_bound: float
    """No cut over these devices, in any order, has an objective below this
    (see `placement.cutting.bounds.bounds_of`); the value itself after an exact search of all."""
    is_exact: bool
    """No other cut is better; with `device_order="given"`, none in that order."""
    kv_tokens_capacity: int
    """KV tokens, summed over the lanes, that fit the tightest stage."""
    predicted_tokens_per_s: float
    """The decode rate of all lanes: a row of every sequence of a lane each period."""

    @property
    def gap(self) -> float:
        """How far the objective is above its lower bound, in proportion."""
        return self.objective_value / self.objective_lower_bound - 1.0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        value = asdict(self)
        value["stages"] = [asdict(stage) for stage in self.stages]
        value["left_out"] = [list(pair) for pair in self.left_out]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StagesPlan:
        """Rebuild a plan from the values of `to_json`."""
        fields = dict(value)
        fields["stages"] = tuple(StagePlacement(**stage) for stage in value["stages"])
        fields["left_out"] = tuple((pair[0], pair[1]) for pair in value["left_out"])
        return cls(**fields)


class Span(NamedTuple):
    """Layers [first, end) on the device at this position of the topology."""

    device: int
    first: int
    end: int


def spans_of(order: Sequence[int], counts: Sequence[int]) -> list[Span]:
    """Return the layers of every device that has some."""
    spans, first = [], 0
    for device, count in zip(order, counts, strict=True):
        if count:
            spans.append(Span(device, first, first + count))
        first += count
    return spans


def plan_of(
    prices: StagePrices,
    spans: Sequence[Span],
    objective: Objective,
    device_order: DeviceOrder,
    bounds: Bounds,
    *,
    is_exact: bool,
    why_left_out: str | None = None,
) -> StagesPlan:
    """Work out the figures of a cut, and why each device without layers has none."""
    stages = _placements(prices, spans)
    rows = prices.workload.sequences_per_lane
    bottleneck_s = max(stage.step_s for stage in stages)
    busiest_hop_s = max(stage.hop_busy_s for stage in stages)
    latency_s = sum(stage.step_s + stage.hop_s for stage in stages)
    period_s = max(bottleneck_s, busiest_hop_s, latency_s / prices.workload.lanes)
    energy_j = _energy_j_per_token(prices, spans, stages)
    value = {"throughput": period_s, "latency": latency_s, "energy": energy_j or 0.0}[objective]
    bound = value if is_exact and device_order == "free" else _bound(bounds, objective, rows, value)
    is_exact = is_exact or value <= bound * (1.0 + TIE)
    why = left_out_reasons(prices, spans, objective, value, device_order, is_exact, why_left_out)
    return StagesPlan(
        model=prices.profile.name,
        objective=objective,
        device_order=device_order,
        stages=stages,
        left_out=why,
        bottleneck_s=bottleneck_s,
        busiest_hop_s=busiest_hop_s,
        latency_s=latency_s,
        period_s=period_s,
        energy_j_per_token=energy_j,
        lower_bound_s=min(bounds.bottleneck_s, bottleneck_s),
        objective_value=value,
        objective_lower_bound=bound,
        is_exact=is_exact,
        kv_tokens_capacity=_kv_tokens_capacity(prices, spans),
        predicted_tokens_per_s=rows / period_s,
    )


def _bound(bounds: Bounds, objective: Objective, rows: int, value: float) -> float:
    """Return the bound of an objective; rounding alone could put it above an optimum it meets."""
    bound = {
        "throughput": bounds.period_s,
        "latency": bounds.latency_s,
        "energy": bounds.energy_j / rows,
    }[objective]
    return min(bound, value)


def _energy_j_per_token(
    prices: StagePrices, spans: Sequence[Span], stages: Sequence[StagePlacement]
) -> float | None:
    total_j = 0.0
    for span, stage in zip(spans, stages, strict=True):
        watts = prices.devices[span.device].active_power_w
        if watts is None:
            return None
        total_j += watts * stage.step_s
    return total_j / prices.workload.sequences_per_lane


def _placements(prices: StagePrices, spans: Sequence[Span]) -> tuple[StagePlacement, ...]:
    profile = prices.profile
    steps_s = [float(prices.steps_s[prices.make_of[d], first, end]) for d, first, end in spans]
    nodes = [int(prices.node_of[span.device]) for span in spans]
    hops = [*itertools.pairwise(nodes)]
    hops_s = [*(float(prices.hop_s[hop]) for hop in hops), 0.0]
    hops_busy_s = [*(float(prices.occupied_s[hop]) for hop in hops), 0.0]
    return tuple(
        StagePlacement(
            index=index,
            device_id=prices.devices[device].id,
            node=prices.devices[device].node,
            kind=prices.devices[device].kind,
            first_layer=first,
            end_layer=end,
            weight_bytes=stage_weight_bytes(profile, first, end),
            kv_bytes=stage_kv_bytes(profile, first, end, prices.workload.kv_tokens),
            activation_bytes=prices.activation_bytes(first, end),
            memory_cap_bytes=prices.cap_bytes_of[device],
            step_s=steps_s[index],
            share_of_bottleneck=steps_s[index] / max(steps_s),
            hop_s=hops_s[index],
            hop_busy_s=hops_busy_s[index],
            num_experts=sum(layer.num_experts for layer in profile.layers[first:end]),
        )
        for index, (device, first, end) in enumerate(spans)
    )


def _kv_tokens_capacity(prices: StagePrices, spans: Sequence[Span]) -> int:
    capacities = []
    for device, first, end in spans:
        bytes_per_token = stage_kv_bytes(prices.profile, first, end, 1)
        if bytes_per_token:
            free_bytes = prices.cap_bytes_of[device] - prices.fixed_bytes(first, end)
            capacities.append(free_bytes // bytes_per_token)
    # A model without KV is bounded by nothing here; what was asked for is what it gets.
    return min(capacities, default=prices.workload.kv_tokens)


def split_verdict(plan: StagesPlan, alone: StagesPlan | None) -> str:
    """Say in plain words whether to split the model, and what that wins or costs.

    `alone` is what `best_single` returned for the same question.
    """
    if alone is None:
        return (
            f"split: no device holds {plan.model} alone; {len(plan.stages)} stages give "
            f"{_figures_of(plan)}"
        )
    device = alone.stages[0].device_id
    is_better = alone.objective_value < plan.objective_value * (1.0 - TIE)
    if len(plan.stages) == 1 and not is_better:
        proof = f"; no split improves the {plan.objective}" if plan.is_exact else ""
        return (
            f"do not split: {plan.stages[0].device_id} holds {plan.model} alone and gives "
            f"{_figures_of(plan)}{proof}"
        )
    if alone.objective_value <= plan.objective_value:
        return (
            f"do not split: {device} alone gives {_figures_of(alone)}; this plan of "
            f"{len(plan.stages)} stages gives {_figures_of(plan)}"
        )
    tokens = plan.predicted_tokens_per_s / alone.predicted_tokens_per_s
    latency = plan.latency_s / alone.latency_s
    single = "faster" if latency < 1.0 else "slower"
    return (
        f"split for {plan.objective}: {len(plan.stages)} stages give {_figures_of(plan)}; "
        f"{device} alone gives {_figures_of(alone)}. All lanes together get {tokens:.2f} times "
        f"the tokens/s; a single stream is {single}, {latency:.2f} times as long a step"
    )


def _figures_of(plan: StagesPlan) -> str:
    energy = plan.energy_j_per_token
    joules = "" if energy is None else f", {energy:.3g} J a token"
    return (
        f"{plan.predicted_tokens_per_s:.1f} tokens/s and {plan.latency_s * 1e3:.2f} ms "
        f"a step{joules}"
    )
