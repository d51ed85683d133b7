"""Planners: how good and how fast, beside EPLB, round robin, even and memory-proportional splits.

Run: python tests/bench/planners.py [--quick]

Quality is simulated (the cost model prices both sides); times are real, on one core. Every figure
names its baseline; where a baseline does not fit the memory the table says so and there is no
figure.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
from figures import Figure, Kind, median, report

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from expert_vectors import (  # noqa: E402 - a flat folder of the tests
    UNEQUAL_VECTORS,
    V5_FOUR_SPARE,
    V5_NO_REPLICA,
    expert_devices,
)
from published_profiles import (  # noqa: E402
    GPT_OSS_20B,
    QWEN3_1_7B,
    TIERS,
    PublishedProfile,
)
from stage_cases import large_case  # noqa: E402

from actors.engine.checkpoint import planning_profile  # noqa: E402
from cluster.config import load_config  # noqa: E402
from cluster.planning import declared_topology, dtype_bytes, serving_workload  # noqa: E402
from placement.costs import LEAST_HEADROOM_FRACTION  # noqa: E402
from placement.errors import InfeasiblePlanError  # noqa: E402
from placement.experts import ExpertDevice, plan_experts  # noqa: E402
from placement.pooling.steady import steady_state  # noqa: E402
from placement.simulate import simulate_slots  # noqa: E402
from placement.stages import StagesPlan, plan_stages, prices_of  # noqa: E402
from placement.topology import Topology  # noqa: E402
from placement.train import plan_train  # noqa: E402
from placement.training import SlotSchedule, slots_from_counts  # noqa: E402
from placement.workload import DeviceOrder, ModelProfile, Objective, ServingWorkload  # noqa: E402

MICRO_BATCHES = 9
TOPOLOGIES = ROOT / "deploy" / "configs" / "topologies"
ZIPF = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer random cases and repeats")
    quick = parser.parse_args().quick
    figures = [
        *train_figures(),
        *stage_figures(),
        *stage_times(repeats=3 if quick else 9),
        *expert_figures(cases=100 if quick else 1000),
        *expert_times(layers=58),
    ]
    print()
    report(figures)


def figure(
    name: str, value: float, baseline: float, target: str, *, met: bool, kind: Kind = "simulated"
) -> Figure:
    return Figure(
        figure=name, value=value, baseline=baseline, ratio=value / baseline if baseline else 0.0,
        target=target, met=met, kind=kind,
    )  # fmt: skip


def timed(work: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of `work`, after one run that warms caches."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


# --- training ---------------------------------------------------------------------------------


def train_figures() -> list[Figure]:
    print(f"training, {MICRO_BATCHES} micro-batches a round, idle share of the aggregate speed")
    figures = []
    for profile, steady, sync in ((QWEN3_1_7B, 0.027, 0.1907), (GPT_OSS_20B, 0.023, 0.1398)):
        figures += [steady_idle(profile, steady), sync_idle(profile, sync), tiers_idle(profile)]
    return figures


def steady_idle(profile: PublishedProfile, most: float) -> Figure:
    """Eight equal devices. The published simulation lets the head run before its input is there;
    so does the baseline, ours does not."""
    costs = profile.costs()
    started = time.perf_counter()
    plan = plan_train(costs, micro_batches=MICRO_BATCHES, grains="recompute")
    seconds = time.perf_counter() - started
    published, honest = (
        steady_state(
            costs,
            SlotSchedule(
                slots=profile.slots,
                micro_batches=MICRO_BATCHES,
                dispatch="round_robin",
                fused_forward_overlaps=overlaps,
            ),
        ).idle_fraction
        for overlaps in (True, False)
    )
    print(
        f"  {profile.name}, 8 equal, steady: {plan.idle_fraction:.2%} over {len(plan.slots)} slots,"
        f" planned in {seconds:.2f} s (published stages {published:.2%}, {honest:.2%} when the"
        f" head waits for its input)"
    )
    if profile is QWEN3_1_7B:
        print(f"    the stages that RoundPipe's own planner makes: {own_planner_idle(profile):.2%}")
    return figure(
        f"train steady idle, {profile.name}, 8 equal, beside published stages",
        plan.idle_fraction,
        published,
        f"<= {most}",
        met=plan.idle_fraction <= most,
    )


def own_planner_idle(profile: PublishedProfile) -> float:
    """The stages that RoundPipe's library computes for this profile: fewest, hence ragged."""
    slots = slots_from_counts((1, 9, 9, 9), 0, (1, *[3] * 9))
    schedule = SlotSchedule(
        slots=slots,
        micro_batches=MICRO_BATCHES,
        dispatch="round_robin",
        fused_forward_overlaps=True,
    )
    return steady_state(profile.costs(), schedule).idle_fraction


