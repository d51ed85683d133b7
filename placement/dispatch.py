"""Which slot of a training run goes to which device next, decided as the run goes.

Every slot goes to the device that is predicted to finish it first, by the seconds that slots were
measured to take. Predictions start afresh from what is known at every decision (what was
dispatched, which micro-batches are done and when), by the formulas of `placement.pooling.pool`,
so that an error never adds up. No clock: time is an argument, in seconds on any one clock.

Devices are given few slots at a time (one that runs and one whose weights are brought), yet the
best device for the next slot may well be one that is busy for long. So slots are decided in order
with queues as long as it takes; the first slot that lands on a device with room is dispatched, and
all others are decided again next time. A slot may thus be dispatched before the one whose results
it needs. That cannot block: a device is given no slot that would wait behind a later one which
itself waits for a slot not dispatched yet.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Collection, Iterable
from typing import NamedTuple

from placement.errors import NoDeviceError
from placement.pooling.averages import SlotAverages
from placement.pooling.outlook import Outlook, Progress, SlotVisit
from placement.pooling.plan_table import PlanTable
from placement.pooling.pool import SlotOption
from placement.train_plan import TrainPlan
from placement.training import TrainingCosts

QUEUE_SLOTS = 2
"""Of one device: one that runs and one whose weights are brought meanwhile."""
LOOKAHEAD_SLOTS = 256
"""Slots that are decided in search of one that lands on a device with room."""
FIRST_PATIENCE, LONGEST_PATIENCE = 4, 64
"""Rounds after which a device that got slower, and was given nothing since, is tried again as if it
had recovered; doubled each time that it has not."""
EQUAL_WITHIN = 0.10
"""Devices whose seconds differ by no more than this share take turns ..."""
PARTED_AT = 0.20
"""... until they differ by more than this one."""


class Assignment(NamedTuple):
    """What to dispatch next."""

    round_index: int
    slot_index: int
    device_id: str


class SlotDispatcher:
    """Earliest predicted finish from running averages of measured slot times.

    Devices that are equal take turns instead: slot i, counted over all rounds, goes to available
    device i mod D in order of id. They are equal when their forward, fused and backward seconds of
    a round differ by at most 10 % (until by more than 20 %), every one of them may run every slot,
    links differ by little beside the slots, and no slot keeps activations. Ties: the first device
    in order of id. A slot of grain "keep" goes where its forward slot of the same round went.
    Equal calls give equal answers.

    Args:
        plan: The slots and the devices that may run each.
        costs: What it was made from: planned seconds, uploads and hand-offs.
        queue_slots: Slots that a device is given at once, the running one included.
    """

    def __init__(
        self, plan: TrainPlan, costs: TrainingCosts, *, queue_slots: int = QUEUE_SLOTS
    ) -> None:
        self._queue_slots = queue_slots
        self._averages = SlotAverages()
        self._first_alone_s: dict[str, float] = {}
        """Per device, what a whole round would take alone by the first costs that named it."""
        self._tables: list[PlanTable] = []
        """In order of the rounds from which they hold."""
        self._prices: dict[str, dict[tuple[int, int], SlotOption]] = {}
        """Per device, by table and slot; forgotten when a measurement comes."""
        self._visits: dict[SlotVisit, Progress] = {}
        """Of rounds that are not done, in order of dispatch."""
        self._free_since_s: dict[str, float] = {}
        """When each device last finished a slot."""
        self._last_round: dict[str, int] = {}
        """Per device, the latest of which it was given a slot."""
        self._patience: dict[str, int] = {}
        """Rounds; see `FIRST_PATIENCE`."""
        self._turns: dict[tuple[int, frozenset[str]], list[str]] = {}
        """By table and available devices, those that take turns; forgotten like the prices."""
        self._is_in_turn = False
        self.replan(plan, costs, from_round=0)

    def replan(self, plan: TrainPlan, costs: TrainingCosts, *, from_round: int) -> None:
        """Use another plan from a round on; measured speeds carry over.

        The rounds before stay on their plan. Whether `costs` are those of the first plan or have
        been corrected by `factor` since makes no difference.
        """
        table = PlanTable(from_round, plan, costs)
        for device_id, alone_s in table.alone_s.items():
            self._first_alone_s.setdefault(device_id, alone_s)
        self._tables = [known for known in self._tables if known.first_round < from_round]
        self._tables.append(table)
        self._prices.clear()
        self._turns.clear()

    def choose(
        self,
        pending: Iterable[tuple[int, int]],
        *,
        now_s: float,
        available: Collection[str],
    ) -> Assignment | None:
        """Return which slot to dispatch next, and where; None: wait until a slot has finished.

        Ask again after every dispatch and whenever a slot has finished, a round may begin, or the
        devices changed. Nothing is dispatched until `dispatched` says so.

        Args:
            pending: (round, slot) of all slots that are to be dispatched, ascending, of the rounds
                that optimizer steps let begin.
            now_s: The time.
            available: Devices; those that the plan does not know are not chosen.

        Raises:
            NoDeviceError: No available device may run a slot, the one that kept its activations is
                gone, or (after a loss) all wait for it already.
        """
        queued = Counter(p.device_id for p in self._visits.values() if not p.is_finished)
        room = {device_id for device_id in available if queued[device_id] < self._queue_slots}
        if not room:
            return None
        outlook = Outlook(now_s, self._free_since_s)
        queues = self._queues(outlook)
        left = [SlotVisit(*at) for at in itertools.islice(pending, LOOKAHEAD_SLOTS)]
        undecided = set(left)
        for visit in left:
            self._advance(outlook, queues, undecided)
            device_id = self._best_device(visit, outlook, available, blocked=set(queues))
            if device_id is None:
                return None
            if device_id in room:
                return Assignment(*visit, device_id)
            self._add(outlook, visit, Progress(device_id, now_s))
            undecided.remove(visit)
        return None

    def dispatched(
        self, round_index: int, slot_index: int, device_id: str, *, now_s: float
    ) -> None:
        """A slot was queued on a device, the chosen one or another."""
        self.forget(round_index, slot_index)
        if self._is_tried(device_id, round_index):
            patience = self._patience.get(device_id, FIRST_PATIENCE)
            self._patience[device_id] = min(2 * patience, LONGEST_PATIENCE)
        self._last_round[device_id] = max(self._last_round.get(device_id, 0), round_index)
        self._visits[SlotVisit(round_index, slot_index)] = Progress(device_id, now_s)

    def progressed(self, round_index: int, slot_index: int, *, now_s: float) -> None:
        """One more micro-batch of a slot is done."""
        self._visits[SlotVisit(round_index, slot_index)].micro_batch_done(now_s)

    def finished(
        self, round_index: int, slot_index: int, *, now_s: float, micro_batch_s: float
    ) -> None:
        """All micro-batches of a slot are done, at `micro_batch_s` seconds of work each.

        Work is from when a micro-batch's inputs and the weights are there; waiting does not count.

        Raises:
            ValueError: `micro_batch_s` is not above 0 and finite.
        """
        progress = self._visits[SlotVisit(round_index, slot_index)]
        self.observe(round_index, slot_index, progress.device_id, micro_batch_s)
        progress.finish(now_s)
        self._free_since_s[progress.device_id] = now_s
        slots = range(len(self._table(round_index).options))
        visits = [SlotVisit(round_index, slot) for slot in slots]
        if all(visit in self._visits and self._visits[visit].is_finished for visit in visits):
            for visit in visits:
                del self._visits[visit]

    def forget(self, round_index: int, slot_index: int) -> None:
        """A slot was lost with its device, or taken back from its queue: it is pending again.

        After a loss, take back every queued slot that still needs results while an earlier slot of
        its round is pending: it would hold its device, perhaps in vain. A forward slot whose kept
        activations are lost runs again before its backward slot.
        """
        self._visits.pop(SlotVisit(round_index, slot_index), None)

    def observe(
        self, round_index: int, slot_index: int, device_id: str, micro_batch_s: float
    ) -> None:
        """Take a measured micro-batch into account; `finished` does so itself."""
        table = self._table(round_index)
        planned_s = self._planned(table, slot_index, device_id).total_s
        self._averages.observe(device_id, table.slots[slot_index], planned_s, micro_batch_s)
        if self._averages.seems_faster(device_id):
            self._patience[device_id] = 1
        elif self._averages.slow_down(device_id) == 1.0:
            self._patience.pop(device_id, None)
        self._prices.pop(device_id, None)
        self._turns.clear()

    def slot_seconds(self, round_index: int, slot_index: int, device_id: str) -> float:
        """Return the expected seconds of one micro-batch."""
        return self._option(self._table(round_index), slot_index, device_id).total_s

    def factor(self, device_id: str) -> float:
        """Return by what factor a device is slower than the first costs that named it say; to plan
        again with `TrainingCosts.slowed`."""
        return self._averages.factor(device_id)

    @property
    def is_round_robin(self) -> bool:
        """The devices took turns at the last choice."""
        return self._is_in_turn

    def _table(self, round_index: int) -> PlanTable:
        return next(t for t in reversed(self._tables) if t.first_round <= round_index)

    def _planned(self, table: PlanTable, slot_index: int, device_id: str) -> SlotOption:
        """Return the planned option in terms of the first costs that named the device."""
        option = table.options[slot_index][device_id]
        return _scaled(option, self._first_alone_s[device_id] / table.alone_s[device_id])

    def _option(self, table: PlanTable, slot_index: int, device_id: str) -> SlotOption:
        prices = self._prices.setdefault(device_id, {})
        key = table.first_round, slot_index
        if key not in prices:
            scale = self._averages.scale(device_id, table.slots[slot_index])
            prices[key] = _scaled(self._planned(table, slot_index, device_id), scale)
        return prices[key]

    def _queues(self, outlook: Outlook) -> dict[str, deque[SlotVisit]]:
        """Return per device the slots that it was given and has not finished, oldest first."""
        queues: dict[str, deque[SlotVisit]] = {}
        for visit, progress in self._visits.items():
            if progress.is_finished:
                outlook.add_finished(visit, progress)
            else:
                queues.setdefault(progress.device_id, deque()).append(visit)
        return queues

    def _advance(
        self,
        outlook: Outlook,
        queues: dict[str, deque[SlotVisit]],
        undecided: Collection[SlotVisit],
    ) -> None:
        """Move to the outlook what waits for nothing but what is there; a queue that is left waits
        for a slot that is not decided yet."""
        moved = True
        while moved:
            moved = False
            for device_id in list(queues):
                queue = queues[device_id]
                while queue and self._inputs_are_known(queue[0], outlook, undecided):
                    visit = queue.popleft()
                    self._add(outlook, visit, self._visits[visit])
                    moved = True
                if not queue:
                    del queues[device_id]

    def _inputs_are_known(
        self, visit: SlotVisit, outlook: Outlook, undecided: Collection[SlotVisit]
    ) -> bool:
        before = SlotVisit(visit.round_index, visit.slot_index - 1)
        return before in outlook.ends_s or (before not in undecided and before not in self._visits)

    def _add(self, outlook: Outlook, visit: SlotVisit, progress: Progress) -> None:
        table = self._table(visit.round_index)
        outlook.add(
            visit,
            progress,
            self._option(table, visit.slot_index, progress.device_id),
            outlook.inputs(visit, table.num_forward),
            self._link_s(table, visit, outlook, progress.device_id),
            table.micro_batches,
        )

    @staticmethod
    def _link_s(table: PlanTable, visit: SlotVisit, outlook: Outlook, device_id: str) -> float:
        source = outlook.device_of.get(SlotVisit(visit.round_index, visit.slot_index - 1))
        return 0.0 if source is None else table.links_s[source].get(device_id, 0.0)

    def _best_device(
        self,
        visit: SlotVisit,
        outlook: Outlook,
        available: Collection[str],
        blocked: Collection[str],
    ) -> str | None:
        """Return where a slot is predicted to end first; None: it must wait for memory."""
        table = self._table(visit.round_index)
        options = table.options[visit.slot_index]
        source = table.source(visit.slot_index)
        if source is not None:
            return self._keeper(visit, SlotVisit(visit.round_index, source), outlook, available)
        able = [device_id for device_id in options if device_id in available]
        if not able:
            raise NoDeviceError(
                f"slot {visit.slot_index} may run on {', '.join(options)}, none of which is "
                f"available; plan again for the {len(available)} devices that are"
            )
        able = [device_id for device_id in able if device_id not in blocked]
        if not able:
            raise NoDeviceError(
                f"slot {visit.slot_index} of round {visit.round_index} is to run, but every device "
                f"that may run it has a slot queued that waits for it; take those back first"
            )
        if table.kept_with[visit.slot_index] is not None:
            holders = self._holders(visit.round_index, outlook)
            able = [device_id for device_id in able if device_id not in holders]
            if not able:
                return None
        in_turn = self._devices_in_turn(table, available)
        if in_turn:
            position = visit.round_index * len(table.options) + visit.slot_index
            chosen = in_turn[position % len(in_turn)]
            if chosen in able:
                return chosen
        inputs = outlook.inputs(visit, table.num_forward)

        def end_s(device_id: str) -> float:
            option = self._option(table, visit.slot_index, device_id)
            if self._is_tried(device_id, visit.round_index):
                option = _scaled(option, 1.0 / self._averages.slow_down(device_id))
            link_s = self._link_s(table, visit, outlook, device_id)
            return outlook.end_s(device_id, option, inputs, link_s, table.micro_batches)

        return min(able, key=end_s)

    def _is_tried(self, device_id: str, round_index: int) -> bool:
        """Whether the device is to be priced as fast as it once was."""
        idle_rounds = round_index - self._last_round.get(device_id, 0)
        return (
            idle_rounds >= self._patience.get(device_id, FIRST_PATIENCE)
            and self._averages.slow_down(device_id) > 1.0
        )

    def _holders(self, round_index: int, outlook: Outlook) -> set[str]:
        """Return the devices that keep activations of another round for slots that are not decided.

        A device has the memory for one round's: it runs the backward slots of one before the
        forward slots of the next.
        """
        holders = set()
        for visit, device_id in outlook.device_of.items():
            partner = self._table(visit.round_index).kept_with[visit.slot_index]
            if partner is None or visit.round_index == round_index:
                continue
            if SlotVisit(visit.round_index, partner) not in outlook.device_of:
                holders.add(device_id)
        return holders

    def _keeper(
        self, visit: SlotVisit, source: SlotVisit, outlook: Outlook, available: Collection[str]
    ) -> str:
        dispatched = self._visits.get(source)
        device_id = dispatched.device_id if dispatched else outlook.device_of.get(source)
        if device_id is None or device_id not in available:
            where = "nowhere" if device_id is None else f"on {device_id}, which is gone"
            raise NoDeviceError(
                f"slot {visit.slot_index} of round {visit.round_index} uses the activations that "
                f"slot {source.slot_index} kept; it ran {where}. Run slot {source.slot_index} "
                f"again first."
            )
        return device_id

    def _devices_in_turn(self, table: PlanTable, available: Collection[str]) -> list[str]:
        """Return the available devices in order of id where they are equal; else none."""
        key = table.first_round, frozenset(available)
        if key not in self._turns:
            devices = [device_id for device_id in table.alone_s if device_id in available]
            limit = PARTED_AT if self._is_in_turn else EQUAL_WITHIN
            self._is_in_turn = table.may_take_turns(devices) and table.are_equal(
                devices, lambda slot, device_id: self._option(table, slot, device_id).total_s, limit
            )
            self._turns[key] = devices if self._is_in_turn else []
        return self._turns[key]


def _scaled(option: SlotOption, factor: float) -> SlotOption:
    return option._replace(lead_s=factor * option.lead_s, total_s=factor * option.total_s)
