"""A plan turned into placed actors: the one place where resources, nodes and restarts are chosen.

`Fleet.deploy` starts every stage and lane on its node, waits until all are ready, and connects
them. The driver's inbox hears loading progress meanwhile. The fleet knows who is there and notices
who is lost; `actors.moving` leads it from plan to plan.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError

from actors import wire
from actors.decode import DecodeActor, LaneSpec
from actors.engine.adapter import Adapter
from actors.engine.batching import LaneLimits
from actors.engine.config import EngineConfig
from actors.expert_crew import GPU_SHARE, CrewSpec, ExpertCrew
from actors.hosting import (
    FleetError,
    Host,
    MemberLostError,
    actor_options,
    address_of,
    end_for_certain,
    end_politely,
)
from actors.losses import Loss, Member, Watches, cause_of, first_line
from actors.stage import StageActor, StageSpec
from placement.stages import StagePlacement, StagesPlan
from placement.topology import Device
from placement.workload import ModelProfile

_log = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.25
_NOT_READY = "was not ready in time; raise ray.start_timeout_s, or see `motley doctor`"


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
    """At first."""
    max_lanes: int
    """For which stages keep KV."""
    tokenizer_json: str
    monitor: wire.Address
    """The driver's inbox: progress, reports and outputs."""
    keys: wire.WireKeys
    silence_s: float
    """A member that leaves a ping unanswered for so long is lost."""
    experts: CrewSpec | None = None
    """Where the routed experts are; None: in the stages. Profile and devices are then those of the
    model without them."""


