"""Everything that `motley plan` predicts of one deployment, in one value; nothing is started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.config import MotleyConfig
from cluster.planning import (
    best_single_device_plan,
    dtype_bytes,
    make_shards,
    plan_serving,
    serving_workload,
    settings_errors,
    verdict,
)
from cluster.training_settings import TrainingSettings
from placement.decode import DecodePlan, plan_decode
from placement.errors import InfeasiblePlanError
from placement.front import StageFront, plan_front
from placement.shards import ShardsPlan
from placement.simulate import simulate_slots
from placement.stages import StagesPlan
from placement.topology import Topology
from placement.trace import Event
from placement.train import TrainPlan, plan_cut, plan_train
from placement.training import TrainingCosts, slots_from_counts
from placement.training_costs import training_costs
from placement.workload import ModelProfile, TrainingWorkload

HAND_OFF_S = 0.003
"""What it takes to stream one result of a micro-batch through Ray to the next device, besides its
bytes: two streamed items and a call (measured between two actors of one node)."""
_TRACED_ROUNDS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """The plan, what else there was to choose from, and what a variation of it would do."""

    plan: StagesPlan
    alone: StagesPlan | None
    """The best plan on a single device; None: no device holds the model."""
    verdict: str
    front: StageFront
    lanes: DecodePlan
    """How the plan's stages are best kept busy by as many sequences."""
    shards: ShardsPlan | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "plan": self.plan.to_json(),
            "alone": None if self.alone is None else self.alone.to_json(),
            "verdict": self.verdict,
            "front": self.front.to_json(),
            "lanes": self.lanes.to_json(),
            "shards": None if self.shards is None else self.shards.to_json(),
        }


def forecast(
    config: MotleyConfig,
    profile: ModelProfile,
    topology: Topology,
    *,
    shard_experts: bool = False,
) -> Forecast:
    """Predict a serving deployment.

    Raises:
        ConfigError: The settings do not suit the model or the devices.
        InfeasiblePlanError: Nothing fits.
    """
    served = plan_serving(config, profile, topology)
    plan = served.stages
    alone = best_single_device_plan(config, profile, topology)
    settings = config.plan
    forced = settings.layer_counts is not None
    with settings_errors():
        front = plan_front(
            served.profile,
            served.topology,
            workload=serving_workload(config),
            headroom_fraction=settings.headroom_fraction,
            device_order="given" if forced else settings.device_order,
        )
        lanes = plan_decode(
            served.profile,
            served.topology,
            plan,
            sequences=settings.lanes * settings.sequences_per_lane,
            context_tokens_per_sequence=settings.context_tokens,
            block_tokens=config.engine.kv_block_tokens,
            headroom_fraction=settings.headroom_fraction,
            step_tokens=config.engine.max_step_tokens,
        )
    shards = served.shards
    if shards is None and shard_experts:
        shards = make_shards(config, profile, topology)
    return Forecast(
        plan=plan,
        alone=alone,
        verdict=verdict(served, alone),
        front=front,
        lanes=lanes,
        shards=shards,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingForecast:
    """A training plan with the costs that it was made from."""

    plan: TrainPlan
    costs: TrainingCosts

    def events(self) -> list[Event]:
        """Return what every device does over a few rounds, from an empty pool on."""
        schedule = self.plan.schedule(self.costs)
        return list(simulate_slots(self.costs, schedule, rounds=_TRACED_ROUNDS).events)

    def nodes(self) -> dict[str, str]:
        """Return the node of every device."""
        return dict(zip(self.costs.device_ids, self.costs.nodes, strict=True))


def training_forecast(
    config: MotleyConfig, profile: ModelProfile, topology: Topology
) -> TrainingForecast:
    """Predict a round of fine-tuning over the devices as one pool.

    Raises:
        ConfigError: The settings do not suit the model or the devices.
        InfeasiblePlanError: A layer fits no device, or two nodes cannot reach each other.
    """
    load = config.training
    with settings_errors(), _of_training():
        costs = training_costs(
            profile,
            topology,
            TrainingWorkload(
                micro_batches=load.micro_batches,
                sequences_per_micro_batch=load.sequences_per_micro_batch,
                sequence_tokens=load.sequence_tokens,
                trained_fraction=load.trained_fraction,
            ),
            weight_dtype_bytes=dtype_bytes(
                config.engine, [device.kind for device in topology.devices]
            ),
            headroom_fraction=config.plan.headroom_fraction,
            hand_off_s=HAND_OFF_S,
        )
        plan = plan_slots(config.training, costs)
    return TrainingForecast(plan=plan, costs=costs)


def plan_slots(load: TrainingSettings, costs: TrainingCosts) -> TrainPlan:
    """Plan a round's slots, or price the ones that the settings force."""
    synchronous = not load.optimizer.asynchronous
    cut = load.cut
    if cut is None:
        return plan_train(
            costs,
            micro_batches=load.micro_batches,
            rounds_per_step=load.rounds_per_step,
            synchronous=synchronous,
        )
    return plan_cut(
        costs,
        slots_from_counts(cut.forward, cut.fused, cut.backward),
        micro_batches=load.micro_batches,
        rounds_per_step=load.rounds_per_step,
        synchronous=synchronous,
        grain=cut.grain,
    )


@contextmanager
def _of_training() -> Iterator[None]:
    """Say that it is training which cannot be planned; serving may well be."""
    try:
        yield
    except InfeasiblePlanError as error:
        raise InfeasiblePlanError(f"training: {error}") from error