def sync_idle(profile: PublishedProfile, most: float) -> Figure:
    """One step of 16 micro-batches, from an empty pool to an empty pool."""
    costs = profile.costs()
    plan = plan_train(
        costs, micro_batches=8, rounds_per_step=2, synchronous=True, grains="recompute"
    )
    schedule = replace(plan.schedule(costs), fused_forward_overlaps=True)
    idle = simulate_slots(costs, schedule, rounds=2).idle_fraction
    published = profile.bubble_percent["roundpipe"] / 100
    print(
        f"  {profile.name}, 8 equal, sync: {idle:.2%} as published figures are simulated "
        f"(published {published:.2%}), {plan.idle_fraction:.2%} when the head waits for its input"
    )
    return figure(
        f"train sync idle, {profile.name}, 8 equal, beside published",
        idle,
        published,
        f"< {most}",
        met=idle < most,
    )


def tiers_idle(profile: PublishedProfile) -> Figure:
    """Four speeds, two devices each; rounds that wait for no optimizer step, as in the baseline."""
    costs = profile.costs(TIERS)
    fenced = {
        rounds: plan_train(
            costs, micro_batches=MICRO_BATCHES, rounds_per_step=rounds, grains="recompute"
        ).idle_fraction
        for rounds in (1, 2, 4)
    }
    plan = plan_train(costs, micro_batches=MICRO_BATCHES, rounds_per_step=None, grains="recompute")
    in_turn = steady_state(
        costs,
        SlotSchedule(slots=profile.slots, micro_batches=MICRO_BATCHES, dispatch="round_robin"),
    ).idle_fraction
    told = ", ".join(f"{idle:.2%} at {rounds}" for rounds, idle in fenced.items())
    print(
        f"  {profile.name}, four speeds twice: {plan.idle_fraction:.2%} without an optimizer fence "
        f"(round robin {in_turn:.2%}); gradients one step old and so many rounds a step: {told}"
    )
    return figure(
        f"train steady idle, {profile.name}, 4 speeds, beside round robin",
        plan.idle_fraction,
        in_turn,
        "<= 0.02",
        met=plan.idle_fraction <= 0.02,
    )


# --- serving stages ---------------------------------------------------------------------------


def stage_figures() -> list[Figure]:
    print("\nserving, tokens/s: Motley, even split, memory-proportional split")
    figures = []
    for path in sorted(TOPOLOGIES.glob("*.yaml")):
        config = load_config(path)
        topology = declared_topology(config)
        width = dtype_bytes(config.engine, [device.kind for device in topology.devices])
        profile = planning_profile(config.model, dtype_bytes=width)
        workload = serving_workload(config)
        plan = plan_stages(profile, topology, workload=workload, device_order="free")
        sizes = [float(device.memory_bytes) for device in topology.devices]
        rivals = {
            "even split": forced(profile, topology, workload, [1.0] * len(sizes)),
            "memory split": forced(profile, topology, workload, sizes),
        }
        told = [
            f"{name} {'does not fit' if rival is None else f'{rival.predicted_tokens_per_s:.1f}'}"
            for name, rival in rivals.items()
        ]
        print(f"  {path.stem}: {plan.predicted_tokens_per_s:.1f} ({', '.join(told)})")
        figures += [
            figure(
                f"stages tokens/s, {path.stem} beside {name}", plan.predicted_tokens_per_s,
                rival.predicted_tokens_per_s, ">= 1x baseline",
                met=plan.predicted_tokens_per_s >= rival.predicted_tokens_per_s * (1 - 1e-9),
            )
            for name, rival in rivals.items() if rival is not None
        ]  # fmt: skip
    return figures


