"""Serving stages: cut a model's layers over unequal devices so that the slowest stage is fast.

With several lanes in flight every stage works on some lane's step, so throughput is set by the
slowest stage: the planner minimises that (exact min-max), under memory caps, with devices taken
in the order given and each allowed to stay out. Links enter the latency, not the objective: a
lane's transfer overlaps the other lanes' compute.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from placement.costs import stage_cost, stage_kv_bytes, stage_weight_bytes, transfer_s
from placement.errors import InfeasiblePlanError
from placement.pricing import StagePrices
from placement.topology import Device, DeviceKind, Topology
from placement.workload import ModelProfile, ServingWorkload


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
    step_s: float
    share_of_bottleneck: float
    """This stage's step over the slowest stage's: the share of time it is busy at best."""

    @property
    def num_layers(self) -> int:
        return self.end_layer - self.first_layer


@dataclass(frozen=True, kw_only=True, slots=True)
class StagesPlan:
    """Which device runs which layers, what that should cost, and how good it could be."""

    epoch: int = 0
    model: str
    stages: tuple[StagePlacement, ...]
    left_out: tuple[tuple[str, str], ...]
    """(device id, why it has no stage)."""
    bottleneck_s: float
    """One step of the slowest stage at the workload."""
    latency_s: float
    """One step through all stages, transfers between them included."""
    lower_bound_s: float
    """No cut over these devices, in any order, has a bottleneck below this
    (see `StagePrices.lower_bound_s`)."""
    kv_tokens_capacity: int
    """KV tokens, summed over the lanes, that fit the tightest stage."""
    predicted_tokens_per_s: float
    """The lanes' decode rate: one step per bottleneck, or all lanes' steps per latency."""

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


def plan_stages(
    profile: ModelProfile,
    topology: Topology,
    *,
    workload: ServingWorkload,
    headroom_fraction: float = 0.1,
    layer_counts: Sequence[int] | None = None,
) -> StagesPlan:
    """Cut the layers over the devices so that the slowest stage's step is as short as possible.

    Exact dynamic programme over (device, first layer), O(devices x layers^2). Among the cuts
    with the shortest bottleneck: fewest devices, then the smallest sum of stage steps, then the
    lexicographically smallest layer counts, so equal inputs give equal plans.

    `layer_counts` forces the cut: one count per device, 0 leaves it out.

    Raises:
        InfeasiblePlanError: Weights, KV and activations fit no cut (or not the forced one).
        ValueError: `headroom_fraction` or `layer_counts` is malformed.
    """
    if not 0.0 <= headroom_fraction < 1.0:
        raise ValueError(f"headroom_fraction ({headroom_fraction}) must be at least 0 and below 1")
    prices = StagePrices(profile, topology.devices, workload, headroom_fraction)
    if layer_counts is not None:
        return _assemble(prices, topology, _checked_counts(prices, layer_counts), forced=True)
    return _assemble(prices, topology, _best_counts(prices), forced=False)


def _best_counts(prices: StagePrices) -> list[int]:
    """Return the optimal layer count of every device (0: left out)."""
    bottleneck_s = _least_bottleneck_s(prices)
    if math.isinf(bottleneck_s):
        raise InfeasiblePlanError(_shortfall(prices))
    num_layers = prices.profile.num_layers
    # Each entry is (devices, sum of steps, own count) of the best way to run layers[first:] on
    # devices[d:] with no stage over the bottleneck. Both sums are additive, so the best
    # continuation does not depend on the stages before it.
    after: list[tuple[float, float, int]] = [(math.inf, math.inf, 0)] * num_layers + [(0, 0.0, 0)]
    tables = []
    for rows in reversed(prices.steps_s):
        table = [(devices, sum_s, 0) for devices, sum_s, _ in after]
        for first, row in enumerate(rows):
            for count, step_s in enumerate(row, start=1):
                if step_s > bottleneck_s:
                    break
                devices, sum_s, _ = after[first + count]
                table[first] = min(table[first], (devices + 1, sum_s + step_s, count))
        tables.append(table)
        after = table
    counts: list[int] = []
    for table in reversed(tables):
        counts.append(table[sum(counts)][2])
    return counts


def _least_bottleneck_s(prices: StagePrices) -> float:
    """Return the shortest slowest stage of any cut that fits; infinite when none does."""
    best = [math.inf] * prices.profile.num_layers + [0.0]
    for rows in reversed(prices.steps_s):
        # Ascending, so best[first + count] still speaks of the devices after this one.
        for first, row in enumerate(rows):
            for count, step_s in enumerate(row, start=1):
                best[first] = min(best[first], max(step_s, best[first + count]))
    return best[0]


def _checked_counts(prices: StagePrices, layer_counts: Sequence[int]) -> list[int]:
    num_devices, num_layers = len(prices.devices), prices.profile.num_layers
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
    for device, first, end in _ranges(prices.devices, counts):
        need, cap = prices.need_bytes[first][end - first - 1], prices.cap_bytes(device)
        if need > cap:
            raise InfeasiblePlanError(
                f"layer_counts puts layers [{first}, {end}) on {device.id}, which with KV and "
                f"activations need {need} bytes; it offers {cap} after a headroom of "
                f"{prices.headroom_fraction:.0%}. Give it fewer layers, or lower kv_tokens "
                f"({prices.workload.kv_tokens}) or step_tokens ({prices.workload.step_tokens})."
            )
    return counts


class _Range(NamedTuple):
    device: Device
    first: int
    end: int


def _ranges(devices: Sequence[Device], counts: Sequence[int]) -> list[_Range]:
    """Return the layers of every device that has some."""
    ranges = []
    first = 0
    for device, count in zip(devices, counts, strict=True):
        if count:
            ranges.append(_Range(device, first, first + count))
        first += count
    return ranges


def _assemble(
    prices: StagePrices, topology: Topology, counts: Sequence[int], *, forced: bool
) -> StagesPlan:
    profile, workload = prices.profile, prices.workload
    ranges = _ranges(prices.devices, counts)
    rows = workload.sequences_per_lane
    steps_s = [
        stage_cost(device, profile, first, end).step_s(rows, workload.context_tokens, rows)
        for device, first, end in ranges
    ]
    bottleneck_s = max(steps_s)
    hop_bytes = rows * profile.hidden_bytes_per_token
    hops_s = [
        transfer_s(topology.link(source.device.node, target.device.node), hop_bytes)
        for source, target in itertools.pairwise(ranges)
    ]
    latency_s = sum(steps_s) + sum(hops_s)
    return StagesPlan(
        model=profile.name,
        stages=_placements(prices, ranges, steps_s),
        left_out=_left_out(prices, counts, bottleneck_s, forced=forced),
        bottleneck_s=bottleneck_s,
        latency_s=latency_s,
        # Rounding alone could put the bound a hair above an optimum that meets it.
        lower_bound_s=min(prices.lower_bound_s(), bottleneck_s),
        kv_tokens_capacity=_kv_tokens_capacity(prices, ranges),
        predicted_tokens_per_s=rows * min(1.0 / bottleneck_s, workload.lanes / latency_s),
    )


def _placements(
    prices: StagePrices, ranges: Sequence[_Range], steps_s: Sequence[float]
) -> tuple[StagePlacement, ...]:
    profile, bottleneck_s = prices.profile, max(steps_s)
    return tuple(
        StagePlacement(
            index=index,
            device_id=device.id,
            node=device.node,
            kind=device.kind,
            first_layer=first,
            end_layer=end,
            weight_bytes=stage_weight_bytes(profile, first, end),
            kv_bytes=stage_kv_bytes(profile, first, end, prices.workload.kv_tokens),
            step_s=step_s,
            share_of_bottleneck=step_s / bottleneck_s,
        )
        for index, ((device, first, end), step_s) in enumerate(zip(ranges, steps_s, strict=True))
    )


def _kv_tokens_capacity(prices: StagePrices, ranges: Sequence[_Range]) -> int:
    capacities = []
    for device, first, end in ranges:
        bytes_per_token = stage_kv_bytes(prices.profile, first, end, 1)
        if bytes_per_token:
            free_bytes = prices.cap_bytes(device) - prices.fixed_bytes(first, end)
            capacities.append(free_bytes // bytes_per_token)
    # A model without KV is bounded by nothing here; what was asked for is what it gets.
    return min(capacities, default=prices.workload.kv_tokens)


def _left_out(
    prices: StagePrices, counts: Sequence[int], bottleneck_s: float, *, forced: bool
) -> tuple[tuple[str, str], ...]:
    reasons = []
    for index, (device, count) in enumerate(zip(prices.devices, counts, strict=True)):
        if not count:
            reason = (
                "layer_counts gives it 0 layers"
                if forced
                else _why_left_out(prices, index, bottleneck_s)
            )
            reasons.append((device.id, reason))
    return tuple(reasons)


def _why_left_out(prices: StagePrices, index: int, bottleneck_s: float) -> str:
    single_steps_s = [row[0] for row in prices.steps_s[index] if row]
    if not single_steps_s:
        return (
            f"its {prices.cap_bytes(prices.devices[index])} bytes after headroom hold no layer; "
            f"the smallest stage needs {min(needs[0] for needs in prices.need_bytes)}"
        )
    slowest = f"the slowest stage takes {bottleneck_s * 1e3:.3g} ms"
    if min(single_steps_s) > bottleneck_s:
        return f"one layer takes {min(single_steps_s) * 1e3:.3g} ms there; {slowest} without it"
    return f"it would not make the slowest stage faster: {slowest} with it or without"


def _shortfall(prices: StagePrices) -> str:
    profile, workload = prices.profile, prices.workload
    weight_bytes = stage_weight_bytes(profile, 0, profile.num_layers)
    kv_bytes = stage_kv_bytes(profile, 0, profile.num_layers, workload.kv_tokens)
    activation_bytes = prices.fixed_bytes(0, profile.num_layers) - weight_bytes
    caps = [prices.cap_bytes(device) for device in prices.devices]
    return (
        f"{profile.num_layers} layers need {weight_bytes + kv_bytes} bytes "
        f"({weight_bytes} of weights, {kv_bytes} of KV for {workload.kv_tokens} tokens) and "
        f"up to {activation_bytes} of activations on every device; {len(caps)} devices offer "
        f"{sum(caps)} bytes ({', '.join(map(str, caps))}) after a headroom of "
        f"{prices.headroom_fraction:.0%}, and no cut in their order fits. Add devices or memory, "
        f"lower kv_tokens (lanes, sequences_per_lane, context_tokens), step_tokens or "
        f"headroom_fraction, or use a smaller dtype."
    )
