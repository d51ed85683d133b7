"""Runs a SlotDispatcher against devices whose true speeds it does not know."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from placement.dispatch import QUEUE_SLOTS, SlotDispatcher
from placement.pooling.pool import SlotOption
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
    began_s: dict[tuple[int, int], float] = field(default_factory=dict)
    """When the first micro-batch of a (round, slot) began."""
    ended_s: dict[tuple[int, int], float] = field(default_factory=dict)
    device_of: dict[tuple[int, int], str] = field(default_factory=dict)
    round_ends_s: list[float] = field(default_factory=list)
    is_round_robin: list[bool] = field(default_factory=list)
    """Per visit."""

    @property
    def num_done(self) -> int:
        """Rounds done, all those before included."""
        ends_s = self.round_ends_s
        return next((i for i, end_s in enumerate(ends_s) if math.isinf(end_s)), len(ends_s))

    def seconds_per_round(self, first: int, end: int) -> float:
        """Of rounds [first, end), by when they ended."""
        ends_s = list(itertools.accumulate(self.round_ends_s, max))
        return (ends_s[end - 1] - ends_s[first - 1]) / (end - first)


@dataclass(eq=False)
class _Visit:
    at: tuple[int, int]
    device_id: str
    option: SlotOption
    """At its true seconds."""
    upload_from_s: float
    """When the upload of its weights may begin."""
    ends_s: list[float] = field(default_factory=list)
    """Micro-batches done, or under way."""
    num_done: int = 0
    is_lost: bool = False
    is_fed: bool = False
    """Its inputs exist, though the slot that made them is lost."""


class SlotExecutor:
    """One queue per device, micro-batch by micro-batch.

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
    ) -> None:
        self.dispatcher = dispatcher
        self.slow_down = slow_down
        self.available = set(costs.device_ids)
        self.run = Run()
        self.now_s = 0.0
        self._queues: dict[str, list[_Visit]] = {device_id: [] for device_id in costs.device_ids}
        self._free_s = dict.fromkeys(costs.device_ids, 0.0)
        self._visits: dict[tuple[int, int], _Visit] = {}
        self._events: list[tuple[float, int, _Visit]] = []
        self._ticket = itertools.count()
        self._plans: list[tuple[int, _Plan]] = [(0, _Plan(plan, costs))]

    def run_until(self, num_rounds: int) -> Run:
        """Run until so many rounds are done."""
        self._dispatch()
        while self.run.num_done < num_rounds:
            self._start()
            self.now_s, _, visit = heapq.heappop(self._events)
            if not visit.is_lost and self._micro_batch_done(visit):
                self._dispatch()
        return self.run

    @property
    def next_round(self) -> int:
        """The first of which nothing is dispatched."""
        return 1 + max((round_index for round_index, _ in self._visits), default=-1)

    def replan(self, plan: TrainPlan, costs: TrainingCosts, true_costs: TrainingCosts) -> None:
        """Use another plan, made from `costs`, from the next round on; new devices join."""
        first = self.next_round
        self.dispatcher.replan(plan, costs, from_round=first)
        self._plans.append((first, _Plan(plan, true_costs)))
        for device_id in true_costs.device_ids:
            self._queues.setdefault(device_id, [])
            self._free_s.setdefault(device_id, self.now_s)
            self.available.add(device_id)

    def lose(self, device_id: str) -> None:
        """Take a device away in the middle of what it does."""
        self.available.remove(device_id)
        lost = list(self._queues[device_id])
        for visit in [v for v in self._visits.values() if v.device_id == device_id]:
            table = self._plan(visit.at[0])
            partner = table.kept_with[visit.at[1]]
            if partner is None or visit in lost or partner < visit.at[1]:
                continue
            user = self._visits.get((visit.at[0], partner))
            if user is None or user.num_done < table.micro_batches:
                lost.append(visit)
        gone = {visit.at for visit in lost}
        for queue in self._queues.values():
            stays = [v for v in queue[:1] if not self._waits(v, gone)]
            lost += [visit for visit in queue if visit not in lost and visit not in stays]
        for visit in lost:
            visit.is_lost = True
            del self._visits[visit.at]
            self.run.ended_s.pop(visit.at, None)
            after = self._visits.get((visit.at[0], visit.at[1] + 1))
            if after and visit.num_done == self._plan(visit.at[0]).micro_batches:
                after.is_fed = True
            if visit in self._queues[visit.device_id]:
                self._queues[visit.device_id].remove(visit)
            self.dispatcher.forget(*visit.at)

    def _plan(self, round_index: int) -> _Plan:
        return next(plan for first, plan in reversed(self._plans) if first <= round_index)

    def _waits(self, visit: _Visit, gone: set[tuple[int, int]]) -> bool:
        """Whether it still needs results, and an earlier slot of its round is not dispatched."""
        round_index, slot = visit.at
        before = self._visits.get((round_index, slot - 1))
        if slot == 0 or (before and before.num_done == self._plan(round_index).micro_batches):
            return False
        earlier = [(round_index, index) for index in range(slot)]
        return any(at in gone or at not in self._visits for at in earlier)

    def _may_begin(self, round_index: int) -> bool:
        plan = self._plan(round_index)
        if plan.rounds_per_step is None:
            return True
        step = round_index // plan.rounds_per_step
        return self.run.num_done >= (step - plan.staleness) * plan.rounds_per_step

    def _pending(self) -> Iterator[tuple[int, int]]:
        for round_index in itertools.count(self.run.num_done):
            if not self._may_begin(round_index):
                return
            for slot in range(len(self._plan(round_index).options)):
                if (round_index, slot) not in self._visits:
                    yield round_index, slot

    def _dispatch(self) -> None:
        while (
            choice := self.dispatcher.choose(
                self._pending(), now_s=self.now_s, available=self.available
            )
        ) is not None:
            self.dispatcher.dispatched(*choice, now_s=self.now_s)
            round_index, slot, device_id = choice
            assert device_id in self.available
            queue = self._queues[device_id]
            assert len(queue) < QUEUE_SLOTS
            option = self._plan(round_index).options[slot][device_id]
            slow = self.slow_down(round_index, device_id)
            option = option._replace(lead_s=slow * option.lead_s, total_s=slow * option.total_s)
            visit = _Visit((round_index, slot), device_id, option, self.now_s)
            if queue and queue[0].ends_s:
                visit.upload_from_s = max(self.now_s, queue[0].ends_s[0] - queue[0].option.total_s)
            queue.append(visit)
            self._visits[visit.at] = visit
            self.run.visits.append((round_index, slot, device_id))
            self.run.device_of[visit.at] = device_id
            self.run.is_round_robin.append(self.dispatcher.is_round_robin)

    def _start(self) -> None:
        """Set every micro-batch under way whose end can be told."""
        for queue in self._queues.values():
            if queue and len(queue[0].ends_s) == queue[0].num_done:
                visit = queue[0]
                end_s = self._end_s(visit)
                if end_s is not None:
                    visit.ends_s.append(end_s)
                    heapq.heappush(self._events, (end_s, next(self._ticket), visit))

    def _end_s(self, visit: _Visit) -> float | None:
        """Return when the next micro-batch will end, or None while its inputs are not made."""
        micro_batch, option = visit.num_done, visit.option
        ready_s = max(self._free_s[visit.device_id], visit.upload_from_s + option.upload_s)
        if micro_batch:
            ready_s = visit.ends_s[-1]
        round_index, slot = visit.at
        if not slot or visit.is_fed:
            return ready_s + option.total_s
        before = self._visits.get((round_index, slot - 1))
        if before is None or before.num_done <= micro_batch:
            return None
        plan = self._plan(round_index)
        link_s = plan.link_s(before.device_id, visit.device_id)
        arrival_s = max(
            before.ends_s[m] + (micro_batch - m + 1) * link_s for m in range(micro_batch + 1)
        )
        saved = self._visits.get((round_index, plan.num_forward - 1))
        if option.lead_s and saved and saved.ends_s:
            ready_s = max(ready_s, saved.ends_s[micro_batch])
        return max(ready_s, arrival_s - option.lead_s) + option.total_s

    def _micro_batch_done(self, visit: _Visit) -> bool:
        """Return whether it was the slot's last."""
        visit.num_done += 1
        self.dispatcher.progressed(*visit.at, now_s=self.now_s)
        plan = self._plan(visit.at[0])
        if visit.num_done < plan.micro_batches:
            return False
        self.dispatcher.finished(*visit.at, now_s=self.now_s, micro_batch_s=visit.option.total_s)
        self.run.began_s[visit.at] = visit.ends_s[0] - visit.option.total_s
        self.run.ended_s[visit.at] = self._free_s[visit.device_id] = self.now_s
        queue = self._queues[visit.device_id]
        queue.remove(visit)
        for following in queue:
            following.upload_from_s = max(following.upload_from_s, self.run.began_s[visit.at])
        self._close(visit.at[0], len(plan.options))
        return True

    def _close(self, round_index: int, num_slots: int) -> None:
        ends_s = self.run.round_ends_s
        ends_s += [math.inf] * (round_index + 1 - len(ends_s))
        slots = [(round_index, slot) for slot in range(num_slots)]
        if all(at in self._visits and at in self.run.ended_s for at in slots):
            ends_s[round_index] = self.now_s


class _Plan:
    """A plan's slots at their true costs, by device id."""

    def __init__(self, plan: TrainPlan, costs: TrainingCosts) -> None:
        schedule = plan.schedule(costs)
        self._costs = costs
        self.micro_batches = schedule.micro_batches
        self.num_forward = schedule.num_forward
        self.rounds_per_step = schedule.rounds_per_step
        self.staleness = schedule.staleness
        self.kept_with = schedule.kept_with
        self.options = [
            {costs.device_ids[option.device]: option for option in row}
            for row in slot_options(SlotPrices(costs), schedule)
        ]

    def link_s(self, source: str, target: str) -> float:
        """Return a hand-off's seconds; 0 from a device that is gone since."""
        if source not in self._costs.device_ids:
            return 0.0
        devices = self._costs.device_ids
        return self._costs.hand_off_s[devices.index(source)][devices.index(target)]