def forced(
    profile: ModelProfile,
    topology: Topology,
    workload: ServingWorkload,
    weights: Sequence[float],
) -> StagesPlan | None:
    """Split the layers in proportion to weights, in the order given; None: it does not fit."""
    shares = np.cumsum(np.array(weights) / sum(weights) * profile.num_layers)
    ends = np.rint(shares).astype(int)
    counts = np.diff(ends, prepend=0).tolist()
    try:
        return plan_stages(profile, topology, workload=workload, layer_counts=counts)
    except InfeasiblePlanError:
        return None


def stage_times(repeats: int) -> list[Figure]:
    print("\ntime to plan 94 layers on unlike devices, s (baseline: the price list alone)")
    figures = []
    for num_devices, num_nodes, lanes, memory_bytes, most_s in (
        (16, 4, 4, 40e9, 0.05),
        (16, 16, 16, 40e9, 0.05),
        (512, 64, 64, 12e9, 2.0),
        (512, 512, 128, 12e9, 2.0),
    ):
        case = large_case(num_devices, num_nodes, lanes=lanes, memory_bytes=memory_bytes)
        priced = partial(
            prices_of, case.profile, case.topology, case.workload, LEAST_HEADROOM_FRACTION, "given"
        )
        priced_s = timed(priced, 3)
        for order in get_args(DeviceOrder):
            slowest_s, told = 0.0, []
            for objective in get_args(Objective):
                plan = partial(
                    plan_stages,
                    case.profile,
                    case.topology,
                    workload=case.workload,
                    device_order=order,
                    objective=objective,
                )
                seconds = timed(plan, repeats)
                slowest_s = max(slowest_s, seconds)
                found = plan()
                proof = "exact" if found.is_exact else f"gap {found.gap:.1%}"
                told.append(f"{objective} {seconds:.3f} ({proof})")
            where = f"{num_devices} devices on {num_nodes} nodes, {order} order"
            print(f"  {where}: {', '.join(told)}")
            figures.append(
                figure(
                    f"stages planning s, 94 layers, {where}, slowest objective",
                    slowest_s,
                    priced_s,
                    f"<= {most_s} s",
                    met=slowest_s <= most_s,
                    kind="real",
                )
            )
    return figures


# --- experts ----------------------------------------------------------------------------------


def expert_figures(cases: int) -> list[Figure]:
    print("\nexperts on unequal devices: slowest device over the bound")
    figures = []
    for vector in UNEQUAL_VECTORS:
        plan = plan_experts(vector.load_rows, vector.devices, expert_bytes=1)
        print(f"  {vector.name}: {plan.bottleneck_s / vector.bound_s:.4f}x the bound")
    for vector, equal_slots, most in ((V5_NO_REPLICA, 3, 1.03), (V5_FOUR_SPARE, 4, 1.0 + 1e-6)):
        ours = plan_experts(vector.load_rows, vector.devices, expert_bytes=1)
        same = [replace(device, slots_per_layer=equal_slots) for device in vector.devices]
        eplb = plan_experts(vector.load_rows, same, expert_bytes=1, mode="eplb")
        figures.append(
            figure(
                f"experts over bound, {vector.name} beside EPLB",
                ours.bottleneck_s / vector.bound_s,
                eplb.bottleneck_s / vector.bound_s,
                f"<= {most:g}x bound",
                met=ours.bottleneck_s <= most * vector.bound_s,
            )
        )
    return [*figures, *random_cases(cases)]


