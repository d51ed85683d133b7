"""A plan turned into placed actors: the one place where resources, nodes and restarts are chosen.

`deploy` starts every stage and lane on its node, waits until all are ready, and connects them. The
driver's inbox hears loading progress meanwhile. Nothing is left behind when it fails. `Fleet` knows
who is there and notices who is lost; `actors.moving` leads it from plan to plan.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import wire
from actors.decode import DecodeActor, LaneSpec
from actors.engine.adapter import Adapter
from actors.engine.batching import LaneLimits
from actors.engine.config import EngineConfig
from actors.stage import StageActor, StageSpec
from placement.stages import StagePlacement, StagesPlan
from placement.topology import Device
from placement.workload import ModelProfile

_log = logging.getLogger(__name__)
_STOP_TIMEOUT_S = 10.0
_PING_EVERY_S = 1.0


class FleetError(RuntimeError):
    """The plan could not be turned into running actors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A Ray node as the fleet uses it."""

    ray_node_id: str
    address: str
    """The interface that other nodes reach; loopback when there are no others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetSpec:
    """All that actors are started with, besides a plan's own numbers."""

    devices: Mapping[str, Device]
    hosts: Mapping[str, Host]
    """By the node names that plans use."""
    lane_node: str
    profile: ModelProfile
    model: str
    engine: EngineConfig
    limits: LaneLimits
    num_lanes: int
    tokenizer_json: str
    monitor: wire.Address
    """The driver's inbox: progress, reports and outputs."""
    keys: wire.WireKeys


@dataclass(slots=True, eq=False)
class Member:
    """A running stage or lane."""

    kind: Literal["stage", "lane"]
    key: str | int
    """A stage's device, a lane's index."""
    actor: Any
    life: int = 0
    address: wire.Address | None = None
    asked: tuple[Any, float] | None = None
    """A ping that has not been answered: its reference, and when it was sent."""

    @property
    def name(self) -> str:
        return f"lane {self.key}" if self.kind == "lane" else f"the stage on {self.key}"


@dataclass(frozen=True, slots=True)
class Loss:
    """A member that is no more, or hangs."""

    member: Member
    reason: str


