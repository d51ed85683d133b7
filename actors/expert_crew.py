"""The expert workers of a deployment, and the map by which all of its stages reach them.

A map comes into force in an order that leaves no call without an answer: its devices have what it
names, then stages divide rows by it, and when no call runs by an older one, that is forgotten.
Decides nothing (see `actors.experts_shell`). From any thread, one at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from actors import wire
from actors.engine.config import EngineConfig
from actors.expert import ExpertActor, ExpertSpec
from actors.expert_routes import held_by
from actors.hosting import (
    FleetError,
    Host,
    MemberLostError,
    actor_options,
    address_of,
    end_for_certain,
)
from actors.losses import Loss, Member, cause_of
from actors.stage_experts import ExpertAccess
from placement.sharding.expert_map import ExpertMap
from placement.sharding.loads import LoadSummary, Phase
from placement.sharding.recording import Steps
from placement.topology import Device
from placement.workload import ModelProfile

_log = logging.getLogger(__name__)
GPU_SHARE = 0.5
"""Of a GPU, to a stage and to the worker with its experts: Ray then lets both use it."""
_SETTLE_S = 5.0
"""For calls by the map before to end."""
_LOOK_EVERY_S = 0.25
_CALL_TIMEOUT_S = 10.0
"""For what a living actor does at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CrewSpec:
    """All that expert workers are started with."""

    model: str
    profile: ModelProfile
    """Of the whole model."""
    engine: EngineConfig
    devices: Mapping[str, Device]
    """Whole, by id."""
    num_slots: Mapping[str, int]
    """Experts that each device has room for; those of the map at least."""
    num_guests: Mapping[str, int]
    """Of these slots, those for guests."""
    layers: tuple[int, ...]
    """The model's layers with experts, in the map's order."""
    map: ExpertMap
    """At first."""
    access: Mapping[str, ExpertAccess]
    """For the stages of each node."""


