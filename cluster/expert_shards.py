"""From a plan of expert shards to what their workers and stages are started with."""

from __future__ import annotations

from collections.abc import Collection

from actors.engine.checkpoint import Checkpoint
from actors.engine.fingerprint import expert_fingerprint
from actors.expert_crew import CrewSpec
from actors.expert_links import Patience
from actors.stage_experts import ExpertAccess
from cluster.config import MotleyConfig
from placement.costs import expert_weight_bytes
from placement.sharding.decision import RebalanceSettings
from placement.sharding.expert_map import ExpertMap
from placement.sharding.reactive import ReactiveTerms
from placement.shards import ExpertShards
from placement.topology import Topology
from placement.workload import ModelProfile

_READ_BYTES_PER_S = 500e6
"""At which a device reads experts from its node's copy of the checkpoint: a common SSD."""
_LEAST_GUEST_ROWS = 128
"""Of an expert that is a guest for its rows: fewer make too small a difference."""
_REROUTE_FRACTION = 0.75
"""Of a step's time, for another map after a failure."""
_ASK_FOR_GUEST_S = 1e-3
"""From counting a layer's rows until a device begins to read a guest."""


def crew_spec(
    config: MotleyConfig,
    checkpoint: Checkpoint,
    profile: ModelProfile,
    topology: Topology,
    shards: ExpertShards,
    *,
    is_frozen: bool = False,
    longest_s: float,
) -> CrewSpec:
    """Return what expert workers are started with.

    Args:
        profile: Of the whole model.
        topology: The whole devices.
        is_frozen: Nobody wants the gradients of the weights.
        longest_s: For an answer, and for another map after a failure.
    """
    fingerprint = expert_fingerprint(checkpoint)
    made = ExpertMap.from_plan(shards.experts, shards.devices, checkpoint=fingerprint)
    nodes = {device.node for device in topology.devices}
    guests = guest_terms(config, profile, shards, nodes)
    return CrewSpec(
        model=str(checkpoint.path),
        profile=profile,
        engine=config.engine,
        devices={device.id: device for device in topology.devices},
        num_slots={device.id: shards.num_slots(device) for device in shards.devices},
        num_guests={device.id: shards.num_guests(device) for device in shards.devices},
        layers=shards.expert_layers,
        map=made,
        access={
            node: ExpertAccess(
                fingerprint=fingerprint,
                layers=shards.expert_layers,
                num_experts=made.num_experts,
                node=node,
                latency_s=_latencies_s(topology, node, nodes - {node}),
                guests=guests,
                # The reason is told before whoever asked for the step gives it up.
                patience=Patience(answer_s=longest_s, reroute_s=_REROUTE_FRACTION * longest_s),
                is_frozen=is_frozen,
                is_recorded=bool(config.controller.expert_trace_steps) and not is_frozen,
            )
            for node in nodes
        },
    )


def guest_terms(
    config: MotleyConfig, profile: ModelProfile, shards: ExpertShards, nodes: Collection[str]
) -> ReactiveTerms | None:
    """Return when experts may be guests of a device; None: never."""
    if not config.plan.guest_experts:
        return None
    copy_s = _expert_bytes(profile, shards) / _READ_BYTES_PER_S
    return ReactiveTerms(
        num_buffers=config.plan.guest_experts,
        least_rows=_LEAST_GUEST_ROWS,
        copy_s=dict.fromkeys(nodes, copy_s),
        plan_s=_ASK_FOR_GUEST_S,
    )


def rebalance_settings(
    config: MotleyConfig, profile: ModelProfile, shards: ExpertShards
) -> RebalanceSettings:
    """Return when experts move, and how fast; `profile` of the whole model."""
    return RebalanceSettings(
        expert_bytes=_expert_bytes(profile, shards),
        copy_bytes_per_s=_READ_BYTES_PER_S,
        step_budget_bytes=config.controller.expert_step_bytes,
        staging_slots=config.plan.spare_experts,
        num_spread=config.plan.spread_experts,
        objective="activated" if shards.experts.objective == "activated" else "rows",
    )


def _expert_bytes(profile: ModelProfile, shards: ExpertShards) -> int:
    return expert_weight_bytes(profile.layers[shards.expert_layers[0]])


def _latencies_s(topology: Topology, node: str, others: set[str]) -> dict[str, float]:
    """Return a message there and back, by node; one that is not reached holds no experts."""
    rates = {other: (topology.rate(node, other), topology.rate(other, node)) for other in others}
    return {
        other: there.latency_s + back.latency_s
        for other, (there, back) in rates.items()
        if there is not None and back is not None
    }
