"""Expert traces: how level a placement stays on unequal devices, and what that moves.

Run: python tests/bench/expert_traces.py [--quick]

Simulated: rows over rows per second, no messages. Eight devices of three speeds hold 128 experts
with one spare slot each. EPLB is re-planned from scratch on the same loads at the same moment; it
gets equal slots on every device, whatever their memory. "Optimum" is the bound that no placement
made for that very step beats.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from figures import Figure, report

from placement.experts import ExpertDevice, plan_experts
from placement.sharding.decision import RebalanceSettings
from placement.sharding.expert_map import ExpertMap
from placement.sharding.fleets import HOME_LAB_ROWS_PER_S, proportional_fleet
from placement.sharding.loads import DEFAULT_WINDOW_STEPS
from placement.sharding.policies import EplbPolicy
from placement.sharding.reactive import ReactiveTerms, break_even_rows, plan_reactive
from placement.sharding.replay import ReplayRun, replay
from placement.sharding.routing import RoutingTable
from placement.sharding.synthetic import TraceRecipe, make_trace
from placement.sharding.traces import ExpertTrace

EXPERT_BYTES = 9_437_184
"""Qwen3-30B-A3B in bfloat16."""
SETTINGS = RebalanceSettings(
    expert_bytes=EXPERT_BYTES, copy_bytes_per_s=1.1e9, step_budget_bytes=EXPERT_BYTES
)
WINDOW = DEFAULT_WINDOW_STEPS
SPAN_STEPS = 16
STATIC = TraceRecipe(regime="stationary", tokens=4096, num_steps=3 * WINDOW)
SWAP = TraceRecipe(regime="swap", num_steps=4 * WINDOW)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A trace on the fleet, with what the policies made of it."""

    title: str
    trace: ExpertTrace
    fleet: Sequence[ExpertDevice]
    runs: dict[str, ReplayRun]

    @property
    def half(self) -> int:
        return self.trace.num_steps // 2

    def balancedness(self, policy: str, first_step: int) -> float:
        run = self.runs[policy]
        return float(run.ideal_S[first_step:].sum() / run.slowest_S[first_step:].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, one layer")
    quick = parser.parse_args().quick
    layers, seeds = (1, range(1)) if quick else (2, range(3))
    print("balanced: over the whole trace, none / EPLB (1000, 3000) / Motley; all simulated")
    static = [
        played(replace(STATIC, zipf=zipf, num_layers=layers), seed)
        for zipf in (0.4, 0.8)
        for seed in seeds
    ]
    swap = [
        played(replace(SWAP, zipf=zipf, num_layers=layers), seed)
        for zipf in (0.6, 1.0)
        for seed in seeds
    ]
    others = (
        replace(SWAP, regime="drift"),
        replace(SWAP, regime="device-loss"),
        replace(SWAP, regime="stationary", domain_sigma=0.5, noise_sigma=0.3),
        replace(SWAP, regime="stationary", phase="decode", tokens=16),
    )
    for recipe in others:
        played(replace(recipe, num_layers=layers), 0)
    print_alternatives(static[0], swap[0])
    print_reactive(seed=1, num_steps=100 if quick else 200)
    figures = [static_figure(static), *swap_figures(swap)]
    print()
    report(figures)


def played(recipe: TraceRecipe, seed: int) -> Case:
    """Make a trace, replay it, and print what came of it."""
    fleet = proportional_fleet(HOME_LAB_ROWS_PER_S, recipe.num_experts)
    trace = make_trace(recipe, seed, lost_device=len(fleet) - 1)
    runs = {run.policy: run for run in replay(trace, fleet, SETTINGS)}
    title = f"{recipe.regime} {recipe.phase}, {recipe.tokens} tokens, Zipf {recipe.zipf}"
    if recipe.domain_sigma:
        title += f", domains {recipe.domain_sigma}, noise {recipe.noise_sigma}"
    reports = [run.report() for run in runs.values()]
    print(
        f"  {title}, seed {seed}: "
        f"{' / '.join(f'{made.balancedness:.3f}' for made in reports)}; p5 "
        f"{' / '.join(f'{made.balancedness_p5:.3f}' for made in reports)}; regret "
        f"{' / '.join(f'{made.regret:.1%}' for made in reports)}; moved "
        f"{' / '.join(str(made.moved_bytes // EXPERT_BYTES) for made in reports)} experts; pause "
        f"{' / '.join(f'{made.pause_s:.2f}' for made in reports)} s"
    )
    return Case(title=title, trace=trace, fleet=fleet, runs=runs)


def static_figure(cases: Sequence[Case]) -> Figure:
    """The worst case once loads were measured for a window, beside EPLB on the same loads."""
    values = [case.balancedness("motley", WINDOW) for case in cases]
    worst = int(np.argmin(values))
    baseline = eplb_balancedness(cases[worst])
    return Figure(
        figure="static load, unequal devices, one spare slot each: balancedness after one window",
        value=values[worst],
        baseline=baseline,
        ratio=values[worst] / baseline,
        target=">= 0.97 (baseline: EPLB on the same loads)",
        met=values[worst] >= 0.97,
        kind="simulated",
    )


def swap_figures(cases: Sequence[Case]) -> list[Figure]:
    """The worst case one window after the swap, and the bytes that it moved, beside EPLB's."""
    regrets = [
        case.runs["motley"].regret(case.half + WINDOW, case.trace.num_steps) for case in cases
    ]
    ratios = [moved_bytes(case) / eplb_bytes(case) for case in cases]
    for case, regret in zip(cases, regrets, strict=True):
        print(
            f"  after the swap, {case.title}: {regret:.1%} above the optimum from the window on, "
            f"within 5 % after {recovery_steps(case)} steps, "
            f"{moved_bytes(case) // EXPERT_BYTES} experts moved (EPLB from scratch: "
            f"{eplb_bytes(case) // EXPERT_BYTES})"
        )
    late, most = int(np.argmax(regrets)), int(np.argmax(ratios))
    still = cases[late].runs["none"].regret(cases[late].half + WINDOW, cases[late].trace.num_steps)
    return [
        Figure(
            figure="abrupt swap: above the per-step optimum, from one window after it on",
            value=regrets[late],
            baseline=still,
            ratio=regrets[late] / still,
            target="<= 0.05 (baseline: no rebalancing)",
            met=regrets[late] <= 0.05,
            kind="simulated",
        ),
        Figure(
            figure="abrupt swap: bytes moved after it",
            value=float(moved_bytes(cases[most])),
            baseline=float(eplb_bytes(cases[most])),
            ratio=ratios[most],
            target="<= 0.333x baseline (EPLB re-planned from scratch)",
            met=ratios[most] <= 1 / 3,
            kind="simulated",
        ),
    ]


def print_alternatives(static: Case, swap: Case) -> None:
    """What weights of the window do in place of weights for each step; EPLB on equal devices."""
    run = replay(swap.trace, swap.fleet, SETTINGS, divides_each_step=False)[-1]
    by_window, by_step = (
        one.regret(swap.half + WINDOW, swap.trace.num_steps) for one in (run, swap.runs["motley"])
    )
    print(
        f"  {swap.title}, a window after the swap: {by_window:.1%} above the optimum by weights "
        f"of the window, {by_step:.1%} by weights for each step"
    )
    fleet = proportional_fleet((1e5,) * 8, static.trace.num_experts)
    runs = {one.policy: one for one in replay(static.trace, fleet, SETTINGS)}
    equal = replace(static, fleet=fleet, runs=runs)
    print(
        f"  {static.title}, eight equal devices, balancedness after one window: "
        f"{equal.balancedness('motley', WINDOW):.3f}, EPLB on the same loads "
        f"{eplb_balancedness(equal):.3f}"
    )


def print_reactive(*, seed: int, num_steps: int) -> None:
    """Experts that change devices for one step, beside the placement for the mean of all steps."""
    recipe = replace(STATIC, num_layers=1, num_steps=num_steps, domain_sigma=1.0, noise_sigma=0.6)
    fleet = [
        replace(device, node=f"node{index // 4}")
        for index, device in enumerate(proportional_fleet(HOME_LAB_ROWS_PER_S, 128))
    ]
    rows_SE = make_trace(recipe, seed).rows_SLE[:, 0]
    plan = plan_experts(rows_SE.mean(axis=0)[None], fleet, expert_bytes=EXPERT_BYTES)
    current = ExpertMap.from_plan(plan, fleet, checkpoint="bench")
    table = RoutingTable.of_layer(current.layers[0], 128)
    speeds = [device.rows_per_s for device in current.devices]
    n_star = round(break_even_rows(768, weight_bytes=2.0, activation_bytes=2.0))
    for least_rows in (128, 512, n_star):
        terms = ReactiveTerms(
            least_rows=least_rows, copy_s={device.node: 0.38e-3 for device in fleet}
        )
        plans = [
            plan_reactive(table, table.balanced_rows(rows_E, speeds), current.devices, terms)
            for rows_E in rows_SE
        ]
        ideal_s = float(rows_SE.sum()) / sum(speeds)
        print(
            f"  very mixed text, 4 devices a node, experts of {least_rows} rows may move: "
            f"{ideal_s / sum(max(made.before_s) for made in plans):.3f} becomes "
            f"{ideal_s / sum(max(made.after_s) for made in plans):.3f} with "
            f"{sum(len(made.moves) for made in plans) / len(plans):.2f} moves a step"
        )


def recovery_steps(case: Case) -> int:
    """Return the steps after the swap from which every span stays within 5 % of the optimum."""
    run = case.runs["motley"]
    spans = range(case.half, case.trace.num_steps - SPAN_STEPS + 1, SPAN_STEPS)
    late = [first for first in spans if run.regret(first, first + SPAN_STEPS) > 0.05]
    return max(late, default=case.half - SPAN_STEPS) + SPAN_STEPS - case.half


def moved_bytes(case: Case) -> int:
    moved_S = case.runs["motley"].moved_S
    return int(moved_S[-1] - moved_S[case.half - 1])


def eplb(case: Case) -> EplbPolicy:
    trace = case.trace
    return EplbPolicy(case.fleet, trace.num_layers, trace.num_experts, SETTINGS)


def eplb_bytes(case: Case) -> int:
    """From a placement on the loads before the swap to one on those after, each from scratch."""
    policy, rows_SLE = eplb(case), case.trace.rows_SLE.astype(np.float64)
    policy.replan(rows_SLE[: case.half].sum(axis=0))
    return policy.replan(rows_SLE[case.half : case.half + WINDOW].sum(axis=0))


def eplb_balancedness(case: Case) -> float:
    policy, rows_SLE = eplb(case), case.trace.rows_SLE
    policy.replan(rows_SLE[:WINDOW].sum(axis=0).astype(np.float64))
    slowest_s = sum(
        float(policy.device_s(layer, rows_E).max())
        for rows_LE in rows_SLE[WINDOW:]
        for layer, rows_E in enumerate(rows_LE)
    )
    return float(case.runs["motley"].ideal_S[WINDOW:].sum()) / slowest_s


if __name__ == "__main__":
    main()
