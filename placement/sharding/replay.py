"""Replay of a trace on a fleet that is not there: what each way to keep a placement comes to.

All figures are simulated: seconds are rows over rows per second (or expert reads, in decoding),
without messages. A step waits for the slowest device of every layer. The optimum of a step is the
bound that no placement made for that very step beats (`placement.packing.bounds`), so that regret
is never told too small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placement.experts import ExpertDevice, layer_problems, plan_experts
from placement.sharding.decision import RebalanceSettings
from placement.sharding.expert_map import ExpertMap
from placement.sharding.loads import DEFAULT_WINDOW_STEPS
from placement.sharding.policies import EplbPolicy, MotleyPolicy, Policy, StaticPolicy
from placement.sharding.recovery import check_slots
from placement.sharding.traces import ExpertTrace


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayRun:
    """One policy over a trace, step by step, summed over the layers."""

    policy: str
    slowest_S: NDArray[np.float64]
    """Seconds of the slowest devices."""
    ideal_S: NDArray[np.float64]
    """Seconds if all devices were busy to the end."""
    optimum_S: NDArray[np.float64]
    """No placement for that step has slowest devices faster than this."""
    moved_S: NDArray[np.int64]
    """Bytes that moved until the end of each step, since the first."""
    pause_s: float

    def report(self) -> ReplayReport:
        """Sum the run up."""
        balancedness_S = np.divide(
            self.ideal_S,
            self.slowest_S,
            out=np.ones_like(self.ideal_S),
            where=self.slowest_S > 0,
        )
        return ReplayReport(
            policy=self.policy,
            balancedness=_over(self.ideal_S, self.slowest_S),
            balancedness_p50=float(np.percentile(balancedness_S, 50)),
            balancedness_p5=float(np.percentile(balancedness_S, 5)),
            straggler_s=float((self.slowest_S - self.ideal_S).mean()),
            regret=_over(self.slowest_S, self.optimum_S) - 1.0,
            moved_bytes=int(self.moved_S[-1]),
            pause_s=self.pause_s,
        )

    def regret(self, first_step: int, end_step: int) -> float:
        """Return how far these steps took longer than their optimum, as a fraction."""
        steps = slice(first_step, end_step)
        return _over(self.slowest_S[steps], self.optimum_S[steps]) - 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayReport:
    """What one policy comes to; simulated."""

    policy: str
    balancedness: float
    """Speed-weighted, over all steps: 1 when no device ever waits for another."""
    balancedness_p50: float
    balancedness_p5: float
    """19 of 20 steps are better."""
    straggler_s: float
    """Mean per step: what the slowest devices take longer than level ones would."""
    regret: float
    """Seconds over the optimum of each step, as a fraction."""
    moved_bytes: int
    pause_s: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def replay(
    trace: ExpertTrace,
    devices: Sequence[ExpertDevice],
    settings: RebalanceSettings,
    *,
    window_steps: int = DEFAULT_WINDOW_STEPS,
    measure_every_steps: int = 16,
    divides_each_step: bool = True,
) -> list[ReplayRun]:
    """Run a trace under no rebalancing, under EPLB and under Motley, on the same fleet.

    Motley and "none" begin with the plan for equal loads. A decode trace counts expert reads.
    `divides_each_step`: Motley weighs replicas anew for the rows of every step; otherwise it uses
    the weights of its map, which follow the window.

    Raises:
        InfeasiblePlanError: The devices do not hold one copy of every expert, from the start or
            after a loss.
        ValueError: The trace loses a device that is not there, or the fleet has no
            `expert_read_s`, which decode traces need.
    """
    if trace.phase == "decode":
        settings = replace(settings, objective="activated")
    equal_LE = trace.rows_SLE.sum(axis=2).mean(axis=0)[:, None] / trace.num_experts
    plan = plan_experts(
        np.repeat(equal_LE, trace.num_experts, axis=1),
        devices,
        expert_bytes=settings.expert_bytes,
        objective=settings.objective,
    )
    current = ExpertMap.from_plan(plan, devices, checkpoint=trace.name)
    _check_losses(trace, current.devices)
    policies: list[Policy] = [
        StaticPolicy(current, settings),
        EplbPolicy(current.devices, trace.num_layers, trace.num_experts, settings),
        MotleyPolicy(
            current,
            settings,
            window_steps=window_steps,
            measure_every_steps=measure_every_steps,
            divides_each_step=divides_each_step,
        ),
    ]
    ideal_S, optimum_S = _best_of_steps(trace, current.devices, settings)
    return [_run(policy, trace, current.devices, ideal_S, optimum_S) for policy in policies]


def _run(
    policy: Policy,
    trace: ExpertTrace,
    devices: Sequence[ExpertDevice],
    ideal_S: NDArray[np.float64],
    optimum_S: NDArray[np.float64],
) -> ReplayRun:
    slowest_S = np.zeros(trace.num_steps)
    moved_S = np.zeros(trace.num_steps, dtype=np.int64)
    losses = dict(trace.losses)
    for step, rows_LE in enumerate(trace.rows_SLE):
        if step in losses:
            policy.lost(devices[losses[step]].id)
        for layer, rows_E in enumerate(rows_LE):
            slowest_S[step] += policy.device_s(layer, rows_E).max()
        policy.step_done(rows_LE)
        moved_S[step] = policy.moved_bytes
    return ReplayRun(
        policy=policy.name,
        slowest_S=slowest_S,
        ideal_S=ideal_S,
        optimum_S=optimum_S,
        moved_S=moved_S,
        pause_s=policy.pause_s,
    )


def _best_of_steps(
    trace: ExpertTrace, devices: Sequence[ExpertDevice], settings: RebalanceSettings
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return [steps] the level finish and the bound, on the devices that are there."""
    left = list(devices)
    losses = dict(trace.losses)
    ideal_S, optimum_S = np.zeros(trace.num_steps), np.zeros(trace.num_steps)
    for step, rows_LE in enumerate(trace.rows_SLE):
        if step in losses:
            left.remove(devices[losses[step]])
        # Reads are whole here: an expert is read in this step or it is not.
        loads_LE = (rows_LE > 0) if settings.objective == "activated" else rows_LE
        speeds = [_speed(device, settings) for device in left]
        priced = [replace(d, rows_per_s=s) for d, s in zip(left, speeds, strict=True)]
        for problem in layer_problems(loads_LE.astype(np.float64), priced, "rows"):
            ideal_S[step] += sum(problem.loads) / sum(speeds)
            optimum_S[step] += problem.bound_s
    return ideal_S, optimum_S


def _speed(device: ExpertDevice, settings: RebalanceSettings) -> float:
    if settings.objective == "rows":
        return device.rows_per_s
    assert device.expert_read_s is not None, "the plan for `activated` has refused it"
    return 1.0 / device.expert_read_s


def _check_losses(trace: ExpertTrace, devices: Sequence[ExpertDevice]) -> None:
    lost = [device for _, device in trace.losses]
    if len(set(lost)) < len(lost) or any(device >= len(devices) for device in lost):
        raise ValueError(
            f"trace {trace.name} loses devices {lost} and the fleet has devices 0 to "
            f"{len(devices) - 1}; each can be lost once: replay it on a larger fleet"
        )
    check_slots([d for index, d in enumerate(devices) if index not in lost], trace.num_experts)
    if len({step for step, _ in trace.losses}) < len(lost):
        raise ValueError(f"trace {trace.name} loses two devices in one step; give each its own")


def _over(value: NDArray[np.float64], of: NDArray[np.float64]) -> float:
    total = float(of.sum())
    return float(value.sum()) / total if total > 0 else 1.0
