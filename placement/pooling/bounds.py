"""What no schedule of a cut can beat."""

from __future__ import annotations

from placement.pooling.slot_prices import SlotPrices
from placement.pooling.steady import alone_s
from placement.training import RecomputeGrain, Slot, SlotSchedule, TrainingCosts


def lower_bound_s(costs: TrainingCosts, schedule: SlotSchedule) -> float:
    """Return the least seconds per round of any dispatch, and of any cut with the same fused stage
    and the same layers kept.

    With L_d the share of device d in the aggregate speed, no round is shorter than any weighted
    mean of the devices' busy times, hence not than the sum over layer passes of min over d of
    L_d x seconds on d.
    """
    speeds = [1.0 / seconds for seconds in alone_s(SlotPrices(costs), schedule)]
    shares = [speed / sum(speeds) for speed in speeds]

    def least_s(*seconds: float) -> float:
        return min(share * value for share, value in zip(shares, seconds, strict=True))

    devices = range(costs.num_devices)
    total_s = least_s(*(costs.head_forward_s[d] + costs.head_backward_s[d] for d in devices))
    for slot, grain in zip(schedule.slots, schedule.grain_list, strict=True):
        for layer in range(slot.first_layer, slot.end_layer):
            total_s += least_s(*(_layer_s(costs, slot, grain, layer, d) for d in devices))
    return schedule.micro_batches * total_s


def _layer_s(
    costs: TrainingCosts, slot: Slot, grain: RecomputeGrain, layer: int, device: int
) -> float:
    forward_s, backward_s = costs.forward_s[device][layer], costs.backward_s[device][layer]
    if slot.kind == "forward":
        return forward_s
    if slot.kind == "fused":
        return forward_s + backward_s
    return backward_s if grain == "keep" else costs.recompute_s[device][layer] + backward_s
