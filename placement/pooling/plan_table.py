"""A training plan's slots by device id: planned seconds, links, and what takes turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from placement.pooling.slot_prices import SlotPrices
from placement.pooling.steady import slot_options
from placement.train_plan import TrainPlan
from placement.training import RecomputeGrain, Slot, SlotKind, TrainingCosts


class PlanTable:
    """A plan that holds from some round on."""

    def __init__(self, first_round: int, plan: TrainPlan, costs: TrainingCosts) -> None:
        schedule = plan.schedule(costs)
        names = costs.device_ids
        in_order = sorted(range(costs.num_devices), key=lambda device: names[device])
        planned = {share.device_id for share in plan.devices}
        self.first_round = first_round
        self.micro_batches = plan.micro_batches
        self.num_forward = schedule.num_forward
        self.kept_with = schedule.kept_with
        self.slots: list[tuple[Slot, RecomputeGrain]] = list(
            zip(schedule.slots, schedule.grain_list, strict=True)
        )
        """What tells a slot from others, in this plan or another."""
        self.options = [
            {names[option.device]: option for option in sorted(row, key=lambda o: names[o.device])}
            for row in slot_options(SlotPrices(costs), schedule)
        ]
        """Per slot, planned on the devices that may run it, in order of id."""
        self.device_ids = sorted({device_id for row in self.options for device_id in row})
        """Those that may run any slot."""
        self.links_s = {
            names[a]: {names[b]: costs.hand_off_s[a][b] for b in in_order} for a in in_order
        }
        self.alone_s = {
            names[device]: _alone_s(costs, device)
            for device in in_order
            if names[device] in planned
        }
        """What a micro-batch would take on each device alone, in order of id."""

    def source(self, slot_index: int) -> int | None:
        """Return the forward slot whose kept activations a backward slot uses."""
        partner = self.kept_with[slot_index]
        return partner if partner is not None and partner < slot_index else None

    def may_take_turns(self, devices: Sequence[str]) -> bool:
        """Every device may run every slot, wherever its round's other slots ran."""
        return all(partner is None for partner in self.kept_with) and all(
            device_id in row for row in self.options for device_id in devices
        )

    def are_equal(
        self, devices: Sequence[str], seconds: Callable[[int, str], float], limit: float
    ) -> bool:
        """Whether the devices' forward, fused and backward seconds of a round differ by at most
        the share `limit`, and their links by that share of the shortest slot.

        `seconds` are those of a slot on a device.
        """
        totals_s: dict[SlotKind, list[float]] = {}
        shortest_s = math.inf
        for slot_index, (slot, _) in enumerate(self.slots):
            row = [seconds(slot_index, device_id) for device_id in devices]
            so_far = totals_s.get(slot.kind, [0.0] * len(devices))
            totals_s[slot.kind] = [a + b for a, b in zip(so_far, row, strict=True)]
            shortest_s = min(shortest_s, *row)
        links = [self.links_s[a][b] for a in devices for b in devices if a != b]
        if links and max(links) - min(links) > limit * shortest_s:
            return False
        return all(max(row) <= (1.0 + limit) * min(row) for row in totals_s.values())


def _alone_s(costs: TrainingCosts, device: int) -> float:
    rows = costs.forward_s[device], costs.recompute_s[device], costs.backward_s[device]
    heads_s = costs.head_forward_s[device] + costs.head_backward_s[device]
    return math.fsum(math.fsum(row) for row in rows) + heads_s
