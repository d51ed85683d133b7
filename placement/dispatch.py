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
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from placement.errors import NoDeviceError
from placement.pooling.live_prices import LivePrices
from placement.pooling.outlook import Outlook, Progress, SlotVisit
from placement.pooling.plan_table import PlanTable
from placement.train_plan import TrainPlan
from placement.training import TrainingCosts

QUEUE_SLOTS = 2
"""Of one device: one that runs and one whose weights are brought meanwhile."""
LOOKAHEAD_SLOTS = 256
"""Slots that are decided in search of one that lands on a device with room."""


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
        self._prices = LivePrices()
        self._tables: list[PlanTable] = []
        """In order of the rounds from which they hold."""
        self._visits: dict[SlotVisit, Progress] = {}
        """Of rounds that are not done, in order of dispatch."""
        self._free_since_s: dict[str, float] = {}
        """When each device last finished a slot."""
        self.replan(plan, costs, from_round=0)

    def replan(self, plan: TrainPlan, costs: TrainingCosts, *, from_round: int) -> None:
        """Use another plan from a round on; measured speeds carry over.

        The rounds before stay on their plan. Whether `costs` are those of the first plan or have
        been corrected by `factor` since makes no difference.
        """
        table = PlanTable(from_round, plan, costs)
        self._tables = [known for known in self._tables if known.first_round < from_round]
        self._tables.append(table)
        self._prices.add(table)

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
                gone, or (when what waits was not taken back after a loss) nothing can move.
        """
        queued = Counter(p.device_id for p in self._visits.values() if not p.is_finished)
        planned = {device_id for table in self._tables for device_id in table.device_ids}
        usable = planned & set(available)
        room = {device_id for device_id in usable if queued[device_id] < self._queue_slots}
        if usable and not room:
            return None
        outlook = Outlook(now_s, self._free_since_s)
        queues = self._queues(outlook)
        left = [SlotVisit(*at) for at in itertools.islice(pending, LOOKAHEAD_SLOTS)]
        waiting, undecided = set(left), set(left)
        held: dict[int, SlotVisit] = {}
        for visit in left:
            self._advance(outlook, queues, undecided)
            if visit.round_index in held:
                continue
            device_id = self._best_device(visit, outlook, available, blocked=set(queues))
            if device_id is None:
                held[visit.round_index] = visit
                continue
            # Past a slot that is held up, only what certainly ends may take a device's place.
            if device_id in room and not (held and visit.before in waiting):
                return Assignment(*visit, device_id)
            self._add(outlook, visit, Progress(device_id, now_s))
            undecided.remove(visit)
        self._check_progress(outlook, held)
        return None

    def dispatched(
        self, round_index: int, slot_index: int, device_id: str, *, now_s: float
    ) -> None:
        """A slot was queued on a device, the chosen one or another."""
        self.forget(round_index, slot_index)
        self._prices.used(device_id, round_index)
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

        After a loss, take back every slot but the first of each queue, and that one too if it
        still needs results while an earlier slot of its round is pending: it would hold its device
        in vain. A forward slot whose kept activations are lost runs again before its backward
        slot.
        """
        visit = SlotVisit(round_index, slot_index)
        progress = self._visits.pop(visit, None)
        if progress and progress.is_finished and visit.after in self._visits:
            self._visits[visit.after].is_fed = True

    def observe(
        self, round_index: int, slot_index: int, device_id: str, micro_batch_s: float
    ) -> None:
        """Take a measured micro-batch into account; `finished` does so itself."""
        table = self._table(round_index)
        self._prices.observe(table, slot_index, device_id, micro_batch_s)

    def slot_seconds(self, round_index: int, slot_index: int, device_id: str) -> float:
        """Return the expected seconds of one micro-batch."""
        return self._prices.option(self._table(round_index), slot_index, device_id).total_s

    def factor(self, device_id: str) -> float:
        """Return by what factor a device is slower than the first costs that named it say; to plan
        again with `TrainingCosts.slowed`."""
        return self._prices.factor(device_id)

    @property
    def is_round_robin(self) -> bool:
        """The devices took turns at the last choice."""
        return self._prices.is_in_turn

    def _table(self, round_index: int) -> PlanTable:
        return next(t for t in reversed(self._tables) if t.first_round <= round_index)

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
        before = visit.before
        if self._visits[visit].is_fed:
            return True
        return before in outlook.ends_s or (before not in undecided and before not in self._visits)

    def _check_progress(self, outlook: Outlook, held: Mapping[int, SlotVisit]) -> None:
        """Raise where a slot is held up and nothing that runs can change that."""
        is_moving = any(
            visit in outlook.ends_s
            for visit, progress in self._visits.items()
            if not progress.is_finished
        )
        if held and not is_moving:
            round_index, slot_index = min(held.values())
            raise NoDeviceError(
                f"slot {slot_index} of round {round_index} is to run, but every device that may "
                f"run it has a slot queued that waits for a later one, or keeps another round's "
                f"activations; take back what waits"
            )

    def _add(self, outlook: Outlook, visit: SlotVisit, progress: Progress) -> None:
        table = self._table(visit.round_index)
        outlook.add(
            visit,
            progress,
            self._prices.option(table, visit.slot_index, progress.device_id),
            outlook.inputs(visit, table.num_forward),
            self._link_s(table, visit, outlook, progress.device_id),
            table.micro_batches,
        )

    @staticmethod
    def _link_s(table: PlanTable, visit: SlotVisit, outlook: Outlook, device_id: str) -> float:
        source = outlook.device_of.get(visit.before)
        return 0.0 if source is None else table.links_s[source].get(device_id, 0.0)

    def _best_device(
        self,
        visit: SlotVisit,
        outlook: Outlook,
        available: Collection[str],
        blocked: Collection[str],
    ) -> str | None:
        """Return where a slot is predicted to end first; None: it is held up, for every device that
        may run it waits for a slot that is not decided, or keeps another round's activations."""
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
        if table.kept_with[visit.slot_index] is not None:
            blocked = {*blocked, *self._holders(visit.round_index, outlook)}
        able = [device_id for device_id in able if device_id not in blocked]
        if not able:
            return None
        in_turn = self._prices.devices_in_turn(table, available)
        if in_turn:
            position = visit.round_index * len(table.options) + visit.slot_index
            chosen = in_turn[position % len(in_turn)]
            if chosen in able:
                return chosen
        inputs = outlook.inputs(visit, table.num_forward)

        def end_s(device_id: str) -> float:
            option = self._prices.hopeful_option(
                table, visit.slot_index, device_id, visit.round_index
            )
            link_s = self._link_s(table, visit, outlook, device_id)
            return outlook.end_s(device_id, option, inputs, link_s, table.micro_batches)

        return min(able, key=end_s)

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
