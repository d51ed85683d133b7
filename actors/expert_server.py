"""Serving the experts of one device, and of its node to those who ask from other nodes.

A stage sends one message a layer to one of the node's workers, its front. The front passes the
other devices their rows first, computes its own meanwhile, gathers, and answers once: phases II
and III of Piper's hierarchical all-to-all (arXiv 2605.05049) and their mirror. Any worker can be
the front; a call from a sibling goes no further. Knows no Ray.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from actors import wire
from actors.engine.expert_calls import (
    ExpertCall,
    ExpertError,
    ExpertMapError,
    ExpertRows,
    Portion,
)
from actors.engine.expert_host import ExpertHost
from actors.engine.pace import DeviceClock
from actors.expert_messages import (
    TENSORS_OF,
    Answer,
    answer_message,
    call_message,
    refusal_message,
    take_answer,
    take_tensors,
)

_log = logging.getLogger(__name__)

Seconds = Callable[[int, Sequence[ExpertRows]], float]
"""What a device is declared to take for experts of a layer."""


@dataclass(slots=True)
class _Gathering:
    """A caller's rows, of which some devices' are still to come."""

    number: int
    """The caller's."""
    caller: wire.Outbox
    out_SH: torch.Tensor
    end_s: float
    missing: dict[int, tuple[Portion, slice]] = field(default_factory=dict)
    """By the number of the call to the sibling: what it computes, and which rows that is."""
    due_s: float = 0.0
    """When this device has done its part, which a paced one declares."""


