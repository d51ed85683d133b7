"""Decoding: which replica serves each activated expert when a step has few rows.

Reading an expert's weights then outlasts its rows, so what counts is how many experts a device must
read, not how many rows it gets (METRO, arXiv 2512.09277), and how many remote nodes must be written
to. In seconds, a layer of one step takes

    sum over remote nodes used of message_s(node)
    + max over devices used of latency_s(device) + experts it reads x read_s(device).

All rows of an expert go to one replica. For a given set of nodes the best choice is exact: experts
are added one by one along the shortest chain of reassignments to the device that ends earliest,
which is successive shortest paths for costs that grow with every further expert (semi-matchings:
Harvey, Ladner, Lovasz and Tamir, "Semi-matchings for bipartite graphs and load balancing", 2006).
Nodes that some expert needs are used anyway; of the others every subset is tried while they are
few, else they are given up one by one while that helps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

MOST_OPTIONAL_NODES = 5
"""Nodes that could be left out and of which every subset is tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCosts:
    """What a step of few rows costs, by position of the device in the map."""

    nodes: tuple[str, ...]
    read_s: tuple[float, ...]
    """Seconds to read one expert."""
    latency_s: tuple[float, ...]
    """There and back over the link; 0 on the sender's node."""
    message_s: Mapping[str, float]
    """By remote node: seconds of the sender for one more message; the sender's node is left out."""

    def __post_init__(self) -> None:
        if not len(self.nodes) == len(self.read_s) == len(self.latency_s):
            raise ValueError(
                f"{len(self.nodes)} nodes, {len(self.read_s)} read_s and {len(self.latency_s)} "
                f"latency_s; give one of each for every device"
            )
        for name, values in (
            ("read_s", self.read_s),
            ("latency_s", self.latency_s),
            ("message_s", self.message_s.values()),
        ):
            for value in values:
                if not (math.isfinite(value) and value >= 0):
                    raise ValueError(f"{name} ({value}) must be 0 or more and finite")


def choose_replicas(
    activated: Sequence[int], holders: Sequence[Sequence[int]], costs: StepCosts
) -> dict[int, int]:
    """Return, for every activated expert, the device that serves it in this step.

    `holders[expert]` are positions of devices, at least one each. Deterministic: ties go to fewer
    messages, then to the lower device. O(subsets x experts x replicas).
    """
    experts = sorted(set(activated))
    forced = {
        costs.nodes[holders[expert][0]]
        for expert in experts
        if len({costs.nodes[device] for device in holders[expert]}) == 1
    }
    touched = {costs.nodes[device] for expert in experts for device in holders[expert]}
    optional = sorted((touched & costs.message_s.keys()) - forced)
    always = touched - set(optional)
    best: tuple[float, int, dict[int, int]] | None = None
    for chosen in _subsets(optional):
        found = _assign(experts, holders, costs, always | set(chosen))
        if found is not None:
            seconds = layer_s(found.values(), costs)
            if best is None or (seconds, len(chosen)) < best[:2]:
                best = seconds, len(chosen), found
    if best is None:
        best = _give_up_nodes(experts, holders, costs, touched, optional)
    return best[2]


def layer_s(devices: Iterable[int], costs: StepCosts) -> float:
    """Return what a step's layer takes when each entry is one expert read on that device."""
    reads: dict[int, int] = {}
    for device in devices:
        reads[device] = reads.get(device, 0) + 1
    remote = {costs.nodes[device] for device in reads} & costs.message_s.keys()
    finish_s = (costs.latency_s[d] + count * costs.read_s[d] for d, count in reads.items())
    return math.fsum(costs.message_s[node] for node in remote) + max(finish_s, default=0.0)


def _subsets(optional: Sequence[str]) -> Iterable[tuple[str, ...]]:
    """Return every subset, small ones first; none when there are too many."""
    if len(optional) > MOST_OPTIONAL_NODES:
        return ()
    sizes = range(len(optional) + 1)
    return itertools.chain.from_iterable(itertools.combinations(optional, n) for n in sizes)


def _give_up_nodes(
    experts: Sequence[int],
    holders: Sequence[Sequence[int]],
    costs: StepCosts,
    nodes: Collection[str],
    optional: Sequence[str],
) -> tuple[float, int, dict[int, int]]:
    """Start from all nodes and leave out the one that helps most, while one helps."""
    allowed = set(nodes)
    found = _assign(experts, holders, costs, allowed)
    assert found is not None, "all nodes that hold an expert are allowed"
    best = layer_s(found.values(), costs), len(allowed), found
    improved = True
    while improved:
        improved = False
        for node in sorted(allowed.intersection(optional)):
            fewer = _assign(experts, holders, costs, allowed - {node})
            if fewer is not None and (seconds := layer_s(fewer.values(), costs)) <= best[0]:
                best, improved = (seconds, len(allowed) - 1, fewer), True
                dropped = node
        if improved:
            allowed.remove(dropped)
    return best


def _assign(
    experts: Sequence[int],
    holders: Sequence[Sequence[int]],
    costs: StepCosts,
    nodes: Collection[str],
) -> dict[int, int] | None:
    """Return the choice within `nodes` whose last device ends first; None: an expert has none."""
    options = {e: [d for d in holders[e] if costs.nodes[d] in nodes] for e in experts}
    if not all(options.values()):
        return None
    device_of: dict[int, int] = {}
    reads = [0] * len(costs.nodes)
    shared_on: dict[int, list[int]] = {}
    # Those without a choice first: they are where they are.
    for expert in sorted(experts, key=lambda e: (len(options[e]) > 1, e)):
        came_from = _reachable(expert, options, device_of, shared_on)
        end = min(
            came_from, key=lambda d: (costs.latency_s[d] + (reads[d] + 1) * costs.read_s[d], d)
        )
        reads[end] += 1
        while end != -1:
            moved, before = came_from[end]
            device_of[moved] = end
            end = before
        if len(options[expert]) > 1:
            for device in options[expert]:
                shared_on.setdefault(device, []).append(expert)
    return device_of


def _reachable(
    expert: int,
    options: Mapping[int, Sequence[int]],
    device_of: Mapping[int, int],
    shared_on: Mapping[int, Sequence[int]],
) -> dict[int, tuple[int, int]]:
    """Return, per device that a chain of reassignments can end on, (expert moved there, from)."""
    came_from = dict.fromkeys(options[expert], (expert, -1))
    queue = list(came_from)
    for device in queue:
        for other in shared_on.get(device, ()):
            if device_of[other] == device:
                for target in options[other]:
                    if target not in came_from:
                        came_from[target] = (other, device)
                        queue.append(target)
    return came_from
