"""A training plan: the slots of a round, who may run them, and what they are predicted to take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from placement.training import (
    Dispatch,
    RecomputeGrain,
    Slot,
    SlotKind,
    SlotSchedule,
    TrainingCosts,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSlot:
    """One visit per round, on one of the devices that have the memory for it."""

    index: int
    kind: SlotKind
    first_layer: int
    end_layer: int
    """The fused slot also runs the head; it holds nothing else where this equals `first_layer`."""
    grain: RecomputeGrain
    weight_bytes: int
    resident_bytes: int
    """Weights, gradients and one micro-batch's activations while it runs. The next slot's weights
    and what is kept come on top."""
    device_ids: tuple[str, ...]
    micro_batch_s: tuple[float, ...]
    """Per entry of `device_ids`."""
    kept_with: int | None = None
    """The slot of the same round that runs on the same device, because activations stay there: of a
    forward slot the backward slot that uses them (grain "keep"), and the other way round."""
    kept_bytes: int = 0
    """Of such a forward slot: all micro-batches' activations, and the weights, which stay too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceShare:
    """What one device is predicted to do."""

    device_id: str
    node: str
    busy_s: float
    """Per round, on average."""
    busy_fraction: float
    peak_bytes: int
    """Its largest slot beside the heaviest weights it may be sent meanwhile, and what it keeps."""
    memory_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainPlan:
    """The slots of a round, who may run them, what a round should cost and how good it could be."""

    epoch: int = 0
    micro_batches: int
    rounds_per_step: int | None
    synchronous: bool
    dispatch: Dispatch
    slots: tuple[PlannedSlot, ...]
    devices: tuple[DeviceShare, ...]
    """In order of id, those left out included."""
    seconds_per_round: float
    """In the steady state; when synchronous, of a whole step over its rounds."""
    idle_fraction: float
    """Share of the aggregate speed of all devices that could hold a layer, in work or not."""
    lower_bound_s: float
    """No dispatch and no other cut with the same fused stage and the same layers kept has shorter
    rounds on the devices that could hold a layer: the work over the aggregate speed (see
    `plan_train`)."""
    rounds_in_flight: int
    """Most rounds begun and not done at once; sizes the boundary activations in host memory."""
    left_out: tuple[tuple[str, str], ...]
    """(device id, why it is predicted to run nothing)."""

    @property
    def gap(self) -> float:
        """By what share the rounds are longer than the lower bound."""
        return self.seconds_per_round / self.lower_bound_s - 1.0

    def schedule(self, costs: TrainingCosts) -> SlotSchedule:
        """Return the plan as input for the simulator.

        Raises:
            ValueError: `costs` lacks a device of the plan.
        """
        missing = {share.device_id for share in self.devices} - set(costs.device_ids)
        if missing:
            raise ValueError(f"the costs lack the plan's devices {sorted(missing)}")
        index = {device_id: position for position, device_id in enumerate(costs.device_ids)}
        return SlotSchedule(
            slots=tuple(
                Slot(kind=slot.kind, first_layer=slot.first_layer, end_layer=slot.end_layer)
                for slot in self.slots
            ),
            micro_batches=self.micro_batches,
            dispatch=self.dispatch,
            grains=tuple(slot.grain for slot in self.slots),
            devices=tuple(
                tuple(sorted(index[device_id] for device_id in slot.device_ids))
                for slot in self.slots
            ),
            rounds_per_step=self.rounds_per_step,
            staleness=0 if self.synchronous else 1,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        value = asdict(self)
        value["slots"] = [
            asdict(slot)
            | {"device_ids": list(slot.device_ids), "micro_batch_s": list(slot.micro_batch_s)}
            for slot in self.slots
        ]
        value["devices"] = [asdict(share) for share in self.devices]
        value["left_out"] = [list(pair) for pair in self.left_out]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainPlan:
        """Rebuild a plan from the values of `to_json`."""
        fields = dict(value)
        fields["slots"] = tuple(
            PlannedSlot(
                **slot
                | {
                    "device_ids": tuple(slot["device_ids"]),
                    "micro_batch_s": tuple(slot["micro_batch_s"]),
                }
            )
            for slot in value["slots"]
        )
        fields["devices"] = tuple(DeviceShare(**share) for share in value["devices"])
        fields["left_out"] = tuple((pair[0], pair[1]) for pair in value["left_out"])
        return cls(**fields)