class ExpertServer:
    """Answers calls for a device's experts. Use from one thread."""

    def __init__(
        self,
        device_id: str,
        host: ExpertHost,
        clock: DeviceClock,
        seconds: Seconds,
        reply_to: str,
    ) -> None:
        """`reply_to` is where this worker receives (see `wire.Address.ipc`)."""
        self._device_id = device_id
        self._host = host
        self._clock = clock
        self._seconds = seconds
        self._reply_to = reply_to
        self._callers: Mapping[str, wire.Outbox] = {}
        self._siblings: Mapping[str, wire.Outbox] = {}
        self._gathering: dict[int, _Gathering] = {}
        """By the number of each call to a sibling."""
        self._due: list[_Gathering] = []
        """Whole, but for a paced device's time."""
        self._calls_sent = 0

    def connect(self, callers: Sequence[wire.Outbox], siblings: Mapping[str, wire.Outbox]) -> None:
        """Serve these from now on; siblings are the node's other workers by device."""
        self._callers = {outbox.address.ipc: outbox for outbox in callers}
        self._siblings = siblings
        # An answer that is due may be a sibling's too.
        known = [*callers, *siblings.values()]
        self._keep(lambda gathering: gathering.caller in known)

    def handle(self, parts: Sequence[memoryview]) -> None:
        """Serve a call, or take a sibling's answer; anything else is dropped."""
        try:
            if bytes(parts[0][:64]) not in TENSORS_OF:
                self._take(take_answer(parts))
                return
            call = ExpertCall.decode(parts[1] if len(parts) > 1 else b"")
            caller = self._caller(call)
        except ValueError as error:
            _log.warning("%s dropped a message: %s", self._device_id, error)
            return
        try:
            self._serve(call, parts, caller)
        except Exception as error:  # noqa: BLE001 - whatever a call raises, its caller must hear it
            if not isinstance(error, ExpertError | ValueError):
                _log.exception("%s failed a call for layer %d", self._device_id, call.layer)
            why = f"the experts on {self._device_id}: {error}"
            self._refuse(call.number, caller, why, is_of_map=isinstance(error, ExpertMapError))

    def wait_s(self, most_s: float) -> float:
        """Return how long nothing is to be done but to receive."""
        due_s = min((gathering.due_s for gathering in self._due), default=math.inf)
        return max(0.0, min(most_s, due_s - self._clock.now_s()))

    def tick(self) -> None:
        """Answer the calls whose time has passed; refuse those that siblings did not answer."""
        due, self._due = self._due, []
        for gathering in due:
            self._answer_if_whole(gathering)
        now_s = self._clock.now_s()
        for gathering in {id(each): each for each in self._gathering.values()}.values():
            if gathering.end_s <= now_s:
                devices = sorted({portion.device for portion, _ in gathering.missing.values()})
                why = f"{', '.join(devices)} did not answer {self._device_id} of its node in time"
                self._refuse(gathering.number, gathering.caller, why, is_of_map=True)

    def _caller(self, call: ExpertCall) -> wire.Outbox:
        boxes = [*self._callers.values(), *self._siblings.values()]
        for outbox in boxes:
            if outbox.address.ipc == call.reply_to:
                return outbox
        raise ValueError(f"a call from {call.reply_to}, to which it is not connected")

    def _serve(self, call: ExpertCall, parts: Sequence[memoryview], caller: wire.Outbox) -> None:
        arrived_s = self._clock.now_s()
        tensors = take_tensors(parts, call)
        self._check(call)
        gathering = _Gathering(
            call.number, caller, torch.empty_like(tensors[0]), arrived_s + call.time_left_s
        )
        own, start = None, 0
        for portion in call.portions:
            rows = slice(start, start + portion.num_rows)
            start = rows.stop
            if portion.device == self._device_id:
                own = portion, rows
            else:
                self._pass_on(bytes(parts[0]), call, portion, [each[rows] for each in tensors])
                gathering.missing[self._calls_sent] = portion, rows
                self._gathering[self._calls_sent] = gathering
        if own is not None:
            portion, rows = own
            part = [each[rows] for each in tensors]
            gathering.out_SH[rows] = self._compute(bytes(parts[0]), call, portion, part)
            declared_s = self._seconds(call.layer, portion.experts)
            gathering.due_s = self._clock.book(arrived_s, declared_s)
        self._answer_if_whole(gathering)

    def _compute(
        self, kind: bytes, call: ExpertCall, portion: Portion, tensors: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        at = call.version, call.layer, portion.experts
        if kind == wire.EXPERTS:
            return self._host.run(*at, tensors[0], guests=portion.guests)
        return self._host.backward(*at, *tensors, of_weights=kind == wire.EXPERT_GRADIENTS)

    def _check(self, call: ExpertCall) -> None:
        """Refuse a call before any device computes a part of it."""
        if call.fingerprint != self._host.fingerprint:
            raise ExpertError(
                f"the caller's experts are of checkpoint {call.fingerprint}, these of "
                f"{self._host.fingerprint}; give both the same `model`"
            )
        # What a sibling sent goes no further.
        reached = self._siblings if call.reply_to in self._callers else {}
        for portion in call.portions:
            if portion.device != self._device_id and portion.device not in reached:
                raise ExpertMapError(
                    f"device {portion.device} is not reached from here; this node has "
                    f"{sorted([self._device_id, *self._siblings])}"
                )

    def _pass_on(
        self, kind: bytes, call: ExpertCall, portion: Portion, tensors: Sequence[torch.Tensor]
    ) -> None:
        """Send a sibling its rows under the next number."""
        self._calls_sent += 1
        own = replace(call, number=self._calls_sent, reply_to=self._reply_to, portions=(portion,))
        self._siblings[portion.device].send(call_message(kind, own, tensors))

    def _take(self, answer: Answer) -> None:
        """Put a sibling's rows where they belong."""
        gathering = self._gathering.pop(answer.number, None)
        if gathering is None:
            return  # its call was given up
        portion, rows = gathering.missing.pop(answer.number)
        place_SH = gathering.out_SH[rows]
        got_SH = answer.rows_SH
        if got_SH is None or got_SH.shape != place_SH.shape or got_SH.dtype != place_SH.dtype:
            why = answer.refusal or f"{portion.device} answered with rows of another shape or type"
            is_of_map = answer.is_of_map
            self._refuse(gathering.number, gathering.caller, why, is_of_map=is_of_map)
            return
        place_SH.copy_(got_SH)
        self._answer_if_whole(gathering)

    def _answer_if_whole(self, gathering: _Gathering) -> None:
        if gathering.missing:
            return
        if gathering.due_s > self._clock.now_s():
            # Who waits here would not pass on other calls' rows.
            self._due.append(gathering)
        else:
            gathering.caller.send(answer_message(gathering.number, gathering.out_SH))

    def _refuse(self, number: int, caller: wire.Outbox, why: str, *, is_of_map: bool) -> None:
        """Tell a caller, and wait no more for the call's siblings."""
        self._keep(lambda gathering: gathering.number != number or gathering.caller is not caller)
        caller.send(refusal_message(number, why, is_of_map=is_of_map))

    def _keep(self, is_kept: Callable[[_Gathering], bool]) -> None:
        self._gathering = {key: each for key, each in self._gathering.items() if is_kept(each)}
        self._due = [each for each in self._due if is_kept(each)]
