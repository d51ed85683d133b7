"""The slots of a run: planned at the start, and again when devices come, go or change speed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from cluster.config import MotleyConfig
from cluster.forecast import plan_slots, training_forecast
from placement.pooling.slot_prices import SlotPrices
from placement.topology import Topology
from placement.train import TrainPlan
from placement.training import TrainingCosts
from placement.workload import ModelProfile


@dataclass(frozen=True)
class RunPlan:
    """A plan with the costs that it was made from."""

    plan: TrainPlan
    costs: TrainingCosts

    @property
    def device_ids(self) -> frozenset[str]:
        """Devices that the plan knows."""
        return frozenset(self.costs.device_ids)

    @cached_property
    def declared_s(self) -> dict[tuple[int, str], tuple[float, float]]:
        """Per (slot, device): planned seconds of a micro-batch, and of what needs no gradient."""
        prices = SlotPrices(self.costs)
        schedule = self.plan.schedule(self.costs)
        return {
            (index, self.costs.device_ids[device]): (option.total_s, option.lead_s)
            for index, (slot, grain) in enumerate(
                zip(schedule.slots, schedule.grain_list, strict=True)
            )
            for device in range(self.costs.num_devices)
            for option in (prices.option(slot, grain, device),)
        }


class RunPlanner:
    """Plans for the devices that are there."""

    def __init__(self, config: MotleyConfig, profile: ModelProfile, topology: Topology) -> None:
        self._config = config
        forecast = training_forecast(config, profile, topology)
        self.first = RunPlan(forecast.plan, forecast.costs)

    def again(self, device_ids: Collection[str], factors: Mapping[str, float]) -> RunPlan:
        """Plan for some of the devices, slower than declared by the given factors.

        Raises:
            InfeasiblePlanError: Some layer fits none of them.
        """
        every = self.first.costs
        order = [i for i, device_id in enumerate(every.device_ids) if device_id in device_ids]
        costs = every.in_order(order).slowed(factors)
        plan = plan_slots(self._config.training, costs)
        return RunPlan(plan, costs)
