"""DecodeActor: one lane. Sockets and a clock around `LaneCore`.

Takes requests from the gateway, sends step messages to the first stage, takes results from the
last one and streams outputs back to the gateway.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

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
_POLL_S = 0.2
_REPORT_EVERY_S = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneSpec:
    """What a lane is."""

    index: int
    limits: LaneLimits
    step_timeout_s: float
    epoch: int = 0
    host: str = "127.0.0.1"


class DecodeWorker:
    """Hosts one `LaneCore`."""

    def __init__(
        self, spec: LaneSpec, tokenizer_json: str, keys: wire.WireKeys, gateway: wire.Address
    ) -> None:
        self._spec = spec
        self._keys = keys
        self._core = LaneCore(
            spec.limits, Tokenizer.from_str(tokenizer_json), lane=spec.index, epoch=spec.epoch
        )
        self._inbox = wire.Inbox(f"lane {spec.index}", keys, host=spec.host)
        self._gateway = wire.Outbox(gateway, keys)
        self._first_stage: wire.Outbox | None = None
        self._loop = ServingLoop("lane", self._take_turn)
        self._reported_s = 0.0
        self._adapter_switch_s = 0.0

    def ready(self) -> wire.Address:
        return self._inbox.address

    def connect(self, first_stage: wire.Address) -> None:
        """Connect to the first stage and start serving."""
        self._first_stage = wire.Outbox(first_stage, self._keys)
        self._loop.start()

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
        parts = self._inbox.receive(_POLL_S)
        while parts is not None:
            self._publish(self._handle(parts))
            parts = self._inbox.receive(0.0)
        now_s = time.monotonic()
        self._publish(self._core.expire(now_s))
        self._publish(self._overdue(now_s))
        self._switch_adapter()
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
        sent = self._first_stage.bytes_sent if self._first_stage is not None else 0
        values = {
            "lane": self._spec.index,
            "link_bytes": sent,
            "adapter_switch_s": self._adapter_switch_s,
            **asdict(self._core.counters()),
        }
        self._gateway.send([wire.REPORT, msgpack.packb(values)])


_NO_SECONDS = msgpack.packb([])

DecodeActor = ray.remote(DecodeWorker)
