"""Is another placement worth its bytes? From loads and the map in force, one layer at a time.

A plan is made when the slowest devices are far enough above the bound, or the load has drifted far
enough; it is carried out when it makes a step shorter by a fraction that is no noise, and what it
saves over the horizon exceeds the seconds that its bytes take, with a margin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placement.experts import ExpertObjective, layer_problems
from placement.packing.weights import solve_weights
from placement.sharding.expert_map import ExpertMap, LayerMap, weighted_layer
from placement.sharding.incremental import LayerReplan, ReplanTerms, replan_layer

COST_MARGIN = 2.0
"""Seconds saved per second of copying: forecasts of either are no better than that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RebalanceSettings:
    """When experts move, and how fast."""

    expert_bytes: int
    """One copy of one expert of one layer."""
    copy_bytes_per_s: float
    """What copies may count on, of the slowest link that they use."""
    step_budget_bytes: int
    """Most bytes that are copied per step, all devices together."""
    staging_slots: int = 1
    """Copies that a device can hold beside its slots, all layers together."""
    objective: ExpertObjective = "rows"
    num_spread: int = 0
    """Hottest experts of a layer on two nodes, while slots allow."""
    least_imbalance: float = 1.03
    """Slowest device over the bound, summed over layers, from which a plan is made."""
    least_drift: float = 0.1
    """The same for the share of rows that went to other experts."""
    least_gain_fraction: float = 0.02
    """Of the slowest device's seconds, for a plan to be carried out."""
    horizon_steps: float = 5000.0
    """Steps until the load is expected to differ again."""
    cool_down_steps: int = 64
    """Between the end of one rebalancing and the plan of the next."""
    least_steps: int = 32
    """Counted before a load is believed."""
    max_reload_attempts: int = 3
    """For an expert that no device holds, before its device is given up."""
    max_trials_per_layer: int = 200

    def __post_init__(self) -> None:
        for name in (
            "expert_bytes",
            "step_budget_bytes",
            "staging_slots",
            "max_reload_attempts",
            "least_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("num_spread", "cool_down_steps", "max_trials_per_layer"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be 0 or more")
        for name in ("copy_bytes_per_s", "horizon_steps", "least_imbalance"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} ({value}) must be above 0 and finite")
        for name in ("least_drift", "least_gain_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be from 0 to 1")

    @property
    def copy_s(self) -> float:
        return self.expert_bytes / self.copy_bytes_per_s


@dataclass(frozen=True, kw_only=True, slots=True)
class RebalanceDecision:
    """Which layers change, what that brings and costs, and why or why not."""

    layers: tuple[tuple[int, LayerReplan], ...]
    """(layer, what it should hold), those that save most per copy first; empty: nothing moves."""
    imbalance: float
    """Slowest device over the bound, as held, summed over layers."""
    gain_s: float
    """Per step, summed over layers."""
    moved_bytes: int
    reason: str


def decide(
    current: ExpertMap,
    rows_LE: NDArray[np.float64],
    settings: RebalanceSettings,
    *,
    drift: float = 0.0,
    is_forced: bool = False,
) -> RebalanceDecision:
    """Return what to move, if anything.

    `rows_LE` are rows per step of every layer's experts; `drift` the share of rows that lately went
    to others; `is_forced` plans whatever the thresholds say (a device has joined, an operator
    asks). Equal arguments give equal answers. Tens of milliseconds a layer that changes.
    """
    problems = layer_problems(rows_LE, current.devices, settings.objective)
    old_s = math.fsum(
        solve_weights(layer.holders(current.num_experts), p.loads, p.speeds).bottleneck_s
        for layer, p in zip(current.layers, problems, strict=True)
    )
    bound_s = math.fsum(problem.bound_s for problem in problems)
    imbalance = old_s / bound_s if bound_s > 0 else 1.0
    state = (
        f"the slowest devices take {imbalance:.3f}x the bound and {drift:.1%} of the rows go to "
        f"other experts than before"
    )
    nothing = RebalanceDecision(
        layers=(), imbalance=imbalance, gain_s=0.0, moved_bytes=0, reason=state
    )
    if not (is_forced or imbalance >= settings.least_imbalance or drift >= settings.least_drift):
        return nothing
    terms = ReplanTerms(
        copy_s=settings.copy_s * COST_MARGIN,
        horizon_steps=settings.horizon_steps,
        num_spread=settings.num_spread,
        max_trials=settings.max_trials_per_layer,
    )
    made = [
        (index, replan_layer(problem, tuple(map(frozenset, layer.experts)), current.devices, terms))
        for index, (layer, problem) in enumerate(zip(current.layers, problems, strict=True))
    ]
    return _accepted([pair for pair in made if pair[1].num_loads], nothing, old_s, settings)


def _accepted(
    made: Sequence[tuple[int, LayerReplan]],
    nothing: RebalanceDecision,
    old_s: float,
    settings: RebalanceSettings,
) -> RebalanceDecision:
    gain_s = math.fsum(replan.old_s - replan.new_s for _, replan in made)
    num_loads = sum(replan.num_loads for _, replan in made)
    verdict = (
        f"{nothing.reason}; {num_loads} copies in {num_loads * settings.copy_s:.3g} s would save "
        f"{gain_s * 1e3:.3g} ms a step, {gain_s * settings.horizon_steps:.3g} s over "
        f"horizon_steps ({settings.horizon_steps:g})"
    )
    is_for_spread = any(replan.is_for_spread for _, replan in made)
    if gain_s < settings.least_gain_fraction * old_s and not is_for_spread:
        return RebalanceDecision(
            layers=(),
            imbalance=nothing.imbalance,
            gain_s=0.0,
            moved_bytes=0,
            reason=f"{verdict}; least_gain_fraction is {settings.least_gain_fraction:g}",
        )
    order = sorted(
        made, key=lambda pair: ((pair[1].new_s - pair[1].old_s) / pair[1].num_loads, pair[0])
    )
    return RebalanceDecision(
        layers=tuple(order),
        imbalance=nothing.imbalance,
        gain_s=gain_s,
        moved_bytes=num_loads * settings.expert_bytes,
        reason=verdict,
    )


def refreshed_weights(
    current: ExpertMap, rows_LE: NDArray[np.float64], settings: RebalanceSettings
) -> Mapping[int, LayerMap]:
    """Return the layers whose weights have fallen behind the load, with exact ones.

    No byte moves for them. A layer is left alone while its slowest device would gain less than
    `least_gain_fraction`.
    """
    changed = {}
    problems = layer_problems(rows_LE, current.devices, settings.objective)
    for index, (layer, problem) in enumerate(zip(current.layers, problems, strict=True)):
        fresh = weighted_layer(tuple(map(frozenset, layer.experts)), problem.loads, problem.speeds)
        old_s, new_s = (finish_s(part, problem.loads, problem.speeds) for part in (layer, fresh))
        if old_s - new_s > settings.least_gain_fraction * old_s:
            changed[index] = fresh
    return changed


def finish_s(layer: LayerMap, loads: Sequence[float], speeds: Sequence[float]) -> float:
    """Return the seconds of a layer's slowest device, by its weights."""
    return max(
        math.fsum(loads[expert] * weight for expert, weight in zip(experts, weights, strict=True))
        / speed
        for experts, weights, speed in zip(layer.experts, layer.weights, speeds, strict=True)
    )
