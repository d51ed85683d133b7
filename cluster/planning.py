"""Settings and a model profile to a plan; shared by `motley plan` and by the launcher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from actors.engine.config import EngineConfig
from cluster.config import ConfigError, DeviceSpec, MotleyConfig
from placement.shards import (
    ExpertShards,
    ShardsPlan,
    plan_shards,
    plan_training_shards,
    topology_of_stages,
    without_experts,
)
from placement.stages import StagesPlan, best_single, plan_stages, split_verdict
from placement.topology import Device, DeviceKind, Link, LinkRate, Topology
from placement.workload import ModelProfile, ServingWorkload


def declared_device(spec: DeviceSpec) -> Device:
    """Return the device as declared.

    Raises:
        ConfigError: Some figure is left to be measured.
    """
    if spec.flops_per_s is None or spec.memory_bytes_per_s is None or spec.memory_bytes is None:
        raise ConfigError(
            f"device {spec.id} declares no {', '.join(spec.missing_figures)}: they are measured at "
            f"`motley up`. Run `motley profile`, or declare them, to plan before"
        )
    return Device(
        id=spec.id,
        node=spec.node,
        kind=spec.kind,
        flops_per_s=spec.flops_per_s,
        memory_bytes_per_s=spec.memory_bytes_per_s,
        memory_bytes=spec.memory_bytes,
        active_power_w=spec.active_power_w,
        host_bytes_per_s=spec.host_bytes_per_s,
    )


def declared_devices(config: MotleyConfig) -> tuple[Device, ...]:
    """Return the devices of a configuration that declares every figure.

    Raises:
        ConfigError: No devices, or devices with figures left to be measured (all are named).
    """
    if config.devices is None:
        raise ConfigError(
            "devices is not set: they are found and measured at `motley up`. Run `motley profile`, "
            "or declare devices with flops_per_s, memory_bytes_per_s and memory_bytes, to plan "
            "before"
        )
    unmeasured = [spec.id for spec in config.devices if spec.missing_figures]
    if unmeasured:
        raise ConfigError(
            f"devices {', '.join(unmeasured)} have no figures: they are measured at `motley up`. "
            f"Run `motley profile` with these settings, or declare flops_per_s, memory_bytes_per_s "
            f"and memory_bytes, to plan before"
        )
    return tuple(declared_device(spec) for spec in config.devices)


def declared_topology(config: MotleyConfig) -> Topology:
    """Return the declared devices with the declared links; raises like `declared_devices`."""
    return topology_of(config, declared_devices(config))


def topology_of(config: MotleyConfig, devices: Sequence[Device]) -> Topology:
    """Join devices (declared or measured) with the declared links."""
    links = tuple(
        Link(
            source_node=link.source_node,
            target_node=link.target_node,
            bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
            latency_s=link.latency_s,
        )
        for link in config.links
    )
    default = config.default_link
    return Topology(
        devices=tuple(devices),
        links=links,
        default_link=None
        if default is None
        else LinkRate(
            bandwidth_bytes_per_s=default.bandwidth_bytes_per_s, latency_s=default.latency_s
        ),
    )


def serving_workload(config: MotleyConfig) -> ServingWorkload:
    """Return the load to plan for; KV is reserved in whole blocks."""
    engine, plan = config.engine, config.plan
    if engine.num_kv_blocks is not None:
        blocks_per_lane = engine.num_kv_blocks
    else:
        blocks_per_sequence = -(-plan.context_tokens // engine.kv_block_tokens)
        blocks_per_lane = plan.sequences_per_lane * blocks_per_sequence
    return ServingWorkload(
        lanes=plan.lanes,
        sequences_per_lane=plan.sequences_per_lane,
        context_tokens_per_sequence=plan.context_tokens,
        kv_tokens=plan.most_lanes * blocks_per_lane * engine.kv_block_tokens,
        step_tokens=engine.max_step_tokens,
    )


def dtype_bytes(engine: EngineConfig, kinds: Iterable[DeviceKind]) -> int:
    """Return the bytes of one weight; "auto" is 2 only when every device is CUDA."""
    if engine.dtype == "auto":
        return 2 if set(kinds) == {"cuda"} else 4
    return 4 if engine.dtype == "float32" else 2


def make_plan(config: MotleyConfig, profile: ModelProfile, topology: Topology) -> StagesPlan:
    """Plan the stages of `profile` over a topology.

    A forced cut keeps the devices' order, whatever `plan.device_order` says.

    Raises:
        ConfigError: The plan settings do not suit the model or the devices.
        InfeasiblePlanError: Nothing fits.
    """
    forced = config.plan.layer_counts is not None
    with settings_errors():
        return plan_stages(
            profile,
            topology,
            workload=serving_workload(config),
            headroom_fraction=config.plan.headroom_fraction,
            layer_counts=config.plan.layer_counts,
            objective=config.plan.objective,
            device_order="given" if forced else config.plan.device_order,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingPlan:
    """What is deployed, and the model and the devices as its stages see them."""

    stages: StagesPlan
    profile: ModelProfile
    topology: Topology
    shards: ShardsPlan | None
    """None: experts, if there are any, are where their layer is."""


def plan_serving(config: MotleyConfig, profile: ModelProfile, topology: Topology) -> ServingPlan:
    """Plan a deployment as `plan.experts` says.

    Raises:
        ConfigError: The plan settings do not suit the model or the devices.
        InfeasiblePlanError: Nothing fits.
    """
    if config.plan.experts == "stages":
        stages = make_plan(config, profile, topology)
        return ServingPlan(stages=stages, profile=profile, topology=topology, shards=None)
    shards = make_shards(config, profile, topology)
    kept = shards.kept_bytes(profile)
    # What a stage does not need is for experts, so lanes have the KV that was planned.
    most_kv_tokens = min(shards.stages.kv_tokens_capacity, serving_workload(config).kv_tokens)
    return ServingPlan(
        stages=replace(shards.stages, kv_tokens_capacity=most_kv_tokens),
        profile=without_experts(profile),
        topology=topology_of_stages(topology, kept, config.plan.headroom_fraction),
        shards=shards,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPool:
    """The model and the devices as slots of training see them, and where frozen experts are."""

    profile: ModelProfile
    topology: Topology
    shards: ExpertShards | None
    """None: experts, if there are any, come to a device with their layer."""


def training_pool(config: MotleyConfig, profile: ModelProfile, topology: Topology) -> TrainingPool:
    """Plan where experts are while the model trains, as `training.experts` says.

    Raises:
        ConfigError: The settings do not suit the model or the devices.
        InfeasiblePlanError: One copy of every expert does not fit.
    """
    load, settings = config.training, config.plan
    if load.experts == "layers":
        return TrainingPool(profile=profile, topology=topology, shards=None)
    check_one_gpu_a_node(topology, "training.experts: shards", "training.experts: layers")
    with settings_errors():
        shards = plan_training_shards(
            profile,
            topology,
            rows=load.sequences_per_micro_batch * load.sequence_tokens,
            headroom_fraction=settings.headroom_fraction,
            spare_slots=settings.spare_experts,
            guest_slots=settings.guest_experts,
            num_spread=settings.spread_experts,
        )
    kept = shards.kept_bytes(profile)
    return TrainingPool(
        profile=without_experts(profile),
        topology=topology_of_stages(topology, kept, settings.headroom_fraction),
        shards=shards,
    )


def verdict(served: ServingPlan, alone: StagesPlan | None) -> str:
    """Say in plain words what a plan is predicted to do, beside the best on a single device."""
    shards = served.shards
    if shards is None:
        return split_verdict(served.stages, alone)
    return (
        f"experts on {len(shards.experts.device_ids)} devices, the rest in "
        f"{len(served.stages.stages)} stages: {shards.predicted_tokens_per_s:.1f} tokens/s, "
        f"{shards.latency_s * 1e3:.2f} ms a step; "
        + (
            f"no device holds {served.stages.model} alone"
            if alone is None
            else f"{alone.stages[0].device_id} alone gives {alone.predicted_tokens_per_s:.1f} "
            f"tokens/s, {alone.latency_s * 1e3:.2f} ms a step"
        )
    )


def make_shards(config: MotleyConfig, profile: ModelProfile, topology: Topology) -> ShardsPlan:
    """Plan stages without their experts, and the experts over all devices.

    Raises:
        ConfigError: The model has no experts, or the settings do not suit it or the devices.
        InfeasiblePlanError: Nothing fits.
    """
    forced = config.plan.layer_counts is not None
    if config.plan.experts == "shards":
        check_one_gpu_a_node(topology, "plan.experts: shards", "plan.experts: stages")
    with settings_errors():
        return plan_shards(
            profile,
            topology,
            workload=serving_workload(config),
            headroom_fraction=config.plan.headroom_fraction,
            objective=config.plan.objective,
            layer_counts=config.plan.layer_counts,
            device_order="given" if forced else config.plan.device_order,
            spare_slots=config.plan.spare_experts,
            guest_slots=config.plan.guest_experts,
            num_spread=config.plan.spread_experts,
        )


def check_one_gpu_a_node(topology: Topology, setting: str, instead: str) -> None:
    """Refuse what a stage and a worker cannot share out; names the setting, and another.

    Raises:
        ConfigError: A node has several GPUs.
    """
    gpus = Counter(device.node for device in topology.devices if device.kind == "cuda")
    for node, count in gpus.items():
        if count > 1:
            raise ConfigError(
                f"{setting} takes one GPU a node so far, {node} has {count}; set {instead}, or "
                "name one device of each node in `devices`"
            )


@contextmanager
def settings_errors() -> Iterator[None]:
    """Turn a planner's refusal of its settings into a `ConfigError`."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"plan: {error}") from error


def best_single_device_plan(
    config: MotleyConfig, profile: ModelProfile, topology: Topology
) -> StagesPlan | None:
    """Return the best plan that keeps the whole model on one device; None: it fits none."""
    with settings_errors():
        return best_single(
            profile,
            topology,
            workload=serving_workload(config),
            headroom_fraction=config.plan.headroom_fraction,
            objective=config.plan.objective,
        )