class Fleet:
    """The running actors of one plan. Use from one thread at a time."""

    def __init__(self, spec: FleetSpec, plan: StagesPlan) -> None:
        self.spec = spec
        self.devices = dict(spec.devices)
        self.hosts = dict(spec.hosts)
        """Both may grow and change: nodes come and go."""
        self.plan = plan
        """The one in force."""
        self.stages: dict[str, Member] = {}
        """By device."""
        self.lanes: dict[int, Member] = {}
        self._adapters: dict[int, Any] = {}
        """The adapter in use and the newest, by version: their bytes in Ray, for stages that come
        later."""
        self._watches: dict[Any, Member] = {}
        self._pinged_s = 0.0
        self._is_stopped = False

    @property
    def members(self) -> list[Member]:
        return [*self.stages.values(), *self.lanes.values()]

    @property
    def lane_addresses(self) -> dict[int, wire.Address]:
        return {index: _address(lane) for index, lane in self.lanes.items()}

    def start_stage(self, placed: StagePlacement, epoch: int) -> Member:
        """Start a stage actor; it is one of the fleet when `admit` has seen it ready.

        Raises:
            FleetError: The fleet is stopped.
        """
        self._check_open()
        spec = self.spec
        device = self.devices[placed.device_id]
        host = self.hosts[placed.node]
        stage = StageSpec(
            model=spec.model,
            first_layer=placed.first_layer,
            end_layer=placed.end_layer,
            device=device,
            profile=spec.profile,
            num_kv_blocks=spec.limits.num_blocks,
            num_lanes=spec.num_lanes,
            engine=spec.engine,
            epoch=epoch,
            host=host.address,
        )
        options = _options(host, num_gpus=1 if device.kind == "cuda" else 0)
        actor = StageActor.options(**options).remote(stage, spec.keys, spec.monitor)
        return Member("stage", device.id, actor)

    def start_lane(self, index: int, *, life: int = 0, adapter_version: int = 0) -> Member:
        """Start a lane actor; see `start_stage`."""
        self._check_open()
        spec = self.spec
        host = self.hosts[spec.lane_node]
        lane = LaneSpec(
            index=index,
            limits=spec.limits,
            step_timeout_s=spec.engine.step_timeout_s,
            epoch=self.plan.epoch,
            life=life,
            adapter_version=adapter_version,
            host=host.address,
        )
        options = _options(host, num_gpus=0)
        arguments = lane, spec.tokenizer_json, spec.keys, spec.monitor
        return Member("lane", index, DecodeActor.options(**options).remote(*arguments), life)

    def admit(self, members: Sequence[Member], deadline_s: float) -> None:
        """Wait until started members are ready; they belong to the fleet then.

        Raises:
            FleetError: One failed to start, or the deadline passed; none of them is left.
        """
        try:
            calls = [member.actor.ready.remote() for member in members]
            addresses = wait_for(members, calls, deadline_s)
            stages = [member for member in members if member.kind == "stage"]
            keep = 0
            for version, message in sorted(self._adapters.items()):
                loads = [
                    stage.actor.load_adapter.remote(version, message, keep) for stage in stages
                ]
                wait_for(stages, loads, deadline_s)
                keep = version
        except FleetError:
            _end(members)
            raise
        for member, address in zip(members, addresses, strict=True):
            member.address = address
            group: dict[Any, Member] = self.stages if member.kind == "stage" else self.lanes
            group[member.key] = member

    def connect(self, plan: StagesPlan, deadline_s: float) -> None:
        """Tell the stages of a plan, by its epoch, who comes next and where the lanes are.

        Raises:
            FleetError: One of them died, or did not answer in time.
        """
        stages = [self.stages[placed.device_id] for placed in plan.stages]
        lanes = {index: (lane.life, _address(lane)) for index, lane in self.lanes.items()}
        following = [*(_address(stage) for stage in stages[1:]), None]
        calls = [
            stage.actor.connect.remote(plan.epoch, address, lanes)
            for stage, address in zip(stages, following, strict=True)
        ]
        wait_for(stages, calls, deadline_s)

    def watch(self, members: Sequence[Member]) -> None:
        """Notice from now on when these are lost."""
        for member in members:
            self._watches[member.actor.watch.remote()] = member

    def lost(self, timeout_s: float, silence_s: float) -> Loss | None:
        """Wait up to `timeout_s` for a member to die, or to leave a ping of `silence_s` ago
        unanswered; returns who, and why."""
        if not self._watches or self._is_stopped:
            time.sleep(timeout_s)
            return None
        done, _ = ray.wait(list(self._watches), timeout=timeout_s)
        for reference in done:
            member = self._watches.pop(reference, None)
            if member is None:  # stopped meanwhile
                return None
            try:
                ray.get(reference)
            except RayTaskError as error:
                return Loss(member, f"{member.name} is lost: {_cause(error)}")
            except RayError as error:
                return Loss(member, f"{member.name} is lost: {_first_line(error)}")
        return self._silent(silence_s)

    def _check_open(self) -> None:
        if self._is_stopped:
            raise FleetError("the fleet is stopped")

    def _silent(self, silence_s: float) -> Loss | None:
        now_s = time.monotonic()
        if now_s - self._pinged_s < _PING_EVERY_S:
            return None
        self._pinged_s = now_s
        for member in self._watches.values():
            if member.asked is not None:
                reference, sent_s = member.asked
                answered, _ = ray.wait([reference], timeout=0)
                if not answered and now_s - sent_s > silence_s:
                    return Loss(member, f"{member.name} is lost: it hung for {silence_s:g} s")
                if not answered:
                    continue
            member.asked = member.actor.ping.remote(), now_s
        return None

    def bury(self, member: Member) -> None:
        """Take a lost member out, and make sure that it does not come back."""
        group: dict[Any, Member] = self.stages if member.kind == "stage" else self.lanes
        if group.get(member.key) is member:
            del group[member.key]
        self._watches = {ref: other for ref, other in self._watches.items() if other is not member}
        ray.kill(member.actor)
        if member.address is not None:
            remove_folder(member.address)

    def retire(self, member: Member) -> None:
        """Stop a member that is not needed any more."""
        self._watches = {ref: other for ref, other in self._watches.items() if other is not member}
        ray.wait([member.actor.stop.remote()], timeout=_STOP_TIMEOUT_S)
        self.bury(member)

    def load_adapter(self, version: int, adapter: Adapter, *, keep: int, timeout_s: float) -> None:
        """Make a version of an adapter ready on every stage; nothing uses it yet.

        Of the versions before it every stage keeps `keep`, the one in use.

        Raises:
            FleetError: A stage could not take it, died, or did not answer in time.
        """
        try:
            message = ray.put(np.frombuffer(adapter.encode(), np.uint8))
        except RayError as error:
            raise FleetError(f"Ray cannot hold the adapter: {_first_line(error)}") from error
        stages = list(self.stages.values())
        calls = [stage.actor.load_adapter.remote(version, message, keep) for stage in stages]
        late = f"had not loaded the adapter within {timeout_s:g} s; raise ray.start_timeout_s"
        wait_for(stages, calls, time.monotonic() + timeout_s, late)
        kept = {old: self._adapters[old] for old in {keep} & self._adapters.keys()}
        self._adapters = kept | {version: message}

    def stop(self) -> None:
        """Stop every actor: politely first, then for certain."""
        self._is_stopped = True
        self._watches.clear()
        members = self.members
        _end(members)
        for member in members:
            self.bury(member)


