"""Where actors of a deployment run, how they are started there, and how they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import wire
from actors.losses import Member

_STOP_TIMEOUT_S = 10.0
_LAST_WORDS_S = 1.0


class FleetError(RuntimeError):
    """The plan could not be turned into running actors."""


class MemberLostError(FleetError):
    """Because one of them is no more."""

    def __init__(self, member: Member, reason: str) -> None:
        super().__init__(reason)
        self.member = member


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A Ray node as the fleet uses it."""

    ray_node_id: str
    address: str
    """The interface that other nodes reach; loopback when there are no others."""


def actor_options(host: Host, *, num_gpus: float) -> dict[str, Any]:
    """Pin to the planned node. The plan has already shared out the CPUs, so Ray counts none."""
    affinity = NodeAffinitySchedulingStrategy(node_id=host.ray_node_id, soft=False)
    return {
        "num_cpus": 0,
        "num_gpus": num_gpus,
        "max_restarts": 0,
        # watch() holds one thread for as long as the actor lives; loading, KV, pings take more, and
        # a ping that found none would look like a hang.
        "max_concurrency": 16,
        "scheduling_strategy": affinity,
    }


def address_of(member: Member) -> wire.Address:
    assert member.address is not None, "members of a fleet are ready"
    return member.address


def end_politely(members: Sequence[Member]) -> None:
    """Stop actors so that they clean up behind them, as far as they do in time."""
    stops = [member.actor.stop.remote() for member in members]
    if stops:
        ray.wait(stops, num_returns=len(stops), timeout=_STOP_TIMEOUT_S)


def end_for_certain(member: Member) -> None:
    """Kill an actor, which may be gone already, and remove what it may leave behind."""
    if member.address is None:  # nobody knows its socket but itself
        ray.wait([member.actor.stop.remote()], timeout=_LAST_WORDS_S)
    ray.kill(member.actor)
    if member.address is not None:
        wire.remove_socket(member.address)
