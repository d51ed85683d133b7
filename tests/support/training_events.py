"""Events of a made-up training run, with every figure of one's own choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cluster.training.events import (
    CheckpointSaved,
    Evaluated,
    HostBytes,
    SlotsTraced,
    StepDone,
    TrainingFinished,
    TrainingPlanned,
    TrainingStarted,
)
from placement.trace import Event
from placement.train import plan_train
from placement.training import TrainingCosts

HOST = HostBytes(
    num_trained=1000,
    num_frozen=0,
    weight_bytes=2000,
    residual_bytes=2000,
    gradient_bytes=4000,
    moment_bytes=8000,
    frozen_bytes=0,
)


def planned(num_devices: int = 2, num_layers: int = 4) -> TrainingPlanned:
    """A real plan for devices that differ in speed."""
    costs = TrainingCosts.uniform(
        num_devices=num_devices,
        num_layers=num_layers,
        forward_s=0.1,
        backward_s=0.2,
        head_forward_s=0.1,
        head_backward_s=0.1,
        hand_off_s=0.0,
        speeds=[1.0 + index for index in range(num_devices)],
    )
    plan = plan_train(costs, micro_batches=4, rounds_per_step=2, synchronous=True)
    return TrainingPlanned(plan=plan, nodes=dict(zip(costs.device_ids, costs.nodes, strict=True)))


def started(first_step: int = 1, num_steps: int = 4, host: HostBytes = HOST) -> TrainingStarted:
    return TrainingStarted(
        first_step=first_step,
        num_steps=num_steps,
        host_bytes=host,
        num_documents=12,
        num_sequences=30,
        resumed_from=None if first_step == 1 else Path(f"run/step-{first_step - 1:06d}"),
    )


def step_done(step: int, num_steps: int = 4, seconds: float = 0.5, loss: float = 2.0) -> StepDone:
    return StepDone(
        step=step,
        num_steps=num_steps,
        loss=loss,
        router_loss=None,
        gradient_norm=0.75,
        learning_rate=1e-4,
        tokens=100,
        seconds=seconds,
        idle_fractions={"gpu0": 0.25, "gpu1": 0.0},
        eta_s=(num_steps - step) * seconds,
    )


def with_router_loss(step: StepDone, loss: float) -> StepDone:
    return replace(step, router_loss=loss)


def evaluated(step: int, loss: float = 2.5) -> Evaluated:
    return Evaluated(step=step, loss=loss, tokens=640, seconds=1.5)


def saved(step: int) -> CheckpointSaved:
    return CheckpointSaved(step=step, path=Path(f"run/step-{step:06d}"), seconds=0.25)


def finished(step: int) -> TrainingFinished:
    return TrainingFinished(
        step=step, path=Path(f"run/step-{step:06d}"), seconds=125.0, tokens=2500
    )


def traced(round_index: int, num_events: int = 2, device_id: str = "gpu0") -> SlotsTraced:
    return SlotsTraced(
        events=tuple(
            Event(
                device_id=device_id,
                start_s=10.0 * round_index + index,
                end_s=10.0 * round_index + index + 1,
                kind="forward",
                stage=0,
                micro_batch=index,
                round_index=round_index,
            )
            for index in range(num_events)
        )
    )
