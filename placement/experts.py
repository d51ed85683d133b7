"""Expert placement: which device holds which experts of every layer, and whose rows it takes.

The layers of a mixture-of-experts model run one after another and a layer waits for its slowest
device, so the planner minimises, layer by layer, the finish of the slowest device: rows over rows
per second, or expected expert reads for small decode batches. Devices may differ in speed and in
slots. An expert's rows are split over its replicas by exact weights, and every layer carries a
lower bound that no placement beats (`placement.packing.bounds`) and the set of devices that shows
its own weights to be optimal (`placement.packing.weights`).

What it leaves out: links between nodes, the GEMM's loss on few rows, and which experts are chosen
together. Loads are expectations; a step of few rows scatters around them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from placement.errors import InfeasiblePlanError
from placement.packing.bounds import finish_bound_s
from placement.packing.eplb import rebalance_experts
from placement.packing.plan import (
    ExpertDevice,
    ExpertPlan,
    Holding,
    LayerExperts,
    slots_from_memory,
)
from placement.packing.search import LayerProblem, search_layer
from placement.packing.spread import hottest_experts, on_two_nodes, spread_experts
from placement.packing.starts import greedy_starts
from placement.packing.weights import cut_bound_s, solve_weights

__all__ = [
    "ExpertDevice",
    "ExpertPlan",
    "Holding",
    "LayerExperts",
    "layer_problems",
    "plan_experts",
    "slots_from_memory",
]

ExpertMode = Literal["motley", "eplb"]
ExpertObjective = Literal["rows", "activated"]

MIN_TRIALS, MAX_TRIALS = 64, 1000
TRIALS_TIMES_COPIES = 100_000
"""A trial costs about as much as experts x devices grow, so this keeps a layer's time level: tens
of milliseconds from 8 experts on 4 devices to 256 on 32."""


def plan_experts(
    load_rows: NDArray[np.float64],
    devices: Sequence[ExpertDevice],
    *,
    expert_bytes: int,
    mode: ExpertMode = "motley",
    objective: ExpertObjective = "rows",
    num_groups: int = 1,
    num_spread: int = 0,
    max_trials_per_layer: int | None = None,
) -> ExpertPlan:
    """Place the experts so that every layer's slowest device finishes as early as possible.

    `load_rows` [layers, experts]: the rows every expert gets, per step or any other span; seconds
    are for the same span. Several greedy packings, EPLB's with exact weights among them, are
    improved by exchanging and replicating experts; the result is never worse than that of
    `mode="eplb"` (unless `num_spread` claims slots). Ties go to
    the lower node, then the lower device id, so the order of `devices` does not matter.
    O(layers x trials x (experts x devices)).

    Args:
        expert_bytes: One copy of one expert of one layer.
        mode: `eplb` places as DeepSeek's balancer does, blind to speed, with as many slots on every
            device as the smallest offers and equal weights.
        objective: `rows` counts rows over `rows_per_s`. `activated` is for decoding, where reading
            an expert's weights outlasts its few rows: it counts expected reads over
            `expert_read_s`, and a share is that of the steps whose rows all go to one replica
            (balance activated experts, not tokens: METRO, arXiv 2512.09277). An expert that gets r
            rows a step on average is read with probability 1 - exp(-r) (Poisson arrivals), so
            `load_rows` must be rows per step.
        num_groups: Groups of consecutive experts that EPLB keeps on one node where it can.
        num_spread: Hottest experts of each layer to hold on two nodes at least, while slots allow;
            this comes before speed.
        max_trials_per_layer: Placements solved exactly; more may come closer to the bound.

    Raises:
        InfeasiblePlanError: One copy of every expert does not fit.
        ValueError: Loads, devices or settings are malformed.
    """
    load_rows = _checked_loads(load_rows, num_groups)
    devices = sorted(devices, key=lambda device: (device.node, device.id))
    _check_devices(devices, load_rows.shape[1], expert_bytes)
    usable = [device for device in devices if device.slots_per_layer]
    problems = layer_problems(load_rows, usable, objective)
    if mode == "eplb":
        shares = _eplb_shares(problems, usable, num_groups)
        layers = [_layer(*pair, usable) for pair in zip(problems, shares, strict=True)]
    elif mode == "motley":
        trials = _max_trials(max_trials_per_layer, load_rows.shape[1] * len(usable))
        layers = _motley_layers(problems, usable, num_groups, num_spread, trials)
    else:
        raise ValueError(f"mode ({mode!r}) must be 'motley' or 'eplb'")
    return ExpertPlan(
        mode=mode,
        objective=objective,
        device_ids=tuple(device.id for device in usable),
        layers=tuple(layers),
        left_out=_left_out(devices, usable, layers),
        bottleneck_s=sum(layer.bottleneck_s for layer in layers),
        lower_bound_s=sum(layer.lower_bound_s for layer in layers),
        device_bytes=tuple(
            expert_bytes * sum(len(layer.experts[index]) for layer in layers)
            for index in range(len(usable))
        ),
    )


def _checked_loads(load_rows: NDArray[np.float64], num_groups: int) -> NDArray[np.float64]:
    loads = np.asarray(load_rows, dtype=np.float64)
    if loads.ndim != 2 or not loads.size:
        raise ValueError(
            f"load_rows has shape {loads.shape}; give rows per [layer, expert], at least one each"
        )
    wrong = np.argwhere(~(np.isfinite(loads) & (loads >= 0)))
    if len(wrong):
        layer, expert = wrong[0].tolist()
        raise ValueError(
            f"load_rows of layer {layer}, expert {expert} is {loads[layer, expert]} "
            f"({len(wrong)} such); loads must be 0 or more and finite"
        )
    if num_groups < 1 or loads.shape[1] % num_groups:
        raise ValueError(f"num_groups ({num_groups}) must divide the {loads.shape[1]} experts")
    return loads


def _check_devices(devices: Sequence[ExpertDevice], num_experts: int, expert_bytes: int) -> None:
    if expert_bytes < 1:
        raise ValueError(f"expert_bytes ({expert_bytes}) must be at least 1")
    for device_id, count in Counter(device.id for device in devices).items():
        if count > 1:
            raise ValueError(f"{count} devices are called {device_id}; give each its own id")
    slots = [device.slots_per_layer for device in devices]
    if not any(slots):
        raise InfeasiblePlanError(
            f"none of {len(slots)} devices holds an expert of {expert_bytes} bytes in every layer "
            f"(all slots_per_layer are 0). Add devices or memory, or use a smaller dtype."
        )
    if sum(slots) < num_experts:
        raise InfeasiblePlanError(
            f"one copy of each of {num_experts} experts needs {num_experts} slots in every layer "
            f"({num_experts * expert_bytes} bytes); {len(slots)} devices offer {sum(slots)} "
            f"({', '.join(map(str, slots))}). Add devices or memory, raise slots_per_layer, or "
            f"use a smaller dtype."
        )


def layer_problems(
    load_rows: NDArray[np.float64], devices: Sequence[ExpertDevice], objective: ExpertObjective
) -> list[LayerProblem]:
    """Return every layer's loads, speeds and slots as the objective counts them."""
    speeds = [device.rows_per_s for device in devices]
    if objective == "activated":
        load_rows = -np.expm1(-load_rows)
        speeds = [1.0 / _expert_read_s(device) for device in devices]
    elif objective != "rows":
        raise ValueError(f"objective ({objective!r}) must be 'rows' or 'activated'")
    num_experts = load_rows.shape[1]
    # A slot beyond one for every expert cannot be used.
    slots = tuple(min(device.slots_per_layer, num_experts) for device in devices)
    return [
        LayerProblem(
            loads=tuple(loads.tolist()),
            speeds=tuple(speeds),
            slots=slots,
            bound_s=finish_bound_s(loads, np.array(speeds), slots),
        )
        for loads in load_rows
    ]


