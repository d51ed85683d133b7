"""The gateway's way to the lanes: implements `Backend` over the wire.

One inbox hears every stage and lane (outputs, reports); one outbox a lane carries requests and
aborts. Runs on the gateway's event loop; a thread reads the inbox. A request goes to the lane with
the fewest choices outstanding (the least predicted wait, for lanes of equal speed).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

import msgpack
import zmq

from actors import wire
from actors.engine.adapter import Adapter
from actors.engine.batching import LaneLimits
from actors.engine.requests import Request, RequestError, RequestOutput
from cluster.backend import (
    AdapterStatus,
    DeploymentStatus,
    ModelInfo,
    Overloaded,
    Published,
    PublishFailed,
    StageStatus,
    Steering,
    Unavailable,
)
from cluster.heard import take_message
from cluster.in_flight import InFlight
from cluster.publishing import AdapterHost, Publisher
from cluster.reports import Reports
from placement.stages import StagesPlan

_log = logging.getLogger(__name__)
_POLL_S = 0.5
_LOADING_RETRY_S = 2.0
_LOST_RETRY_S = 30.0
_LOST_SILENCE_S = 2.0
_SWITCH_GRACE_S = 5.0


class Dispatcher:
    """Requests in, outputs out. Create and use on the event loop."""

    def __init__(
        self, info: ModelInfo, plan: StagesPlan, limits: LaneLimits, *, silence_s: float = 60.0
    ) -> None:
        """A stage that has not reported for `silence_s` (longer than any step) is not active."""
        self.keys = wire.WireKeys.make()
        self.serving = asyncio.Event()
        """Set once every stage has said that it serves."""
        self.lost = asyncio.Event()
        """Set once a part is lost: nothing is served any more."""
        self._info = info
        self._silence_s = silence_s
        self._plan = plan
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._inbox: wire.Inbox | None = None
        self._reader: threading.Thread | None = None
        self._stopping = threading.Event()
        self._lanes: dict[int, wire.Outbox] = {}
        self._streams: dict[str, InFlight] = {}
        self._by_lane_id: dict[str, InFlight] = {}
        self._next_lane_id = 0
        self._reports = Reports(self._loop.time)
        self._lane_reported = asyncio.Event()
        self._publisher: Publisher | None = None
        self._adapter_version = 0
        """What lanes were told last to use."""
        self._steering: Steering | None = None
        self._interruption = ""
        """Why nothing moves, while a loss is being made good; requests are taken and wait."""
        self.tokens_sent = 0
        self._unavailable: Unavailable | None = Unavailable("stages are loading", _LOADING_RETRY_S)

    def open(self, host: str) -> wire.Address:
        """Start hearing; returns the address that stages and lanes report to."""
        self._inbox = wire.Inbox("gateway", self.keys, host=host)
        self._reader = threading.Thread(target=self._read, name="gateway-inbox", daemon=True)
        self._reader.start()
        return self._inbox.address

    async def connect(
        self, lanes: Mapping[int, wire.Address], host: AdapterHost, adapter: Adapter | None = None
    ) -> None:
        """Open for requests, with an adapter in use from the first one on.

        Every stage and lane is ready and connected; until this returns nothing is taken.

        Raises:
            AdapterError, PublishFailed: The adapter cannot be used.
        """
        self._lanes = {index: wire.Outbox(address, self.keys) for index, address in lanes.items()}
        self._publisher = Publisher(host, self._switch)
        if adapter is not None:
            await self._publisher.publish(adapter)
        self._unavailable = None

    def use_plan(self, plan: StagesPlan) -> None:
        """Another plan is in force."""
        self._plan = plan
        self._interruption = ""

    def interrupted(self, reason: str) -> None:
        """A part is lost and will be replaced: what is in flight waits, and so does what comes."""
        self._interruption = reason

    def resumed(self) -> None:
        """What was lost is made good."""
        self._interruption = ""

    def use_lane(self, index: int, address: wire.Address) -> None:
        """A lane is there, maybe in the place of a lost one: what that had to do goes on there.

        Raises:
            WireError: It takes nothing.
        """
        if index in self._lanes:
            self._lanes[index].close()
        lane = self._lanes[index] = wire.Outbox(address, self.keys)
        self._reports.forget_lane(index)  # what the lost one said of itself
        lane.send([wire.ADAPTER, msgpack.packb(self._adapter_version)])
        for stream in self._open_streams(index):
            self._resend(stream, index)

    def drop_lane(self, index: int) -> None:
        """A lane is about to stop: what it had to do goes on with the others."""
        if index not in self._lanes:
            return
        self._lanes.pop(index).close()
        self._reports.forget_lane(index)
        for stream in self._open_streams(index):
            self._resend(stream, self._least_busy())

    def _open_streams(self, lane: int) -> list[InFlight]:
        streams = self._by_lane_id.values()
        return [stream for stream in streams if stream.lane == lane and stream.open_choices]

    def _resend(self, stream: InFlight, lane: int) -> None:
        # Under another name: what the lane before sent last may still be on its way.
        del self._by_lane_id[stream.lane_id]
        stream.lane, stream.lane_id = lane, self._new_lane_id()
        self._by_lane_id[stream.lane_id] = stream
        rest = stream.rest(self._loop.time())
        self._lanes[lane].send([wire.REQUEST, msgpack.packb(rest.to_wire())])

    def _outstanding(self) -> dict[int, int]:
        """Return how many choices every lane has still to work on."""
        outstanding = dict.fromkeys(self._lanes, 0)
        for stream in self._streams.values():
            outstanding[stream.lane] = outstanding.get(stream.lane, 0) + stream.open_choices
        return outstanding

    def _least_busy(self) -> int:
        outstanding = self._outstanding()
        return min(self._lanes, key=lambda index: (outstanding[index], index))

    def refuse(self, reason: str) -> None:
        """Take nothing more for now; what is in flight waits."""
        self._unavailable = Unavailable(reason, _LOST_RETRY_S)

    def accept(self) -> None:
        """Take requests again after `refuse`."""
        if not self.lost.is_set():
            self._unavailable = None

    def fail(self, reason: str) -> None:
        """Nothing will go on: end what is in flight and take nothing more."""
        self.refuse(reason)
        self.lost.set()
        self._lane_reported.set()
        self.end_all(reason)

    def end_all(self, reason: str) -> None:
        """End what is in flight with an error."""
        for request_id, stream in self._streams.items():
            error = RequestOutput(id=request_id, finish_reason="error", error=reason)
            stream.outputs.put_nowait(error)
        for lane in self._lanes.values():
            try:
                lane.send([wire.FAIL, msgpack.packb(reason)])
            except wire.WireError as error:
                _log.warning("%s", error)

    async def close(self) -> None:
        """End what is in flight and close the sockets."""
        self.fail("the server is shutting down")
        self._stopping.set()
        if self._reader is not None:
            await asyncio.to_thread(self._reader.join, 10.0)
        if self._inbox is not None:
            self._inbox.close()
        for lane in self._lanes.values():
            lane.close()

    def model_info(self) -> ModelInfo:
        return self._info

    def plan_json(self) -> dict[str, object]:
        return self._plan.to_json()

    def controller_json(self) -> dict[str, object] | None:
        return None if self._steering is None else self._steering.document()

    def steering(self) -> Steering:
        if self._steering is None:
            raise self._refusal(self._unavailable or Unavailable("no controller", _LOST_RETRY_S))
        return self._steering

    def steer_by(self, steering: Steering) -> None:
        """From now on this controller moves layers."""
        self._steering = steering

    def adapter(self) -> AdapterStatus:
        return AdapterStatus() if self._publisher is None else self._publisher.current

    async def publish(self, adapter: Adapter | None) -> Published:
        """Put an adapter to use; see `Backend.publish`."""
        if self._unavailable is not None:
            raise self._refusal(self._unavailable)
        assert self._publisher is not None, "connect() makes it available"
        return await self._publisher.publish(adapter)

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Stream a request's outputs; see `Backend.generate`."""
        stream = self._admit(request)
        try:
            while stream.num_untold > 0:
                output = await stream.next_output()
                if output.error == "overloaded":
                    raise Overloaded("every slot of the lane's queue is taken", 1.0)
                if output.error and self._unavailable is not None:
                    raise self._refusal(self._unavailable)
                self.tokens_sent += len(output.tokens)
                yield replace(output, id=request.id)
        finally:
            del self._streams[request.id]
            del self._by_lane_id[stream.lane_id]
            if stream.num_untold > 0:
                self._abort(stream)

    async def abort(self, request_id: str) -> bool:
        stream = self._streams.get(request_id)
        if stream is None:
            return False
        self._abort(stream)
        return True

    async def status(self) -> DeploymentStatus:
        stages = self._stages()
        inactive = [stage for stage in stages if not stage.active]
        reason = ""
        if self._unavailable is not None:
            reason = self._unavailable.message
        elif self._interruption:
            reason = self._interruption
        elif inactive:
            reason = f"{len(inactive)} of {len(stages)} stages are not serving yet"
        return DeploymentStatus(
            ready=not reason,
            reason=reason,
            progress=sum(stage.loaded_fraction for stage in stages) / len(stages),
            epoch=self._plan.epoch,
            stages=stages,
            lanes=self._reports.lane_statuses(),
            link_bytes=self._reports.link_bytes([s.device_id for s in self._plan.stages]),
            adapter=self.adapter(),
            controller=None if self._steering is None else self._steering.status(),
        )

    def lane_reports(self) -> dict[int, Mapping[str, Any]]:
        """The lanes' latest raw counters."""
        return dict(self._reports.lanes)

    def stage_reports(self) -> dict[str, Mapping[str, Any]]:
        """The stages' latest raw counters, by device."""
        return dict(self._reports.stages)

    def expert_reports(self) -> dict[str, Mapping[str, Any]]:
        """The latest raw counters of workers with sharded experts, by device."""
        return dict(self._reports.experts)

    def _admit(self, request: Request) -> InFlight:
        """Choose a lane and send the request, or say why not; nothing is held when it raises."""
        if self._unavailable is not None:
            raise self._refusal(self._unavailable)
        if request.id in self._streams:
            raise RequestError(f"request id {request.id!r} is already in flight", "id")
        longest = len(request.prompt) + request.sampling.max_tokens
        if longest > self._limits.max_sequence_tokens:
            raise RequestError(
                f"{len(request.prompt)} prompt tokens + max_tokens {request.sampling.max_tokens} "
                f"= {longest}; a sequence holds at most {self._limits.max_sequence_tokens}. "
                "Shorten the prompt or lower max_tokens",
                "max_tokens",
            )
        if request.n > self._limits.max_waiting:
            raise RequestError(
                f"n ({request.n}) is more than a lane queues ({self._limits.max_waiting}); lower "
                "it or raise engine.max_waiting",
                "n",
            )
        lane = self._least_busy()
        num_queued = self._outstanding()[lane]
        most = self._limits.max_running + self._limits.max_waiting
        if num_queued + request.n > most:
            raise Overloaded(
                f"{num_queued} choices are queued on the least busy lane, {most} fit; "
                "retry later or raise engine.max_waiting",
                1.0,
            )
        end_s = None if request.deadline_s is None else self._loop.time() + request.deadline_s
        stream = InFlight(request, lane, self._new_lane_id(), end_s)
        asked = replace(request, id=stream.lane_id)
        try:
            self._lanes[lane].send([wire.REQUEST, msgpack.packb(asked.to_wire())])
        except wire.WireError as error:
            raise Unavailable(str(error), _LOST_RETRY_S) from error
        # Its outputs come through this event loop, so none can have come yet.
        self._streams[request.id] = self._by_lane_id[stream.lane_id] = stream
        return stream

    def _new_lane_id(self) -> str:
        self._next_lane_id += 1
        return str(self._next_lane_id)

    def _abort(self, stream: InFlight) -> None:
        lane = self._lanes.get(stream.lane)
        if lane is not None:  # or it has retired, and nothing of this request was left to do
            lane.send([wire.ABORT, msgpack.packb(stream.lane_id)])

    async def _switch(self, version: int) -> float:
        """Make every lane use a version of an adapter, or, when one does not, none of them.

        What is sent to a lane after this has begun runs with the new version. Returns the longest
        time that a lane spent on it, in seconds.
        """
        limit_s = self._silence_s + _SWITCH_GRACE_S
        try:
            self._tell_lanes(version)
            async with asyncio.timeout(limit_s):
                while lagging := self._lanes_without(version):
                    self._lane_reported.clear()
                    await self._lane_reported.wait()
        except TimeoutError:
            before = self.adapter().version
            self._tell_lanes(before)
            raise PublishFailed(
                f"lanes {lagging} did not switch within {limit_s:g} s; version {before} is in use "
                "again. Raise engine.step_timeout_s if a step takes longer"
            ) from None
        return max(float(report["adapter_switch_s"]) for report in self._reports.lanes.values())

    def _tell_lanes(self, version: int) -> None:
        self._adapter_version = version
        try:
            for lane in self._lanes.values():
                lane.send([wire.ADAPTER, msgpack.packb(version)])
        except wire.WireError as error:
            raise PublishFailed(str(error)) from error

    def _lanes_without(self, version: int) -> list[int]:
        """The lanes that do not say yet that they use a version; raises when none ever will."""
        if self.lost.is_set():
            raise PublishFailed(f"the deployment is lost: {self._unavailable}")
        used = {i: report["adapter_version"] for i, report in self._reports.lanes.items()}
        return [i for i in self._lanes if used.get(i) != version]

    @staticmethod
    def _refusal(why: Unavailable) -> Unavailable:
        """An exception of its own for each request: a raised one collects tracebacks."""
        return Unavailable(why.message, why.retry_after_s)

    def _read(self) -> None:
        """Thread: hand every message to the event loop."""
        assert self._inbox is not None
        while not self._stopping.is_set():
            try:
                parts = self._inbox.receive(_POLL_S)
            except zmq.ZMQError as error:
                self._loop.call_soon_threadsafe(self.fail, f"the gateway hears nothing: {error}")
                return
            if parts is None:
                continue
            try:
                kind, value = take_message(parts)
            except ValueError as error:
                _log.warning("gateway dropped a malformed message: %s", error)
                continue
            try:
                self._loop.call_soon_threadsafe(self._handle, kind, value)
            except RuntimeError:  # the loop has closed under us: nobody is left to tell
                return

    def _handle(self, kind: bytes, value: Any) -> None:
        if kind == wire.OUTPUTS:
            for output in value:
                stream = self._by_lane_id.get(output.id)
                if stream is not None:
                    stream.arrived(output)
        elif kind == wire.REPORT:
            if "lane" in value and self._lanes and value["lane"] not in self._lanes:
                return  # the last words of one that was retired
            self._reports.take(value)
            if "lane" in value:
                self._lane_reported.set()
            elif all(stage.active for stage in self._stages()):
                self.serving.set()

    def _stages(self) -> tuple[StageStatus, ...]:
        """A stage reports between steps, so a long step is silence too; once something is lost
        there are no more steps to wait for."""
        silence_s = self._silence_s if self._unavailable is None else _LOST_SILENCE_S
        placed = self._plan.stages
        return tuple(self._reports.stage_status(stage, silence_s=silence_s) for stage in placed)