def deploy(spec: FleetSpec, plan: StagesPlan, *, timeout_s: float) -> Fleet:
    """Start the plan's actors and connect them.

    Raises:
        FleetError: An actor failed (its own error is quoted) or was not ready in time.
    """
    deadline_s = time.monotonic() + timeout_s
    fleet = Fleet(spec, plan)
    members = [fleet.start_stage(placed, plan.epoch) for placed in plan.stages]
    members += [fleet.start_lane(index) for index in range(spec.num_lanes)]
    fleet.admit(members, deadline_s)
    try:
        fleet.connect(plan, deadline_s)
        first = _address(fleet.stages[plan.stages[0].device_id])
        lanes = list(fleet.lanes.values())
        wait_for(lanes, [lane.actor.connect.remote(first) for lane in lanes], deadline_s)
    except FleetError:
        fleet.stop()
        raise
    fleet.watch(fleet.members)
    return fleet


def _end(members: Sequence[Member]) -> None:
    """Stop actors: politely first, so that they clean up behind them, then for certain."""
    stops = [member.actor.stop.remote() for member in members]
    if stops:
        ray.wait(stops, num_returns=len(stops), timeout=_STOP_TIMEOUT_S)
    for member in members:
        ray.kill(member.actor)


def _address(member: Member) -> wire.Address:
    assert member.address is not None, "members of a fleet are ready"
    return member.address


def _options(host: Host, *, num_gpus: int) -> dict[str, Any]:
    """Pin to the planned node. The plan has already shared out the CPUs, so Ray counts none."""
    affinity = NodeAffinitySchedulingStrategy(node_id=host.ray_node_id, soft=False)
    return {
        "num_cpus": 0,
        "num_gpus": num_gpus,
        "max_restarts": 0,
        # watch() holds one thread for as long as the actor lives; loading, KV, pings take more.
        "max_concurrency": 6,
        "scheduling_strategy": affinity,
    }


def remove_folder(address: wire.Address) -> None:
    """Remove the socket folder of an actor of this machine that could not do so itself."""
    if address.machine == wire.machine_id():
        folder = Path(address.ipc.removeprefix("ipc://")).parent
        shutil.rmtree(folder, ignore_errors=True)


_NOT_READY = "was not ready in time; raise ray.start_timeout_s, or see `motley doctor`"


def wait_for(
    members: Sequence[Member],
    references: Sequence[Any],
    deadline_s: float,
    late: str = _NOT_READY,
) -> list[Any]:
    """Return the results of a call to each member; the first failure is raised at once.

    Raises:
        FleetError: Names the member that failed, or did not answer until the deadline.
    """
    pending = dict(zip(references, members, strict=True))
    while pending:
        left_s = max(0.0, deadline_s - time.monotonic())
        done, _ = ray.wait(list(pending), num_returns=1, timeout=left_s)
        if not done:
            raise FleetError(f"{next(iter(pending.values())).name} {late}")
        for reference in done:
            member = pending.pop(reference)
            try:
                ray.get(reference)
            except (RayError, GetTimeoutError) as error:
                raise FleetError(f"{member.name}: {_cause(error)}") from error
    results: list[Any] = ray.get(list(references))
    return results


def _cause(error: BaseException) -> str:
    cause = getattr(error, "cause", None)
    return str(cause) if cause is not None else _last_line(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _last_line(error: BaseException) -> str:
    """The original error's own sentence, without its class (Ray quotes the whole traceback)."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    name, _, sentence = lines[-1].partition(": ")
    return sentence if sentence and name.replace(".", "").isidentifier() else lines[-1]
