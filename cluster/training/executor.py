"""Carries rounds through a pool of devices: dispatches visits, hands on what they yield.

One asyncio loop, no lock. Everything that happens calls `_pump`, which dispatches whatever may be
dispatched. A visit that is lost with its device runs again elsewhere; what other visits had from it
stays good, since equal inputs give equal results, and its gradients count once.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

from actors.pool_values import MicroBatchReport, SlotReport, SlotTask
from cluster.training.errors import HostsLostError, TrainingError
from cluster.training.hosts import WeightHosts
from cluster.training.planner import RunPlan
from cluster.training.pooled_device import PooledDevice, SlotReader, slot_key
from cluster.training.rounds import Boundary, Round, Visit
from placement.dispatch import SlotDispatcher
from placement.errors import NoDeviceError
from placement.topology import Device
from placement.trace import Event
from placement.train import PlannedSlot

_ATTEMPTS = itertools.count()


@dataclass(frozen=True, kw_only=True)
class ExecutorHooks:
    """What the executor tells its owner; called on the loop."""

    units_of: Callable[[PlannedSlot], tuple[str, ...]]
    """The units whose weights a slot needs."""
    num_gradients: Callable[[PlannedSlot], int]
    """How many units of a fused or backward slot get gradients."""
    on_gradients: Callable[[Round, PlannedSlot, Mapping[str, Any]], None]
    on_device_lost: Callable[[str, str, int], None]
    """Device, reason, and how many of its visits run again."""
    on_event: Callable[[Event], None] | None = None
    """Every micro-batch, for a trace."""


class SlotExecutor:
    """Runs rounds over the devices that are there."""

    def __init__(
        self,
        weights: WeightHosts,
        hooks: ExecutorHooks,
        *,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.devices: dict[str, PooledDevice] = {}
        self.dispatcher: SlotDispatcher | None = None
        self._weights = weights
        self._hooks = hooks
        self._now_s = now_s
        self._pending: list[Visit] = []
        self._last_done = -1
        """The newest round that is done."""
        self._done: dict[Round, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self.no_device: str | None = None
        """Why the next visit cannot be dispatched, while no device may run it."""

    def add_device(self, device: Device, actor: Any) -> None:
        self.devices[device.id] = PooledDevice(device, actor)
        self.pump()

    def submit(self, round_: Round) -> asyncio.Future[None]:
        """Queue a round's visits; the future ends with the round."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._done[round_] = done
        if self._failure is not None:
            done.set_exception(self._failure)
            return done
        self._pending += round_.visits
        self._pending.sort(key=_order)
        self.pump()
        return done

    def pump(self) -> None:
        """Dispatch what may be dispatched."""
        self.no_device = None
        if self._pending and not self.devices:
            self.no_device = "every device is lost"
        while self._failure is None and self.dispatcher is not None:
            try:
                choice = self.dispatcher.choose(
                    self._ready(), now_s=self._now_s(), available=self.devices.keys()
                )
            except NoDeviceError as error:
                self.no_device = str(error)
                break
            if choice is None:
                break
            at = choice.round_index, choice.slot_index
            visit = self._pending.pop(bisect.bisect_left(self._pending, at, key=_order))
            self._start(visit, self.devices[choice.device_id])

    def _ready(self) -> Iterator[tuple[int, int]]:
        """Yield, in order, the pending visits of each round up to the first whose weights are not
        published."""
        blocked: set[Round] = set()
        for visit in self._pending:
            units = self._hooks.units_of(visit.slot)
            if visit.round in blocked:
                continue
            if self._weights.table.has(units, visit.round.version):
                yield visit.order
            else:
                blocked.add(visit.round)

    def fail(self, error: BaseException) -> None:
        """End all rounds with an error; nothing is dispatched any more."""
        if self._failure is None:
            self._failure = error
        for done in self._done.values():
            if not done.done():
                done.set_exception(error)
                done.exception()  # retrieved: whoever awaits it raises it again

    def replan(self, planned: RunPlan) -> None:
        """Let the rounds that have not begun, and all later ones, go through other slots."""
        assert self.dispatcher is not None
        begun = [round_.index for round_ in self._done if round_.has_begun]
        first = max([self._last_done, *begun]) + 1
        self.dispatcher.replan(planned.plan, planned.costs, from_round=first)
        later = [round_ for round_ in self._done if round_.index >= first]
        self._pending = [visit for visit in self._pending if visit.round.index < first]
        for round_ in later:
            round_.use_slots(planned.plan.slots, planned.declared_s)
            self._pending += round_.visits
        self._pending.sort(key=_order)
        self.pump()

    def lose_silent(self) -> None:
        """Count devices as lost that hang; to be called now and then."""
        now_s = self._now_s()
        for pooled in list(self.devices.values()):
            if pooled.queue and pooled.hangs(now_s, self._expected_s(pooled.queue[0])):
                silent_s = now_s - pooled.heard_s
                self._lose(pooled, f"it has all that its slot needs and hung for {silent_s:.0f} s")

    async def check_fed(self) -> None:
        """Notice inputs that cannot come any more; to be called now and then.

        Raises:
            HostsLostError: They were lost with the node that had made them.
        """
        for pooled in list(self.devices.values()):
            try:
                await pooled.check_fed()
            except RayActorError:
                continue  # the stream of its slot tells
            except (ObjectLostError, RayTaskError) as error:
                raise HostsLostError(
                    f"activations for {pooled.device.id} are lost with their node: "
                    f"{_last_line(error)}"
                ) from error

    def _expected_s(self, visit: Visit) -> float:
        assert self.dispatcher is not None
        assert visit.device_id is not None
        seconds = self.dispatcher.slot_seconds(*visit.order, visit.device_id)
        return visit.round.num_micro_batches * seconds

    async def drain(self) -> None:
        """Give up everything that runs, and wait until it is over."""
        self._pending.clear()
        for pooled in self.devices.values():
            for visit in pooled.queue:
                pooled.cancel(visit)
            pooled.forget_kept()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, visit: Visit, pooled: PooledDevice) -> None:
        assert self.dispatcher is not None
        units = self._hooks.units_of(visit.slot)
        visit.device_id = pooled.device.id
        before = pooled.last
        follows = (
            before is not None
            and before.device_id == pooled.device.id  # else it was taken back, and runs elsewhere
            and before.order == (visit.order[0], visit.slot.index - 1)
        )
        visit.local_from = before if follows else None
        visit.attempt = next(_ATTEMPTS)
        pooled.queue.append(visit)
        pooled.heard_s = self._now_s()
        pooled.last = visit
        round_ = visit.round
        self.dispatcher.dispatched(*visit.order, pooled.device.id, now_s=self._now_s())
        task = self._task(visit, pooled)
        weights = self._weights.table.references(units, round_.version)
        prepared = pooled.actor.prepare.options(concurrency_group="weights").remote(task, weights)
        self._spawn(self._note_prepared(visit, pooled, prepared))
        stream = pooled.actor.run_slot.options(
            concurrency_group="slots", num_returns="streaming"
        ).remote(task, round_.batches_reference)
        self._spawn(self._follow(visit, visit.attempt, pooled, stream))
        self._feed(visit)

    def _task(self, visit: Visit, pooled: PooledDevice) -> SlotTask:
        assert self.dispatcher is not None
        slot, round_ = visit.slot, visit.round
        declared_s, lead_s = None, 0.0
        if pooled.device.kind == "paced":
            declared_s, lead_s = round_.declared(slot, pooled.device.id)
        return SlotTask(
            key=slot_key(visit),
            kind=slot.kind,
            first_layer=slot.first_layer,
            end_layer=slot.end_layer,
            grain=slot.grain,
            is_kept=slot.kind == "forward" and round_.partner(slot) is not None,
            saves=round_.saves(slot),
            first_micro_batch=round_.first_micro_batch,
            scales=round_.scales,
            is_trained=round_.is_trained,
            version=round_.version,
            declared_s=declared_s,
            declared_lead_s=lead_s,
            needs_saved=any(boundary.kind == "hidden" for boundary in visit.needs),
        )

    def _feed(self, visit: Visit) -> None:
        """Send a running visit the inputs that exist by now."""
        if visit.device_id is None or visit.is_done:
            return
        pooled = self.devices[visit.device_id]
        actor = pooled.actor
        for kind in visit.kinds:
            while visit.has_next(kind):
                pooled.heard_s = self._now_s()
                m = visit.num_fed[kind]
                names = visit.boundaries(kind)
                is_local = visit.is_local(kind, m)
                references = [] if is_local else [visit.round.outputs[name, m] for name in names]
                fed = actor.feed.options(concurrency_group="feed").remote(
                    slot_key(visit), m, visit.loads(kind, m), tuple(map(tuple, names)), *references
                )
                pooled.fed.append(fed)
                visit.num_fed[kind] += 1

    async def _note_prepared(self, visit: Visit, pooled: PooledDevice, prepared: Any) -> None:
        """Weights take their time to come: a device is not silent while it waits for them."""
        attempt = visit.attempt
        try:
            await prepared
        except RayError:
            return  # the slot's own stream tells
        if visit.attempt == attempt:
            visit.is_prepared = True
            pooled.heard_s = self._now_s()

    async def _follow(self, visit: Visit, attempt: int, pooled: PooledDevice, stream: Any) -> None:
        """Take what a slot streams, until its last word."""
        reader = SlotReader(visit, self._hooks.num_gradients(visit.slot))
        try:
            async for reference in stream:
                if not reader.is_report_next:
                    reader.keep(reference)
                    continue
                report = await reference
                if visit.attempt != attempt:
                    return
                if isinstance(report, SlotReport):
                    self._finish(visit, pooled, report, reader)
                    return
                self._take(visit, pooled, report, reader)
            if visit.attempt != attempt:
                return
            # A call that fails ends its stream with a reference that raises what went wrong.
            await reader.last
            raise TrainingError(f"{pooled.device.id} ended slot {visit.slot.index} without a word")
        except RayActorError as error:
            self._lose(pooled, str(error).strip().splitlines()[0])
        except RayTaskError as error:
            if visit.attempt == attempt:
                self.fail(_explain(error, visit, pooled))
        except TrainingError as error:
            self.fail(error)

    def _take(
        self, visit: Visit, pooled: PooledDevice, report: MicroBatchReport, reader: SlotReader
    ) -> None:
        assert self.dispatcher is not None
        round_, m = visit.round, report.micro_batch
        for name, reference in zip(report.outputs, reader.take(), strict=True):
            round_.outputs[Boundary(*name), m] = reference  # type: ignore[arg-type]
        visit.left[m] = report.is_left
        round_.note(visit.slot, m, report.loads, report.loss)
        now_s = self._now_s()
        reader.busy_s += report.busy_s
        pooled.busy_s += report.busy_s
        pooled.heard_s = now_s
        self.dispatcher.progressed(*visit.order, now_s=now_s)
        if self._hooks.on_event is not None:
            self._hooks.on_event(
                Event(
                    device_id=pooled.device.id,
                    start_s=now_s - report.busy_s,
                    end_s=now_s,
                    kind=visit.slot.kind,
                    stage=visit.slot.index,
                    micro_batch=m,
                    round_index=round_.index,
                )
            )
        for other in round_.visits:
            self._feed(other)

    def _finish(
        self, visit: Visit, pooled: PooledDevice, report: SlotReport, reader: SlotReader
    ) -> None:
        assert self.dispatcher is not None
        round_ = visit.round
        visit.is_done = True
        pooled.queue.remove(visit)
        pooled.heard_s = self._now_s()
        if round_.is_trained:
            micro_batch_s = max(reader.busy_s / round_.num_micro_batches, 1e-9)
            self.dispatcher.finished(*visit.order, now_s=self._now_s(), micro_batch_s=micro_batch_s)
        else:
            # Without its backward pass a slot says nothing about the slots that train.
            self.dispatcher.forget(*visit.order)
        if report.gradients:
            gradients = dict(zip(report.gradients, reader.take(), strict=True))
            self._hooks.on_gradients(round_, visit.slot, gradients)
        round_.forget_used()
        if round_.is_done:
            self._last_done = max(self._last_done, round_.index)
            done = self._done.pop(round_)
            if not done.done():
                done.set_result(None)
        self.pump()

    def _lose(self, pooled: PooledDevice, reason: str) -> None:
        """A device died: its visits, and those that would wait for them in vain, run again."""
        device_id = pooled.device.id
        if self.devices.get(device_id) is not pooled:
            return
        del self.devices[device_id]
        lost = list(pooled.queue)
        pooled.queue.clear()
        for round_ in self._done:
            lost += round_.lost_with(device_id)
        self._repend(lost)
        while stuck := list(self._stuck()):
            for other, visits in stuck:
                for visit in visits:
                    other.cancel(visit)
                    other.queue.remove(visit)
                self._repend([*visits, *self._forget_kept(visits, other)])
        self._hooks.on_device_lost(device_id, reason, len(lost))
        self.pump()

    def _stuck(self) -> Iterator[tuple[PooledDevice, list[Visit]]]:
        """Yield what stands in a queue although it may wait for a visit that is pending again.

        What a device has begun stays when its inputs are all sent, or will be.
        """
        pending = {visit.round: visit.slot.index for visit in reversed(self._pending)}
        for pooled in self.devices.values():
            visits = list(pooled.queue)[1:]
            for first in list(pooled.queue)[:1]:
                earliest = pending.get(first.round, len(first.round.slots))
                if earliest < first.slot.index and not first.is_fed:
                    visits.insert(0, first)
            if visits:
                yield pooled, visits

    def _forget_kept(self, taken_back: list[Visit], pooled: PooledDevice) -> list[Visit]:
        """Drop what was kept for slots that may have used some of it up; returns who kept it."""
        again, forgotten = [], []
        for visit in taken_back:
            partner = visit.round.partner(visit.slot)
            if partner is None:
                continue
            if visit.slot.kind == "forward":
                forgotten.append(visit)
            elif partner.is_done:
                again.append(partner)
        if forgotten or again:
            pooled.forget_kept([*forgotten, *again])
        return again

    def _repend(self, visits: list[Visit]) -> None:
        assert self.dispatcher is not None
        for visit in visits:
            visit.reset()
            self.dispatcher.forget(*visit.order)
        self._pending += visits
        self._pending.sort(key=_order)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            is_known = isinstance(error, TrainingError) or not isinstance(error, RayError)
            self.fail(error if is_known else TrainingError(f"Ray failed: {_last_line(error)}"))


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _order(visit: Visit) -> tuple[int, int]:
    return visit.order


def _explain(error: RayTaskError, visit: Visit, pooled: PooledDevice) -> BaseException:
    cause = error.cause if getattr(error, "cause", None) is not None else error
    if isinstance(cause, ObjectLostError | HostsLostError):
        return HostsLostError("a weight host is lost: its weights cannot be read")
    slot = visit.slot
    return TrainingError(
        f"step {visit.round.step + 1}: {pooled.device.id} failed in the {slot.kind} slot of layers "
        f"{slot.first_layer} to {slot.end_layer}: {_last_line(cause)}"
    )
