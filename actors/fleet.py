"""A plan turned into placed actors: the one place where resources, nodes and restarts are chosen.

`deploy` starts every stage and lane on its node, waits until all are ready, and connects them. The
driver's inbox hears loading progress meanwhile. Nothing is left behind when it fails.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from placement.stages import StagesPlan
from placement.topology import Device
from placement.workload import ModelProfile

_log = logging.getLogger(__name__)
_STOP_TIMEOUT_S = 10.0


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
    """All that `deploy` needs besides the plan's own numbers."""

    plan: StagesPlan
    devices: Mapping[str, Device]
    hosts: Mapping[str, Host]
    """By the node names that the plan uses."""
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


class Fleet:
    """The running actors of one plan."""

    def __init__(self, stages: Sequence[Any], lanes: Sequence[Any]) -> None:
        self.stages = tuple(stages)
        self.lanes = tuple(lanes)
        self.lane_addresses: tuple[wire.Address, ...] = ()
        self._stage_addresses: tuple[wire.Address, ...] = ()
        self._watches: dict[Any, str] = {}

    def lost(self, timeout_s: float) -> str | None:
        """Wait up to `timeout_s` for an actor to die; returns which one and why."""
        if not self._watches:
            time.sleep(timeout_s)
            return None
        done, _ = ray.wait(list(self._watches), timeout=timeout_s)
        for reference in done:
            name = self._watches.pop(reference, None)
            if name is None:  # stopped meanwhile
                return None
            try:
                ray.get(reference)
            except RayTaskError as error:
                return f"{name} is lost: {_cause(error)}"
            except RayError as error:
                return f"{name} is lost: {_first_line(error)}"
        return None

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
        calls = [stage.load_adapter.remote(version, message, keep) for stage in self.stages]
        late = f"had not loaded the adapter within {timeout_s:g} s; raise ray.start_timeout_s"
        _wait("stage", calls, time.monotonic() + timeout_s, late)

    def stop(self) -> None:
        """Stop every actor: politely first, then for certain."""
        actors = (*self.lanes, *self.stages)
        self._watches.clear()
        stops = [actor.stop.remote() for actor in actors]
        ray.wait(stops, num_returns=len(stops), timeout=_STOP_TIMEOUT_S)
        for actor in actors:
            ray.kill(actor)
        for address in (*self._stage_addresses, *self.lane_addresses):
            remove_folder(address)

    def connect(self, deadline_s: float) -> None:
        """Wait until all are ready, then connect lane to stage to stage to lane.

        Raises:
            FleetError: An actor failed to start, or the deadline passed.
        """
        stages = self._stage_addresses = tuple(_gather("stage", self.stages, "ready", deadline_s))
        self.lane_addresses = tuple(_gather("lane", self.lanes, "ready", deadline_s))
        by_index = dict(enumerate(self.lane_addresses))
        calls = [
            stage.connect.remote(following, by_index)
            for stage, following in zip(self.stages, [*stages[1:], None], strict=True)
        ]
        _wait("stage", calls, deadline_s)
        _wait("lane", [lane.connect.remote(stages[0]) for lane in self.lanes], deadline_s)
        for kind, actors in (("stage", self.stages), ("lane", self.lanes)):
            for index, actor in enumerate(actors):
                self._watches[actor.watch.remote()] = f"{kind} {index}"


def deploy(spec: FleetSpec, *, timeout_s: float) -> Fleet:
    """Start the plan's actors and connect them.

    Raises:
        FleetError: An actor failed (its own error is quoted) or was not ready in time.
    """
    deadline_s = time.monotonic() + timeout_s
    stages = [_start_stage(spec, index) for index in range(len(spec.plan.stages))]
    lanes = [_start_lane(spec, index) for index in range(spec.num_lanes)]
    fleet = Fleet(stages, lanes)
    try:
        fleet.connect(deadline_s)
    except FleetError:
        fleet.stop()
        raise
    return fleet


def _start_stage(spec: FleetSpec, index: int) -> Any:
    placed = spec.plan.stages[index]
    device = spec.devices[placed.device_id]
    host = spec.hosts[placed.node]
    stage = StageSpec(
        index=index,
        model=spec.model,
        first_layer=placed.first_layer,
        end_layer=placed.end_layer,
        device=device,
        profile=spec.profile,
        num_kv_blocks=spec.limits.num_blocks,
        num_lanes=spec.num_lanes,
        engine=spec.engine,
        epoch=spec.plan.epoch,
        host=host.address,
    )
    options = _options(host, num_gpus=1 if device.kind == "cuda" else 0)
    return StageActor.options(**options).remote(stage, spec.keys, spec.monitor)


def _start_lane(spec: FleetSpec, index: int) -> Any:
    host = spec.hosts[spec.lane_node]
    lane = LaneSpec(
        index=index,
        limits=spec.limits,
        step_timeout_s=spec.engine.step_timeout_s,
        epoch=spec.plan.epoch,
        host=host.address,
    )
    options = _options(host, num_gpus=0)
    return DecodeActor.options(**options).remote(lane, spec.tokenizer_json, spec.keys, spec.monitor)


def _options(host: Host, *, num_gpus: int) -> dict[str, Any]:
    """Pin to the planned node. The plan has already shared out the CPUs, so Ray counts none."""
    affinity = NodeAffinitySchedulingStrategy(node_id=host.ray_node_id, soft=False)
    return {
        "num_cpus": 0,
        "num_gpus": num_gpus,
        "max_restarts": 0,
        # watch() holds one thread for as long as the actor lives.
        "max_concurrency": 3,
        "scheduling_strategy": affinity,
    }


def remove_folder(address: wire.Address) -> None:
    """Remove the socket folder of an actor of this machine that could not do so itself."""
    if address.machine == wire.machine_id():
        folder = Path(address.ipc.removeprefix("ipc://")).parent
        shutil.rmtree(folder, ignore_errors=True)


def _gather(kind: str, actors: Sequence[Any], method: str, deadline_s: float) -> list[Any]:
    return _wait(kind, [getattr(actor, method).remote() for actor in actors], deadline_s)


_NOT_READY = "was not ready in time; raise ray.start_timeout_s, or see `motley doctor`"


def _wait(
    kind: str, references: Sequence[Any], deadline_s: float, late: str = _NOT_READY
) -> list[Any]:
    """Return the results; the first failure is raised at once, naming its actor."""
    pending = {reference: index for index, reference in enumerate(references)}
    while pending:
        left_s = max(0.0, deadline_s - time.monotonic())
        done, _ = ray.wait(list(pending), num_returns=1, timeout=left_s)
        if not done:
            raise FleetError(f"{kind} {min(pending.values())} {late}")
        for reference in done:
            index = pending.pop(reference)
            try:
                ray.get(reference)
            except (RayError, GetTimeoutError) as error:
                raise FleetError(f"{kind} {index}: {_cause(error)}") from error
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
