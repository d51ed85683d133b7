"""The pool's device actors: started on their nodes, and started again when they die."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.expert_crew import GPU_SHARE
from actors.hosting import Host
from actors.pool_values import PoolDeviceSpec
from actors.trainer import DeviceActor, ExpertPlace
from cluster.training.errors import TrainingError
from placement.topology import Device

_log = logging.getLogger(__name__)
_START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class StartedDevice:
    spec: PoolDeviceSpec
    actor: Any


PlaceOf = Callable[[Device], ExpertPlace | None]
"""How a device reaches experts that are elsewhere; None: they are in their layers."""


async def start_devices(
    specs: Sequence[PoolDeviceSpec], hosts: Mapping[str, Host], place_of: PlaceOf
) -> list[StartedDevice]:
    """Start all devices at once; leaves none behind when one fails.

    Raises:
        TrainingError: A device could not be started.
    """
    started = [StartedDevice(spec, _start(spec, hosts, place_of)) for spec in specs]
    results = await asyncio.gather(*map(_ready, started), return_exceptions=True)
    for device, result in zip(started, results, strict=True):
        if isinstance(result, BaseException):
            stop_devices(started)
            raise TrainingError(
                f"device {device.spec.device.id} on {device.spec.device.node} did not start: "
                f"{_last_line(result)}"
            ) from result
    return started


async def start_again(
    spec: PoolDeviceSpec, hosts: Mapping[str, Host], place_of: PlaceOf
) -> StartedDevice | None:
    """Start a device that was lost; None: its node is gone, or it does not come up."""
    if spec.device.node not in hosts:
        return None
    device = StartedDevice(spec, _start(spec, hosts, place_of))
    try:
        await _ready(device)
    except (RayError, TimeoutError) as error:
        _log.warning("device %s does not come back: %s", spec.device.id, _last_line(error))
        stop_devices([device])
        return None
    return device


def stop_devices(devices: Sequence[StartedDevice]) -> None:
    for device in devices:
        ray.kill(device.actor)


def _start(spec: PoolDeviceSpec, hosts: Mapping[str, Host], place_of: PlaceOf) -> Any:
    affinity = NodeAffinitySchedulingStrategy(
        node_id=hosts[spec.device.node].ray_node_id, soft=False
    )
    place = place_of(spec.device)
    gpu_share = 1.0 if place is None else GPU_SHARE
    return DeviceActor.options(
        num_cpus=0,
        num_gpus=gpu_share if spec.device.kind == "cuda" else 0,
        max_restarts=0,
        scheduling_strategy=affinity,
    ).remote(spec, place)


async def _ready(device: StartedDevice) -> None:
    await asyncio.wait_for(device.actor.ready.remote(), _START_TIMEOUT_S)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
