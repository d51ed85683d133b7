"""DecodeActor: one lane. Sockets and a clock around `LaneCore`.

Takes requests from the gateway, sends step messages to the first stage, takes results from the
last one and streams outputs back to the gateway.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from queue import SimpleQueue

import msgpack
import ray
from tokenizers import Tokenizer

from actors import wire
from actors.engine.batch import StepResult
from actors.engine.batching import LaneLimits
from actors.engine.lane import LaneCore
from actors.engine.packed import is_whole, seconds_in, unpack
from actors.engine.requests import Request, RequestOutput
from actors.loop import ServingLoop

_log = logging.getLogger(__name__)
_POLL_S = 0.05
_HELD_POLL_S = 0.001
_REPORT_EVERY_S = 0.25
_ORDER_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneSpec:
    """What a lane is."""

    index: int
    limits: LaneLimits
    step_timeout_s: float
    epoch: int = 0
    life: int = 0
    """How many lanes of this index were lost before."""
    adapter_version: int = 0
    host: str = "127.0.0.1"


class DecodeWorker:
    """Hosts one `LaneCore`."""

    def __init__(
        self, spec: LaneSpec, tokenizer_json: str, keys: wire.WireKeys, gateway: wire.Address
    ) -> None:
        self._spec = spec
        self._keys = keys
        self._core = LaneCore(
            spec.limits,
            Tokenizer.from_str(tokenizer_json),
            lane=spec.index,
            life=spec.life,
            epoch=spec.epoch,
        )
        self._core.ask_for_adapter(spec.adapter_version)
        self._inbox = wire.Inbox(f"lane {spec.index}", keys, host=spec.host, beside=gateway)
        self._gateway = wire.Outbox(gateway, keys)
        self._first_stage: wire.Outbox | None = None
        self._orders: SimpleQueue[Callable[[], None]] = SimpleQueue()
        """What Ray calls ask for, done by the loop between two steps."""
        self._held: Future[list[int]] | None = None
        self._held_s = 0.0
        self._loop = ServingLoop("lane", self._take_turn)
        self._reported_s = 0.0
        self._adapter_switch_s = 0.0
        self._closed_bytes = 0

    def ready(self) -> wire.Address:
        return self._inbox.address

    def connect(self, first_stage: wire.Address | None) -> None:
        """Connect to the first stage and start serving; None: stand still until `go_on`."""
        if first_stage is None:
            self._core.hold()
        else:
            self._first_stage = wire.Outbox(first_stage, self._keys)
        self._loop.start()

    def hold(self, timeout_s: float, *, forget_step: bool = False) -> list[int]:
        """Send no step until `go_on`; returns the KV blocks in use once the step that is under way
        is back (`forget_step`: it will not come back).

        Raises:
            TimeoutError: It did not come back in time; the lane goes on when it does.
        """
        held: Future[list[int]] = Future()

        def order() -> None:
            self._core.hold(forget_step=forget_step)
            self._held, self._held_s = held, 0.0

        self._orders.put(order)
        try:
            return held.result(timeout_s)
        except TimeoutError:

            def give_up() -> None:
                if self._held is held:  # and not a later hold, which stands
                    self._held = None
                    self._core.release()

            self._orders.put(give_up)
            raise TimeoutError(
                f"lane {self._spec.index}: its step did not come back within {timeout_s:g} s"
            ) from None

    def go_on(self, epoch: int, first_stage: wire.Address | None, recompute: bool) -> float:
        """Go on with the stages of an epoch (None: with those of before); returns the seconds
        for which the lane stood still."""
        done: Future[float] = Future()

        def order() -> None:
            if first_stage is not None:
                if self._first_stage is not None:
                    self._closed_bytes += self._first_stage.bytes_sent
                    self._first_stage.close()
                self._first_stage = wire.Outbox(first_stage, self._keys)
                self._core.go_on(epoch, recompute=recompute)
            self._core.release()
            done.set_result(time.monotonic() - self._held_s if self._held_s else 0.0)

        self._orders.put(order)
        return done.result(_ORDER_TIMEOUT_S)

    def ping(self) -> None:
        """Answer, beside steps: this process runs."""

    def watch(self) -> None:
        """Block while the lane serves; the caller learns of its death by this call's error."""
        self._loop.watch()

    def stop(self) -> None:
        """Stop serving and close the sockets. Safe to call twice."""
        self._loop.stop()
        self._inbox.close()
        self._gateway.close()
        if self._first_stage is not None:
            self._first_stage.close()

    def _take_turn(self) -> None:
        while not self._orders.empty():
            self._orders.get()()
        parts = self._inbox.receive(_HELD_POLL_S if self._core.is_held else _POLL_S)
        while parts is not None:
            self._publish(self._handle(parts))
            parts = self._inbox.receive(0.0)
        now_s = time.monotonic()
        self._publish(self._core.expire(now_s))
        self._publish(self._overdue(now_s))
        self._switch_adapter()
        self._tell_held(now_s)
        step = self._core.next_step(now_s)
        if step is not None and self._first_stage is not None:
            self._first_stage.send([wire.STEP, step.batch.encode(), _NO_SECONDS])
        self._publish(self._core.render())
        if now_s - self._reported_s > _REPORT_EVERY_S:
            self._reported_s = now_s
            self._report()

    def _handle(self, parts: list[memoryview]) -> list[RequestOutput]:
        """Apply one message; a malformed one is dropped and the lane goes on."""
        kind = bytes(parts[0])
        now_s = time.monotonic()
        try:
            value = unpack(parts[1])
            if kind == wire.RESULT:
                stage_s = sum(seconds_in(parts[2]))
                result = StepResult.from_wire(value[1])
                self._core.accept_result(value[0], result, now_s=now_s, stage_s=stage_s)
                return []
            if kind == wire.REQUEST:
                return self._core.add(Request.from_wire(value), now_s)
            if kind == wire.ABORT:
                return self._core.abort(value)
            if kind == wire.REFUSED:
                return self._core.fail_step(value[0], str(value[1]))
            if kind == wire.FAIL:
                return self._core.fail_all(str(value))
            if kind == wire.ADAPTER:
                if not is_whole(value, high=2**63 - 1):
                    raise ValueError("an adapter's version is no count")
                self._core.ask_for_adapter(value)
                return []
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            _log.warning("lane %d dropped a %r message: %r", self._spec.index, kind, error)
        return []

    def _tell_held(self, now_s: float) -> None:
        if self._held is not None and (blocks := self._core.blocks_at_boundary()) is not None:
            self._held_s = now_s
            self._held.set_result(blocks)
            self._held = None

    def _switch_adapter(self) -> None:
        """Take up a new adapter when no step is in flight, and say so at once."""
        began_s = time.monotonic()
        if self._core.switch_adapter():
            self._adapter_switch_s = time.monotonic() - began_s
            self._report()

    def _overdue(self, now_s: float) -> list[RequestOutput]:
        limit_s = self._spec.step_timeout_s
        if self._core.overdue_s(now_s) <= limit_s:
            return []
        return self._core.fail_all(
            f"no stage answered a step within {limit_s:g} s; raise engine.step_timeout_s if a "
            "step of this model takes longer"
        )

    def _publish(self, outputs: Sequence[RequestOutput]) -> None:
        if outputs:
            message = msgpack.packb([self._spec.index, [out.to_wire() for out in outputs]])
            self._gateway.send([wire.OUTPUTS, message])

    def _report(self) -> None:
        sent = self._closed_bytes
        if self._first_stage is not None:
            sent += self._first_stage.bytes_sent
        values = {
            "lane": self._spec.index,
            "link_bytes": sent,
            "adapter_switch_s": self._adapter_switch_s,
            **asdict(self._core.counters()),
        }
        self._gateway.send([wire.REPORT, msgpack.packb(values)])


_NO_SECONDS = msgpack.packb([])

DecodeActor = ray.remote(DecodeWorker)