def random_cases(cases: int) -> list[Figure]:
    rng = np.random.default_rng(11)
    against: dict[str, list[float]] = {"EPLB": [], "round robin": [], "memory split": []}
    for _ in range(cases):
        loads, devices = random_case(rng)
        ours = plan_experts(loads, devices, expert_bytes=1).bottleneck_s
        eplb = plan_experts(loads, devices, expert_bytes=1, mode="eplb").bottleneck_s
        against["EPLB"].append(ours / eplb)
        against["round robin"].append(ours / dealt_s(loads[0], devices, by_slots=False))
        against["memory split"].append(ours / dealt_s(loads[0], devices, by_slots=True))
    figures = []
    for name, ratios in against.items():
        mean, worst = float(np.mean(ratios)), max(ratios)
        print(f"  {cases} random layers beside {name}: mean {mean:.3f}x, worst {worst:.3f}x")
        figures.append(
            figure(
                f"experts slowest device, worst of {cases} beside {name}",
                worst,
                1.0,
                "<= 1x baseline",
                met=worst <= 1 + 1e-9,
            )
        )
    return figures


def random_case(rng: np.random.Generator) -> tuple[np.ndarray, list[ExpertDevice]]:
    num_experts = int(rng.choice([8, 16, 32]))
    num_devices = int(rng.choice([2, 4, 8]))
    least = num_experts // num_devices
    slots = tuple(int(least + extra) for extra in rng.integers(0, 3, num_devices))
    speeds = tuple(float(speed) for speed in rng.uniform(1, 4, num_devices))
    loads = rng.permutation(1000.0 / np.arange(1, num_experts + 1) ** ZIPF)[None]
    return loads, expert_devices(speeds, slots)


def dealt_s(loads: np.ndarray, devices: Sequence[ExpertDevice], *, by_slots: bool) -> float:
    """Deal the experts out in turn, or in runs as long as each device's share of the slots."""
    shares = np.array([device.slots_per_layer for device in devices], dtype=float)
    if by_slots:
        ends = np.rint(np.cumsum(shares / shares.sum() * len(loads))).astype(int)
        owner = np.searchsorted(ends, np.arange(len(loads)), side="right")
    else:
        owner = np.arange(len(loads)) % len(devices)
    rows = np.bincount(owner, weights=loads, minlength=len(devices))
    return float(max(rows / [device.rows_per_s for device in devices]))


def expert_times(layers: int) -> list[Figure]:
    print(f"\n{layers} layers x 256 experts on 32 devices of 9 slots, one to four times as fast")
    figures = []
    for alpha in (0.4, 0.8, 1.2):
        rng = np.random.default_rng(3)
        ranks = 1.0 / np.arange(1, 257) ** alpha
        loads = np.array([rng.permutation(ranks) for _ in range(layers)]) * 4096
        devices = expert_devices(tuple(rng.uniform(1, 4, 32).tolist()), (9,) * 32, num_nodes=4)
        started = time.perf_counter()
        ours = plan_experts(loads, devices, expert_bytes=1)
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        eplb = plan_experts(loads, devices, expert_bytes=1, mode="eplb")
        eplb_s = time.perf_counter() - started
        print(
            f"  Zipf {alpha}: {seconds:.2f} s, {1 + ours.gap:.5f}x the bound "
            f"(EPLB {eplb_s:.2f} s, {1 + eplb.gap:.3f}x)"
        )
        figures.append(
            figure(
                f"experts planning s, 58 x 256 on 32, Zipf {alpha}, beside EPLB",
                seconds,
                eplb_s,
                "<= 2 s",
                met=seconds <= 2.0,
                kind="real",
            )
        )
    return figures


if __name__ == "__main__":
    main()
