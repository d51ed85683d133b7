"""What is predicted to come of the slots that a pool's devices were given so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from placement.pooling.pool import Inputs, SlotOption, slot_ends_s


class SlotVisit(NamedTuple):
    """One slot of one round; in the order in which they are wanted done."""

    round_index: int
    slot_index: int

    @property
    def before(self) -> SlotVisit:
        """The slot whose results it needs; of a round's first slot, one that does not exist."""
        return SlotVisit(self.round_index, self.slot_index - 1)

    @property
    def after(self) -> SlotVisit:
        """The slot that needs its results."""
        return SlotVisit(self.round_index, self.slot_index + 1)


@dataclass(slots=True)
class Progress:
    """A slot that was given to a device."""

    device_id: str
    dispatched_s: float
    num_done: int = 0
    """Micro-batches."""
    first_end_s: float = math.nan
    last_end_s: float = math.nan
    """Of the micro-batches done so far."""
    is_finished: bool = False
    is_fed: bool = False
    """All its inputs exist, though the slot that made them is to run again."""

    def micro_batch_done(self, now_s: float) -> None:
        """Count one more."""
        if not self.num_done:
            self.first_end_s = now_s
        self.num_done += 1
        self.last_end_s = now_s

    def finish(self, now_s: float) -> None:
        """Take all micro-batches as done."""
        if not self.num_done:
            self.first_end_s = now_s
        self.last_end_s, self.is_finished = now_s, True


class Outlook:
    """Devices' clocks as they will be when all that was added is done.

    Args:
        now_s: Nothing more can end before.
        free_since_s: Per device, when it last finished a slot.
    """

    def __init__(self, now_s: float, free_since_s: Mapping[str, float]) -> None:
        self.now_s = now_s
        self.device_of: dict[SlotVisit, str] = {}
        self.ends_s: dict[SlotVisit, tuple[float, float]] = {}
        """When the first and the last micro-batch end."""
        self._free_s = dict(free_since_s)
        self._began_s: dict[str, float] = {}
        """When each device begins its last slot; the next one's upload may start then."""

    def inputs(self, visit: SlotVisit, num_forward: int) -> Inputs:
        """Return when the slot before hands on, and when what a backward slot recomputes from is
        saved; what is not known is there now."""
        first_s, last_s = self.ends_s.get(visit.before, (self.now_s, self.now_s))
        if visit.slot_index <= num_forward:
            return Inputs(first_s, last_s)
        saved = SlotVisit(visit.round_index, num_forward - 1)
        return Inputs(first_s, last_s, *self.ends_s.get(saved, (-math.inf, -math.inf)))

    def end_s(
        self, device_id: str, option: SlotOption, inputs: Inputs, link_s: float, micro_batches: int
    ) -> float:
        """Return when a slot would end if the device were given it now."""
        ready_s = self._ready_s(device_id, option.upload_s, self.now_s)
        return slot_ends_s(option, ready_s, inputs, link_s, micro_batches)[1]

    def add_finished(self, visit: SlotVisit, progress: Progress) -> None:
        """Add a slot that is done."""
        self.device_of[visit] = progress.device_id
        self.ends_s[visit] = progress.first_end_s, progress.last_end_s

    def add(
        self,
        visit: SlotVisit,
        progress: Progress,
        option: SlotOption,
        inputs: Inputs,
        link_s: float,
        micro_batches: int,
    ) -> None:
        """Add a slot behind all others of its device."""
        device_id, total_s = progress.device_id, option.total_s
        if progress.num_done:
            # What is done is fixed; the last input may yet be late.
            left = micro_batches - progress.num_done
            first_s, last_s = progress.first_end_s, progress.last_end_s + left * total_s
            if left:
                arrival_s = max(inputs.first_s + micro_batches * link_s, inputs.last_s + link_s)
                late_s = max(arrival_s - option.lead_s, inputs.last_saved_s) + total_s
                last_s = max(last_s, late_s, self.now_s + (left - 1) * total_s)
        else:
            ready_s = self._ready_s(device_id, option.upload_s, progress.dispatched_s)
            first_s, last_s = slot_ends_s(option, ready_s, inputs, link_s, micro_batches)
            first_s = max(first_s, self.now_s)
            last_s = max(last_s, self.now_s + (micro_batches - 1) * total_s)
        self.device_of[visit] = device_id
        self.ends_s[visit] = first_s, last_s
        self._free_s[device_id] = last_s
        self._began_s[device_id] = first_s - total_s

    def _ready_s(self, device_id: str, upload_s: float, since_s: float) -> float:
        """Return when a slot dispatched at `since_s` could begin, weights included."""
        upload_from_s = max(since_s, self._began_s.get(device_id, since_s))
        return max(since_s, self._free_s.get(device_id, since_s), upload_from_s + upload_s)