class ExpertCrew:
    """Starts the workers, introduces stages to them, and brings maps into force."""

    def __init__(
        self,
        spec: CrewSpec,
        hosts: Mapping[str, Host],
        keys: wire.WireKeys,
        monitor: wire.Address,
        *,
        group: str | None = None,
    ) -> None:
        """`hosts` by node; they may change. `group` is the concurrency group in which those who use
        the experts are asked, where they have several."""
        self.spec = spec
        self.map = spec.map
        """In force."""
        self.members: dict[str, Member] = {}
        """By device."""
        self._hosts = hosts
        self._keys = keys
        self._monitor = monitor
        self._options = {} if group is None else {"concurrency_group": group}
        self._callers: dict[Member, wire.Address] = {}
        """Stages, and where workers answer them."""
        self._unsettled: list[Member] = []
        """Stages whose step may still go on by a map before that in force."""
        self._turn = threading.RLock()
        """Held while somebody is introduced, or the map changes."""

    def access(self, node: str) -> ExpertAccess:
        """Return how a node's stages reach the workers."""
        known = self.spec.access
        # Of a node that came later nobody knows how far it is.
        return known.get(node) or replace(next(iter(known.values())), node=node, latency_s={})

    def start(self) -> list[Member]:
        """Start a worker for every device of the map; they belong to the crew when admitted."""
        return [self.start_worker(device_id, is_new=False) for device_id in self.map.device_ids]

    def start_worker(self, device_id: str, *, is_new: bool = True) -> Member:
        """Start a device's worker; a new one is to hold nothing until a map says so."""
        spec = self.spec
        device = spec.devices[device_id]
        host = self._hosts[device.node]
        held = {} if is_new else held_by(self.map, spec.layers, device_id)
        worker = ExpertSpec(
            model=spec.model,
            device=device,
            profile=spec.profile,
            num_slots=spec.num_slots[device_id],
            num_guests=spec.num_guests[device_id],
            version=self.map.version,
            experts={layer: tuple(experts) for layer, experts in held.items()},
            engine=spec.engine,
            fingerprint=self.map.checkpoint,
            host=host.address,
        )
        options = actor_options(host, num_gpus=GPU_SHARE if device.kind == "cuda" else 0)
        actor = ExpertActor.options(**options).remote(worker, self._keys, self._monitor)
        return Member("experts", device_id, actor)

    def admit(self, workers: Sequence[Member]) -> None:
        """Take in workers that are ready; stages reach them once a map names them."""
        with self._turn:
            for worker in workers:
                self.members[str(worker.key)] = worker
            if self._callers:
                self._connect()

    def serve(self, stages: Sequence[Member], deadline_s: float) -> None:
        """Let stages that are ready use the experts, by the map in force.

        Raises:
            FleetError: One of them died, or did not answer in time.
        """
        with self._turn:
            calls = [self._ask(stage.actor.expert_caller) for stage in stages]
            addresses = _results(stages, calls, deadline_s)
            self._callers |= dict(zip(stages, addresses, strict=True))
            self._connect()
            if set(self.map.device_ids) <= self.members.keys():
                workers = self._addresses()
                used = [
                    self._ask(stage.actor.use_experts, self.map, workers, _SETTLE_S)
                    for stage in stages
                ]
                _results(stages, used, deadline_s)

    def forget(self, member: Member) -> None:
        """A stage is no more, and may have left its socket behind. Waits for nobody."""
        address = self._callers.pop(member, None)
        if address is not None:
            wire.remove_socket(address)

    def lose(self, worker: Member) -> None:
        """A worker is no more: rows for its experts wait for another map, and fail at once."""
        with self._turn:
            if self.members.get(str(worker.key)) is worker:
                del self.members[str(worker.key)]
            for stage in list(self._callers):
                self._ask(stage.actor.lose_experts, [address_of(worker)])
            # Others of its node may hang as well, and are waited for by nobody here.
            self._tell_connections()
        end_for_certain(worker)

    def use(
        self,
        made: ExpertMap,
        timeout_s: float,
        look: Callable[[], Loss | None],
        *,
        in_place: bool = False,
    ) -> None:
        """Bring a map into force, which is then so for every living stage.

        `look` says whether some worker is known to be lost, for which it would wait in vain. In
        place, devices give up what only maps before need, for room (see `ExpertHost.prepare`).

        Raises:
            FleetError: A device of it is gone or cannot hold what it names; the map in force stays
                (in place: it does not serve any more).
        """
        with self._turn:
            deadline_s = time.monotonic() + timeout_s
            self._prepare(made, deadline_s, look, in_place=in_place)
            self.map = made
            self._unsettled = list(self._callers)
            self.retire(_SETTLE_S)

    def retire(self, settle_s: float = 0.0) -> None:
        """Have devices forget maps before that in force, once no step goes on by one."""
        with self._turn:
            if not self._unsettled:
                return
            stages, workers = self._unsettled, self._addresses()
            calls = [
                self._ask(stage.actor.use_experts, self.map, workers, settle_s) for stage in stages
            ]
            self._unsettled = [
                stage
                for stage, call in zip(stages, calls, strict=True)
                if stage in self._callers and not self._has_settled(stage, call, settle_s)
            ]
            if not self._unsettled:
                present = [self.members[d] for d in self.map.device_ids if d in self.members]
                swaps = [worker.actor.swap.remote(self.map.version) for worker in present]
                ray.wait(swaps, num_returns=len(swaps), timeout=_CALL_TIMEOUT_S)

    def _has_settled(self, stage: Member, call: Any, settle_s: float) -> bool:
        try:
            return bool(ray.get(call, timeout=settle_s + _CALL_TIMEOUT_S))
        except GetTimeoutError:
            _log.warning("expert map %d: %s does not answer", self.map.version, stage.name)
            return False
        except RayError as error:
            # It is lost; whoever comes in its place begins with this map.
            _log.warning("expert map %d: %s: %s", self.map.version, stage.name, cause_of(error))
            return True

    def fetch(self, device_id: str, layer: int, expert: int, share: float) -> Any:
        """Have a device load an expert for a map to come, or this share of it; `layer` is the
        map's. Returns the call.

        Raises:
            FleetError: The device is gone.
        """
        actor = self._member(device_id).actor
        return actor.fetch.remote(self.spec.layers[layer], expert, share)

    def release(self, device_id: str, layer: int, expert: int) -> None:
        """Have a device let go of an expert that no map needs; a lost one has already."""
        worker = self.members.get(device_id)
        if worker is not None:
            call = worker.actor.release.remote(self.spec.layers[layer], expert)
            ray.wait([call], timeout=_CALL_TIMEOUT_S)

    def loads(self, holders: Mapping[str, int]) -> dict[int, dict[Phase, LoadSummary]]:
        """Return what stages have counted, by what `holders` says of their devices."""
        stages = self._stages(holders)
        calls = [self._ask(stage.actor.expert_loads) for stage in stages.values()]
        results = _results(list(stages.values()), calls, time.monotonic() + _CALL_TIMEOUT_S)
        return dict(zip(stages, results, strict=True))

    def steps(self, holders: Mapping[str, int]) -> dict[int, Steps]:
        """Return the rows of each step since the last time, as `loads` does."""
        stages = self._stages(holders)
        calls = [self._ask(stage.actor.expert_steps) for stage in stages.values()]
        results = _results(list(stages.values()), calls, time.monotonic() + _CALL_TIMEOUT_S)
        return dict(zip(stages, results, strict=True))

    def _ask(self, method: Any, *arguments: Any) -> Any:
        """Call a method of one who uses the experts; returns the call."""
        return method.options(**self._options).remote(*arguments)

    def _stages(self, holders: Mapping[str, int]) -> dict[int, Member]:
        return {holders[str(s.key)]: s for s in list(self._callers) if str(s.key) in holders}

    def _prepare(
        self,
        made: ExpertMap,
        deadline_s: float,
        look: Callable[[], Loss | None],
        *,
        in_place: bool,
    ) -> None:
        workers = [self._member(device_id) for device_id in made.device_ids]
        calls = [
            worker.actor.prepare.remote(
                made.version,
                held_by(made, self.spec.layers, str(worker.key)),
                in_place=in_place,
            )
            for worker in workers
        ]
        try:
            _results(workers, calls, deadline_s, look)
        except FleetError:
            for worker in workers:
                worker.actor.forget.remote(made.version)
            raise

    def _connect(self) -> None:
        """Tell every worker who calls it and who else is on its node, and wait until they know."""
        deadline_s = time.monotonic() + _CALL_TIMEOUT_S
        for worker, call in self._tell_connections():
            try:
                _results([worker], [call], deadline_s)
            except FleetError as error:
                _log.warning("%s", error)  # it is found by the watch

    def _tell_connections(self) -> list[tuple[Member, Any]]:
        workers = list(self.members.values())
        callers = list(self._callers.values())
        calls = []
        for worker in workers:
            node = self.spec.devices[str(worker.key)].node
            siblings = {
                str(other.key): address_of(other)
                for other in workers
                if other is not worker and self.spec.devices[str(other.key)].node == node
            }
            calls.append((worker, worker.actor.connect.remote(callers, siblings)))
        return calls

    def _addresses(self) -> dict[str, wire.Address]:
        return {device_id: address_of(worker) for device_id, worker in self.members.items()}

    def _member(self, device_id: str) -> Member:
        if device_id not in self.members:
            raise FleetError(f"the experts on {device_id} are gone")
        return self.members[device_id]


def _results(
    members: Sequence[Member],
    calls: Sequence[Any],
    deadline_s: float,
    look: Callable[[], Loss | None] = lambda: None,
) -> list[Any]:
    """Return the results of a call to each member; given up when `look` tells of a loss.

    Raises:
        MemberLostError: One of them is no more.
        FleetError: A call failed, or had no answer in time.
    """
    results = []
    for member, call in zip(members, calls, strict=True):
        while not ray.wait([call], timeout=_LOOK_EVERY_S)[0] and time.monotonic() < deadline_s:
            if (loss := look()) is not None:
                raise MemberLostError(loss.member, loss.reason)
        try:
            results.append(ray.get(call, timeout=0))
        except RayActorError as error:
            raise MemberLostError(member, f"{member.name}: {cause_of(error)}") from error
        except GetTimeoutError:
            raise FleetError(f"{member.name} did not answer in time") from None
        except RayError as error:
            raise FleetError(f"{member.name}: {cause_of(error)}") from error
    return results
