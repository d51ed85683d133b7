"""A device of the pool as the executor sees it: what it was given, what it streams, its silence."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from actors.engine.training_values import MicroBatch, RouterLoads
from actors.pool_values import KeptKey, SlotKey, SlotTask
from cluster.training.rounds import Visit
from placement.topology import Device

_SILENCE_S = 60.0
_SILENCE_FACTOR = 20.0
_UPLOAD_S = 600.0
"""The same, while weights are on their way."""


@dataclass(eq=False)
class PooledDevice:
    """A live device of the pool."""

    device: Device
    actor: Any
    queue: deque[Visit] = field(default_factory=deque)
    last: Visit | None = None
    """The newest visit that was sent to it."""
    busy_s: float = 0.0
    """Since the pool began."""
    heard_s: float = 0.0
    """When it last streamed something, or was given something."""
    fed: list[Any] = field(default_factory=list)
    """References of inputs that were sent and may not have come yet."""
    _suspected_s: float | None = None
    """`heard_s` when it was found silent for too long."""

    async def run_alone(
        self,
        task: SlotTask,
        weights: Mapping[str, tuple[Any, Any]],
        batch: MicroBatch,
        hidden: Any,
        loads: RouterLoads | None,
    ) -> tuple[Any, RouterLoads | None]:
        """Run one micro-batch of a forward slot that is no visit; returns the reference of what it
        hands on, and the router loads. `hidden` is the reference of its input, if it has one.

        Raises:
            RayError: The slot failed, or its device died.
        """
        self.last = None  # what the visit before left there is gone
        actor = self.actor
        actor.prepare.options(concurrency_group="weights").remote(task, weights)
        stream = actor.run_slot.options(concurrency_group="slots", num_returns="streaming").remote(
            task, (batch,)
        )
        if hidden is not None:
            name = ("hidden", task.first_layer)
            actor.feed.options(concurrency_group="feed").remote(task.key, 0, loads, (name,), hidden)
        references = [reference async for reference in stream]
        # One that failed raises here.
        _, report, _ = await asyncio.gather(*references)
        return references[0], report.loads

    async def check_fed(self) -> None:
        """Raise what went wrong with inputs that were sent since the last call.

        Raises:
            RayError: Some did not come.
        """
        came, self.fed = _come(self.fed)
        await asyncio.gather(*came)

    def cancel(self, visit: Visit) -> None:
        """Take a visit back."""
        self.actor.cancel.options(concurrency_group="control").remote(slot_key(visit))

    def forget_kept(self, forwards: Sequence[Visit] | None = None) -> None:
        """Drop what forward visits kept, once the slots sent by now have ended; None: of all."""
        keys = None if forwards is None else tuple(map(_kept_key, forwards))
        self.actor.forget_kept.options(concurrency_group="slots").remote(keys)

    def hangs(self, now_s: float, expected_s: float) -> bool:
        """Whether it has all that its slot needs, and streams nothing for a minute and for many
        times the `expected_s` seconds of the slot; asked now and then."""
        silent_s = now_s - self.heard_s
        first = self.queue[0]
        least_s = _SILENCE_S if first.is_prepared else _UPLOAD_S
        if not first.is_fed or silent_s <= max(least_s, _SILENCE_FACTOR * expected_s):
            return False
        # The first time, what it sent may be unread: it may be this process that stood still.
        was_suspected = self._suspected_s == self.heard_s
        self._suspected_s = self.heard_s
        return was_suspected


class SlotReader:
    """Tells arrays from reports in what a slot streams: it is known how many arrays come."""

    def __init__(self, visit: Visit, num_gradients: int) -> None:
        slot, round_ = visit.slot, visit.round
        hands_on = slot.kind == "forward" or (slot.first_layer > 0 and round_.is_trained)
        self._num_arrays = (len(round_.saves(slot)) if slot.kind == "forward" else 0) + hands_on
        self._num_gradients = num_gradients if round_.is_trained else 0
        self._left = round_.num_micro_batches
        self._kept: list[Any] = []
        self.last: Any = None
        self.busy_s = 0.0

    @property
    def is_report_next(self) -> bool:
        wanted = self._num_arrays if self._left else self._num_gradients
        return len(self._kept) == wanted

    def keep(self, reference: Any) -> None:
        self._kept.append(reference)
        self.last = reference

    def take(self) -> list[Any]:
        """Return the arrays since the last report."""
        kept, self._kept = self._kept, []
        self._left -= 1
        return kept


def _come(references: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return those whose call is over, and the others."""
    if not references:
        return [], []
    came, waiting = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
    return came, waiting


def slot_key(visit: Visit) -> SlotKey:
    return SlotKey(visit.round.step, visit.round.number, visit.slot.index, visit.attempt)


def _kept_key(forward: Visit) -> KeptKey:
    slot, round_ = forward.slot, forward.round
    return KeptKey(round_.step, round_.number, slot.first_layer, slot.end_layer)
