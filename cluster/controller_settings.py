"""The `controller` section of the settings: when layers move, and who counts as lost."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from cluster.quantities import parse_bytes
from placement.steering.settings import ControllerSettings
from placement.workload import DeviceOrder, Objective

ByteCount = Annotated[int, BeforeValidator(parse_bytes)]
_MOVE_GRACE_S = 120.0
"""Beyond the time for loading: to change over, or to find out that it cannot be done."""


class ControllerConfig(BaseModel):
    """How the deployment is kept at its best while it serves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rebalance: bool = True
    """Move layers when devices slow down, or come; false: only when something is lost."""
    window_s: float = Field(2.0, gt=0, le=600)
    """Seconds of one measurement."""
    min_gain_fraction: float = Field(0.1, ge=0.01, le=10)
    """Gain that a move must promise, in `confirm_windows` windows one after another."""
    confirm_windows: int = Field(2, ge=1, le=1000)
    cool_down_s: float = Field(10.0, gt=0, le=86400)
    """Between two moves for gain."""
    keep_fraction: float = Field(0.95, ge=0, le=1)
    """A move is taken back when tokens/s after it are below this share of those before."""
    expert_step_bytes: ByteCount = Field(4 * 2**20, ge=1)
    """Of sharded experts that move: read per step, all devices together."""
    expert_trace_steps: int = Field(0, ge=0, le=10**6)
    """Of sharded experts: how many steps of each phase to record for `motley bench experts`."""
    half_step: bool = False
    """Where one slowed device is all the evidence, move half the way first."""
    link_probe_every_s: float = Field(20.0, ge=0, le=86400)
    """Between two rounds of timing the links between nodes, 1 or more; 0: they are never timed."""
    silence_timeout_s: float = Field(10.0, ge=1, le=600)
    """An actor that does not answer for so long is lost, and replaced."""
    recovery_timeout_s: float = Field(60.0, ge=0, le=86400)
    """How long requests wait when nothing that is left can hold the model."""

    @field_validator("link_probe_every_s")
    @classmethod
    def _check_every(cls, every_s: float) -> float:
        if 0 < every_s < 1:
            raise ValueError(f"{every_s:g} is too often; give 1 or more, or 0 for never")
        return every_s

    def settings(
        self,
        objective: Objective,
        device_order: DeviceOrder,
        headroom_fraction: float,
        *,
        max_lanes: int | None,
        block_tokens: int,
        start_timeout_s: float,
    ) -> ControllerSettings:
        """Return what the controller is made with."""
        return ControllerSettings(
            objective=objective,
            device_order=device_order,
            headroom_fraction=headroom_fraction,
            moves_for_gain=self.rebalance,
            min_gain_fraction=self.min_gain_fraction,
            confirm_windows=self.confirm_windows,
            cool_down_s=self.cool_down_s,
            keep_fraction=self.keep_fraction,
            half_step=self.half_step,
            max_lanes=max_lanes,
            block_tokens=block_tokens,
            move_deadline_s=start_timeout_s + _MOVE_GRACE_S,
            trial_window_s=2 * self.window_s,
        )