def _expert_read_s(device: ExpertDevice) -> float:
    if device.expert_read_s is None:
        raise ValueError(
            f"device {device.id} has no expert_read_s, which the objective 'activated' counts; "
            f"give it, or plan for 'rows'"
        )
    return device.expert_read_s


def _max_trials(asked: int | None, num_copies: int) -> int:
    if asked is None:
        return min(MAX_TRIALS, max(MIN_TRIALS, TRIALS_TIMES_COPIES // num_copies))
    if asked < 0:
        raise ValueError(f"max_trials_per_layer ({asked}) must be 0 or more")
    return asked


def _motley_layers(
    problems: Sequence[LayerProblem],
    devices: Sequence[ExpertDevice],
    num_groups: int,
    num_spread: int,
    max_trials: int,
) -> list[LayerExperts]:
    if num_spread < 0:
        raise ValueError(f"num_spread ({num_spread}) must be 0 or more experts")
    # Layers of equal loads, as before anything was measured, are placed alike.
    placed = {
        problem: _motley_layer(problem, devices, num_groups, num_spread, max_trials)
        for problem in dict.fromkeys(problems)
    }
    return [placed[problem] for problem in problems]


def _motley_layer(
    problem: LayerProblem,
    devices: Sequence[ExpertDevice],
    num_groups: int,
    num_spread: int,
    max_trials: int,
) -> LayerExperts:
    nodes = [device.node for device in devices]
    starts = list(greedy_starts(problem))
    # EPLB's placement with exact weights in place of equal ones, so as never to do worse.
    for groups in sorted({1, num_groups}):
        if _eplb_num_slots(problem) >= len(problem.loads):
            [shares] = _eplb_shares([problem], devices, groups)
            starts.append([sorted(by_device) for by_device in shares])
    state = search_layer(problem, starts, max_trials)
    hottest = hottest_experts(problem.loads, num_spread)
    if hottest:
        state = spread_experts(state, nodes, hottest, max_trials)
    # Without the replicas that the search found to carry nothing.
    weights = solve_weights(state.holders, problem.loads, problem.speeds)
    alone = tuple(e for e in hottest if not on_two_nodes(state.holders[e], nodes))
    return _layer(problem, weights.shares(), devices, not_spread=alone)


def _eplb_num_slots(problem: LayerProblem) -> int:
    return len(problem.slots) * min(problem.slots)


def _eplb_shares(
    problems: Sequence[LayerProblem], devices: Sequence[ExpertDevice], num_groups: int
) -> list[list[dict[int, float]]]:
    """Return, per layer and expert, EPLB's devices with their shares: equal for every slot."""
    num_experts, num_slots = len(problems[0].loads), _eplb_num_slots(problems[0])
    if num_slots < num_experts:
        raise InfeasiblePlanError(
            f"EPLB gives every device the same slots: {len(devices)} devices with "
            f"{min(problems[0].slots)} each, the fewest of any, offer {num_slots} for "
            f"{num_experts} experts. Leave the smallest devices out, or plan with mode 'motley'."
        )
    node_sizes = Counter(device.node for device in devices)
    num_nodes = len(node_sizes) if len(set(node_sizes.values())) == 1 else 1
    placement = rebalance_experts(
        np.array([problem.loads for problem in problems]),
        num_slots=num_slots,
        num_devices=len(devices),
        num_nodes=num_nodes,
        num_groups=num_groups,
    )
    slots_per_device = num_slots // len(devices)
    layers = []
    for experts, counts in zip(placement.expert_of_slot, placement.num_replicas, strict=True):
        shares: list[dict[int, float]] = [{} for _ in range(num_experts)]
        for slot, expert in enumerate(experts.tolist()):
            device = slot // slots_per_device
            shares[expert][device] = shares[expert].get(device, 0.0) + 1.0 / int(counts[expert])
        layers.append(shares)
    return layers


def _layer(
    problem: LayerProblem,
    shares: Sequence[Mapping[int, float]],
    devices: Sequence[ExpertDevice],
    not_spread: tuple[int, ...] = (),
) -> LayerExperts:
    """Price one layer's placement and attach what proves it."""
    held: list[list[tuple[int, float]]] = [[] for _ in devices]
    for expert, by_device in enumerate(shares):
        for device, share in by_device.items():
            held[device].append((expert, share))
    device_s = tuple(
        math.fsum(problem.loads[expert] * share for expert, share in copies) / speed
        for copies, speed in zip(held, problem.speeds, strict=True)
    )
    holders = [sorted(by_device) for by_device in shares]
    critical = solve_weights(holders, problem.loads, problem.speeds).critical_devices
    weights_bound_s = cut_bound_s(holders, problem.loads, problem.speeds, critical)
    bottleneck_s = max(device_s)
    return LayerExperts(
        experts=tuple(tuple(expert for expert, _ in copies) for copies in held),
        shares=tuple(tuple(share for _, share in copies) for copies in held),
        device_s=device_s,
        bottleneck_s=bottleneck_s,
        # Rounding alone could put a bound a hair above an optimum that meets it.
        lower_bound_s=min(problem.bound_s, bottleneck_s),
        weights_bound_s=min(weights_bound_s, bottleneck_s),
        critical_devices=tuple(devices[device].id for device in sorted(critical)),
        not_spread=not_spread,
    )


def _left_out(
    devices: Sequence[ExpertDevice],
    usable: Sequence[ExpertDevice],
    layers: Sequence[LayerExperts],
) -> tuple[tuple[str, str], ...]:
    reasons = []
    used = {
        device.id
        for index, device in enumerate(usable)
        if any(layer.experts[index] for layer in layers)
    }
    for device in devices:
        if not device.slots_per_layer:
            reasons.append((device.id, "its slots_per_layer is 0: it holds no expert"))
        elif device.id not in used:
            reasons.append((device.id, "no layer would finish earlier with it"))
    return tuple(reasons)