class Fleet:
    """The running actors of one plan. Use from one thread at a time, but for `stop`."""

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
        self._spares: dict[str, tuple[Member, StagePlacement, Host]] = {}
        """By device: stages of a plan that came to nothing, what they have loaded, and where."""
        self._adapters: dict[int, Any] = {}
        """The adapter in use and the newest, by version: their bytes in Ray, for stages that come
        later."""
        self.stands_still = False
        """No plan serves: a move has ended half-way, and the lanes wait for another."""
        self._lives: Counter[int] = Counter()
        """Of every lane, by index: how often it was started."""
        self._watches = Watches(spec.silence_s)
        self.experts = None
        """The workers that hold routed experts, where stages do not."""
        if spec.experts is not None:
            self.experts = ExpertCrew(spec.experts, self.hosts, spec.keys, spec.monitor)
        self._is_stopped = False

    @property
    def members(self) -> list[Member]:
        return [*self.stages.values(), *self.lanes.values()]

    @property
    def lane_addresses(self) -> dict[int, wire.Address]:
        return {index: address_of(lane) for index, lane in self.lanes.items()}

    @property
    def is_whole(self) -> bool:
        """Whether the plan in force serves: every stage of it is there, and none is fenced off."""
        return not self.stands_still and all(
            placed.device_id in self.stages for placed in self.plan.stages
        )

    def deploy(self, timeout_s: float) -> None:
        """Start the plan's actors and connect them; nothing is left behind when it fails.

        Raises:
            FleetError: An actor failed (its own error is quoted), was not ready in time, or `stop`
                was called meanwhile.
        """
        deadline_s = time.monotonic() + timeout_s
        plan = self.plan
        members = [self.start_stage(placed, plan.epoch) for placed in plan.stages]
        members += [self.start_lane(index) for index in range(self.spec.num_lanes)]
        if self.experts is not None:
            members += self.experts.start()
        try:
            self.admit(members, deadline_s)
            self.connect(plan, deadline_s)
            first = address_of(self.stages[plan.stages[0].device_id])
            lanes = list(self.lanes.values())
            connected = [lane.actor.connect.remote(first) for lane in lanes]
            self.wait_for(lanes, connected, deadline_s)
        except FleetError:
            for member in members:
                self.bury(member)
            raise
        # Losses of experts are made good by themselves (see `actors.experts_shell`).
        self.watch(self.members)

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
            num_lanes=spec.max_lanes,
            engine=spec.engine,
            epoch=epoch,
            host=host.address,
            experts=None if self.experts is None else self.experts.access(placed.node),
        )
        whole = 1.0 if self.experts is None else GPU_SHARE
        options = actor_options(host, num_gpus=whole if device.kind == "cuda" else 0)
        actor = StageActor.options(**options).remote(stage, spec.keys, spec.monitor)
        return Member("stage", device.id, actor)

    def start_lane(self, index: int, *, adapter_version: int = 0) -> Member:
        """Start a lane actor; see `start_stage`."""
        self._check_open()
        life = self._lives[index]
        self._lives[index] += 1
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
        options = actor_options(host, num_gpus=0)
        arguments = lane, spec.tokenizer_json, spec.keys, spec.monitor
        return Member("lane", index, DecodeActor.options(**options).remote(*arguments), life)

    def admit(self, members: Sequence[Member], deadline_s: float) -> None:
        """Wait until started members are ready; they belong to the fleet then.

        Raises:
            FleetError: One failed to start, or the deadline passed; none of them belongs to it.
        """
        calls = [member.actor.ready.remote() for member in members]
        addresses = self.wait_for(members, calls, deadline_s)
        stages = [member for member in members if member.kind == "stage"]
        keep = 0
        for version, message in sorted(self._adapters.items()):
            loads = [stage.actor.load_adapter.remote(version, message, keep) for stage in stages]
            self.wait_for(stages, loads, deadline_s)
            keep = version
        for member, address in zip(members, addresses, strict=True):
            member.address = address
        if self.experts is not None:
            self.experts.admit([m for m in members if m.kind == "experts"])
            self.experts.serve(stages, deadline_s)
        for member in members:
            self._group(member)[member.key] = member

    def connect(self, plan: StagesPlan, deadline_s: float) -> None:
        """Tell the stages of a plan, by its epoch, who comes next and where the lanes are.

        Raises:
            FleetError: One of them died, or did not answer in time.
        """
        stages = [self.stages[placed.device_id] for placed in plan.stages]
        lanes = {index: (lane.life, address_of(lane)) for index, lane in self.lanes.items()}
        following = [*(address_of(stage) for stage in stages[1:]), None]
        calls = [
            stage.actor.connect.remote(plan.epoch, address, lanes)
            for stage, address in zip(stages, following, strict=True)
        ]
        self.wait_for(stages, calls, deadline_s)

    def watch(self, members: Sequence[Member]) -> None:
        """Notice from now on when these are lost."""
        for member in members:
            self._watches.add(member)

    def lost(self, timeout_s: float) -> Loss | None:
        """Wait up to `timeout_s` for a member to be lost; returns who, and why."""
        return self._watches.next_loss(timeout_s)

    def is_known_lost(self, member: Member) -> bool:
        """Whether `lost` will tell that this member is no more; it is not worth waiting for."""
        return self._watches.has_noted(member)

    def is_quiet(self, member: Member) -> bool:
        """Whether a member owes the answer to a ping."""
        return self._watches.is_quiet(member)

    def wait_for(
        self,
        members: Sequence[Member],
        references: Sequence[Any],
        deadline_s: float,
        late: str = _NOT_READY,
    ) -> list[Any]:
        """Return the results of a call to each member; the first failure is raised at once.

        So is the loss of another stage: what waits here could wait for it until the deadline.

        Raises:
            MemberLostError: One of them, or another stage, is no more.
            FleetError: Names the member whose call failed or had no answer in time.
        """
        pending = dict(zip(references, members, strict=True))
        while pending:
            left_s = max(0.0, deadline_s - time.monotonic())
            done, _ = ray.wait(list(pending), num_returns=1, timeout=min(left_s, _LOOK_EVERY_S))
            if not done and left_s <= _LOOK_EVERY_S:
                raise FleetError(f"{next(iter(pending.values())).name} {late}")
            for reference in done:
                member = pending.pop(reference)
                try:
                    ray.get(reference)
                except RayActorError as error:
                    reason = f"{member.name}: {cause_of(error)}"
                    raise MemberLostError(member, reason) from error
                except RayError as error:
                    raise FleetError(f"{member.name}: {cause_of(error)}") from error
            self._check_open()
            if not done and (loss := self._watches.look(members)) is not None:
                raise MemberLostError(loss.member, loss.reason)
        results: list[Any] = ray.get(list(references))
        return results

    def _group(self, member: Member) -> dict[Any, Member]:
        if member.kind == "experts":
            assert self.experts is not None
            return self.experts.members
        return self.stages if member.kind == "stage" else self.lanes

    def _check_open(self) -> None:
        if self._is_stopped:
            raise FleetError("the fleet is stopped")

    def bury(self, member: Member) -> None:
        """Take a lost member out, and make sure that it does not come back."""
        group = self._group(member)
        if group.get(member.key) is member:
            del group[member.key]
        self._watches.drop(member)
        end_for_certain(member)
        if self.experts is not None:
            self.experts.forget(member)

    def set_aside(self, member: Member, placed: StagePlacement) -> None:
        """Keep a stage that loads for a plan that comes to nothing; the next may want it."""
        if self.stages.get(placed.device_id) is member:
            del self.stages[placed.device_id]
        self._watches.drop(member)
        self._spares[placed.device_id] = member, placed, self.hosts[placed.node]

    def take_spare(self, placed: StagePlacement) -> Member | None:
        """Return the stage with these layers that was set aside, if there is one."""
        if placed.device_id not in self._spares:
            return None
        member, loaded, host = self._spares.pop(placed.device_id)
        wanted = self.hosts[placed.node], placed.first_layer, placed.end_layer
        if wanted != (host, loaded.first_layer, loaded.end_layer):
            # With other layers it might hold more at once than the device has room for.
            self.bury(member)
            return None
        return member

    def bury_spares(self, node: str | None = None) -> None:
        """End the stages that were set aside; those of one node, or all."""
        for device_id, (member, loaded, _) in list(self._spares.items()):
            if node in (None, loaded.node):
                del self._spares[device_id]
                self.bury(member)

    def retire(self, member: Member) -> None:
        """Stop a member that is not needed any more."""
        self._watches.drop(member)
        end_politely([member])
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
            raise FleetError(f"Ray cannot hold the adapter: {first_line(error)}") from error
        stages = list(self.stages.values())
        calls = [stage.actor.load_adapter.remote(version, message, keep) for stage in stages]
        late = f"had not loaded the adapter within {timeout_s:g} s; raise ray.start_timeout_s"
        self.wait_for(stages, calls, time.monotonic() + timeout_s, late)
        kept = {old: self._adapters[old] for old in {keep} & self._adapters.keys()}
        self._adapters = kept | {version: message}

    def stop(self) -> None:
        """Stop every actor: politely first, then for certain."""
        self._is_stopped = True
        self._watches.stop()
        members = [*self.members, *(spare[0] for spare in self._spares.values())]
        if self.experts is not None:
            members += self.experts.members.values()
        end_politely(members)
        for member in members:
            self.bury(member)
