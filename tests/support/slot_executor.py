"""Runs a SlotDispatcher against devices whose true speeds it does not know."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from placement.dispatch import SlotDispatcher
from placement.pooling.slot_prices import SlotPrices
from placement.pooling.steady import slot_options
from placement.train import TrainPlan
from placement.training import TrainingCosts

SlowDown = Callable[[int, str], float]
"""Seconds of a visit of (round, device id) over those of the true costs."""


@dataclass
class Run:
    """What happened."""

    visits: list[tuple[int, int, str]] = field(default_factory=list)
    """(round, slot, device), in order of dispatch."""
    round_ends_s: list[float] = field(default_factory=list)
    is_round_robin: list[bool] = field(default_factory=list)
    """Per visit."""

    @property
    def num_done(self) -> int:
        """Rounds done, all those before included."""
        return next(
            (index for index, end_s in enumerate(self.round_ends_s) if math.isinf(end_s)),
            len(self.round_ends_s),
        )

    def seconds_per_round(self, first: int, end: int) -> float:
        """Of rounds [first, end), by when they ended."""
        ends_s = list(itertools.accumulate(self.round_ends_s, max))
        return (ends_s[end - 1] - ends_s[first - 1]) / (end - first)


@dataclass
class _Visit:
    round_index: int
    slot: int
    device: int
    upload_from_s: float
    """When the upload of its weights may begin."""
    ends_s: list[float] = field(default_factory=list)
    """Micro-batches done, or under way."""
    num_done: int = 0


class SlotExecutor:
    """One queue of at most `depth` slots per device, micro-batch by micro-batch.

    Args:
        plan: The slots.
        costs: True costs; times the `slow_down` of a round and device.
        dispatcher: Under test.
    """

    def __init__(
        self,
        plan: TrainPlan,
        costs: TrainingCosts,
        dispatcher: SlotDispatcher,
        *,
        slow_down: SlowDown = lambda _round, _device: 1.0,
        depth: int = 2,
    ) -> None:
        self.costs = costs
        self.schedule = plan.schedule(costs)
        self.options = slot_options(SlotPrices(costs), self.schedule)
        self.dispatcher = dispatcher
        self.slow_down = slow_down
        self.depth = depth
        self.available = set(costs.device_ids)
        self.run = Run()
        self.queues: list[deque[_Visit]] = [deque() for _ in costs.device_ids]
        self.free_s = [0.0] * costs.num_devices
        self.visits: dict[tuple[int, int], _Visit] = {}
        self.events: list[tuple[float, int, _Visit]] = []
        self.ticket = itertools.count()
        self.now_s = 0.0

    def run_until(self, num_rounds: int) -> Run:
        """Run until so many rounds are done."""
        self._dispatch()
        while self.run.num_done < num_rounds:
            self._start()
            self.now_s, _, visit = heapq.heappop(self.events)
            if self._micro_batch_done(visit):
                self._dispatch()
        return self.run

    def _may_begin(self, round_index: int) -> bool:
        rounds = self.schedule.rounds_per_step
        if rounds is None:
            return True
        needed = (round_index // rounds - self.schedule.staleness) * rounds
        return self.run.num_done >= needed

    def _pending(self) -> Iterator[tuple[int, int]]:
        for round_index in itertools.count(self.run.num_done):
            if not self._may_begin(round_index):
                return
            for slot in range(len(self.options)):
                if (round_index, slot) not in self.visits:
                    yield round_index, slot

    def _dispatch(self) -> None:
        while True:
            choice = self.dispatcher.choose(
                self._pending(), now_s=self.now_s, available=self.available
            )
            if choice is None:
                return
            round_index, slot, device_id = choice
            self.dispatcher.dispatched(*choice, now_s=self.now_s)
            device = self.costs.device_ids.index(device_id)
            assert len(self.queues[device]) < self.depth
            visit = _Visit(round_index, slot, device, self.now_s)
            self.queues[device].append(visit)
            self.visits[round_index, slot] = visit
            self.run.visits.append((round_index, slot, device_id))
            self.run.is_round_robin.append(self.dispatcher.is_round_robin)

    def _start(self) -> None:
        """Set every micro-batch under way whose end can be told."""
        for queue in self.queues:
            if queue and len(queue[0].ends_s) == queue[0].num_done:
                visit = queue[0]
                end_s = self._end_s(visit, len(visit.ends_s))
                if end_s is not None:
                    visit.ends_s.append(end_s)
                    heapq.heappush(self.events, (end_s, next(self.ticket), visit))

    def _end_s(self, visit: _Visit, micro_batch: int) -> float | None:
        """Return when a micro-batch will end, or None while its inputs are not made."""
        option = next(o for o in self.options[visit.slot] if o.device == visit.device)
        slow = self.slow_down(visit.round_index, self.costs.device_ids[visit.device])
        lead_s, total_s = slow * option.lead_s, slow * option.total_s
        ready_s = max(self.free_s[visit.device], visit.upload_from_s + option.upload_s)
        if micro_batch:
            ready_s = visit.ends_s[-1]
        if not visit.slot:
            return ready_s + total_s
        before = self.visits.get((visit.round_index, visit.slot - 1))
        if before is None or before.num_done <= micro_batch:
            return None
        link_s = self.costs.hand_off_s[before.device][visit.device]
        arrival_s = max(
            before.ends_s[m] + (micro_batch - m + 1) * link_s for m in range(micro_batch + 1)
        )
        if lead_s and self.schedule.num_forward:
            saved = self.visits[visit.round_index, self.schedule.num_forward - 1]
            ready_s = max(ready_s, saved.ends_s[micro_batch])
        return max(ready_s, arrival_s - lead_s) + total_s

    def _micro_batch_done(self, visit: _Visit) -> bool:
        """Return whether it was the slot's last."""
        visit.num_done += 1
        at = visit.round_index, visit.slot
        self.dispatcher.progressed(*at, now_s=self.now_s)
        if visit.num_done < self.schedule.micro_batches:
            return False
        device_id = self.costs.device_ids[visit.device]
        option = next(o for o in self.options[visit.slot] if o.device == visit.device)
        slow = self.slow_down(visit.round_index, device_id)
        self.dispatcher.finished(*at, now_s=self.now_s, micro_batch_s=slow * option.total_s)
        self.free_s[visit.device] = self.now_s
        self.queues[visit.device].popleft()
        for following in self.queues[visit.device]:
            began_s = visit.ends_s[0] - slow * option.total_s
            following.upload_from_s = max(following.upload_from_s, began_s)
        if visit.slot + 1 == len(self.options):
            ends_s = self.run.round_ends_s
            ends_s += [math.inf] * (visit.round_index + 1 - len(ends_s))
            ends_s[visit.round_index] = self.now_s
        return True
