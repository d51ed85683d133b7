"""A pool of stateless devices that works through slots in a fixed order.

A slot runs all micro-batches of its round back to back on one device. Three facts make a slot
O(1) per device instead of O(micro_batches):
- Without recompute, end[m] = max(end[m - 1], arrival[m]) + t. Unrolled, end[m] is the largest of
  free + (m + 1) t and arrival[k] + (m - k + 1) t over k <= m.
- If arrival is convex in m, so is arrival[k] - k t, whose largest value lies at k = 0 or k = m:
  end[m] = max(end[0] + m t, arrival[m] + t). A maximum of convex functions is convex, so the
  arrivals at the next slot are convex too. The first slot's arrivals are equal, hence convex.
- A link hands on one micro-batch at a time: arrival[m] = max(arrival[m - 1], end[m]) + c is the
  same recurrence.
So a slot's times follow from its first and last micro-batch alone. A backward slot recomputes
(`lead_s`) before it needs the incoming gradient: end[m] = max(end[m - 1], saved[m], arrival[m] -
lead) + t. The input that it recomputes from is saved by a forward slot; saved[m] is when the
micro-batch leaves the last of them, which is convex too (a little late for layers of the others).

Weights: a slot's upload starts when its device begins the slot before it, and overlaps it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from placement.training import SlotSchedule


class SlotOption(NamedTuple):
    """A slot on one device that may run it; seconds of one micro-batch except for the upload."""

    device: int
    lead_s: float
    """The part that needs nothing from the slot before: a recompute."""
    total_s: float
    """Lead included."""
    upload_s: float


class Inputs(NamedTuple):
    """When the first and the last micro-batch leave the slot before, and when the inputs saved for
    a recompute exist."""

    first_s: float
    last_s: float
    first_saved_s: float = -math.inf
    last_saved_s: float = -math.inf


class Visit(NamedTuple):
    """A slot on the device it was dispatched to."""

    option: SlotOption
    first_end_s: float
    """When its first micro-batch is done."""
    last_end_s: float


class Pool:
    """The devices' clocks, from one slot to the next.

    Args:
        hand_off_s: [D][D] Seconds to hand one micro-batch on.
        schedule: Its slots' kinds, and how rounds follow each other.
    """

    def __init__(self, hand_off_s: Sequence[Sequence[float]], schedule: SlotSchedule) -> None:
        self.free_s = [0.0] * len(hand_off_s)
        self.upload_from_s = [0.0] * len(hand_off_s)
        """When each device could begin to upload its next slot."""
        self.step_ends_s: list[float] = []
        """When all rounds up to and including each optimizer step are done."""
        self.num_rounds = 0
        self.next_device = 0
        self._hand_off_s = hand_off_s
        self._first_links_s = [0.0] * len(hand_off_s)
        self._micro_batches = schedule.micro_batches
        self._num_forward = schedule.num_forward
        self._round_robin = schedule.dispatch == "round_robin"
        self._rounds_per_step = schedule.rounds_per_step
        self._staleness = schedule.staleness
        self._sources = [
            partner if partner is not None and partner < index else None
            for index, partner in enumerate(schedule.kept_with)
        ]
        """Per slot, the forward slot of the same round whose device it must run on."""

    @property
    def has_steps(self) -> bool:
        """Optimizer steps hold rounds back."""
        return self._rounds_per_step is not None

    def release_s(self) -> float:
        """Return when the next round may begin."""
        if self._rounds_per_step is None:
            return 0.0
        step = self.num_rounds // self._rounds_per_step - 1 - self._staleness
        return self.step_ends_s[step] if step >= 0 else 0.0

    def run_round(self, slots: Sequence[Sequence[SlotOption]]) -> list[Visit]:
        """Dispatch one round; O(slots x devices)."""
        release_s = self.release_s()
        inputs = Inputs(release_s, release_s)
        saved_s = -math.inf, -math.inf
        links_s: Sequence[float] = self._first_links_s
        visits: list[Visit] = []
        for index, options in enumerate(slots):
            source = self._sources[index]
            if source is not None:
                options = (_option_of(options, visits[source].option.device),)
            elif self._round_robin:
                options = (_option_of(options, self.next_device),)
                self.next_device = (self.next_device + 1) % len(self.free_s)
            visit = self._earliest(options, inputs, links_s)
            option, first_s, last_s = visit
            if index == self._num_forward:
                saved_s = inputs[:2]
            inputs = Inputs(first_s, last_s, *saved_s)
            self.free_s[option.device] = last_s
            self.upload_from_s[option.device] = first_s - option.total_s
            links_s = self._hand_off_s[option.device]
            visits.append(visit)
        self._close_round(inputs.last_s)
        return visits

    def _earliest(
        self, options: Sequence[SlotOption], inputs: Inputs, links_s: Sequence[float]
    ) -> Visit:
        """Return the option that ends first; the module docstring derives the formula.

        The planner spends its time here: plain comparisons are faster than max().
        """
        num = self._micro_batches
        first_s, last_s, first_saved_s, last_saved_s = inputs
        best_end_s = best_first_end_s = math.inf
        best = options[0]
        for option in options:
            device, lead_s, total_s, upload_s = option
            ready_s = self.free_s[device]
            if upload_s and self.upload_from_s[device] + upload_s > ready_s:
                ready_s = self.upload_from_s[device] + upload_s
            if first_saved_s > ready_s:
                ready_s = first_saved_s
            link_s = links_s[device]
            first_end_s = ready_s + total_s
            arrival_s = first_s + link_s - lead_s
            if arrival_s > ready_s:
                first_end_s = arrival_s + total_s
            end_s = first_end_s + (num - 1) * total_s
            arrival_s = first_s + num * link_s
            if last_s + link_s > arrival_s:
                arrival_s = last_s + link_s
            begin_s = arrival_s - lead_s
            if last_saved_s > begin_s:
                begin_s = last_saved_s
            if begin_s + total_s > end_s:
                end_s = begin_s + total_s
            if end_s < best_end_s:
                best, best_end_s, best_first_end_s = option, end_s, first_end_s
        return Visit(best, best_first_end_s, best_end_s)

    def _close_round(self, end_s: float) -> None:
        rounds = self._rounds_per_step or 1
        if self.num_rounds % rounds == 0:
            before_s = self.step_ends_s[-1] if self.step_ends_s else 0.0
            self.step_ends_s.append(max(before_s, end_s))
        else:
            self.step_ends_s[-1] = max(self.step_ends_s[-1], end_s)
        self.num_rounds += 1


def micro_batch_ends_s(
    option: SlotOption,
    ready_s: float,
    before_s: Sequence[float],
    saved_s: Sequence[float],
    link_s: float,
) -> list[float]:
    """Return when each micro-batch of a slot ends, by the recurrences themselves.

    `before_s` tells when each left the slot before, `saved_s` when the input to recompute it from
    exists.
    """
    ends_s = []
    end_s = ready_s
    arrival_s = -math.inf
    for done_s, kept_s in zip(before_s, saved_s, strict=True):
        arrival_s = max(arrival_s, done_s) + link_s
        end_s = max(end_s, kept_s, arrival_s - option.lead_s) + option.total_s
        ends_s.append(end_s)
    return ends_s


def slot_ends_s(
    option: SlotOption, ready_s: float, inputs: Inputs, link_s: float, micro_batches: int
) -> tuple[float, float]:
    """Return when the first and the last micro-batch of a slot end on a device that is ready at
    `ready_s`, weights included. What `Pool` inlines."""
    _, lead_s, total_s, _ = option
    first_s, last_s, first_saved_s, last_saved_s = inputs
    first_end_s = max(ready_s, first_saved_s, first_s + link_s - lead_s) + total_s
    arrival_s = max(first_s + micro_batches * link_s, last_s + link_s)
    end_s = first_end_s + (micro_batches - 1) * total_s
    return first_end_s, max(end_s, max(arrival_s - lead_s, last_saved_s) + total_s)


def _option_of(options: Sequence[SlotOption], device: int) -> SlotOption:
    for option in options:
        if option.device == device:
            return option
    raise ValueError(
        f"a slot is sent to device {device}, which may not run it: in round_robin every device "
        f"must fit every slot, and one that keeps activations their backward slot too"
    )
