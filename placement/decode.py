"""Decode workers ("lanes"): how many, on which node, with how many sequences and KV blocks.

Lanes take turns on the stages. With K of them, a stage or a link serves one step of every lane per
cycle, and no lane steps twice before its own step has come back, so

    cycle = max(sum over lanes of that lane's slowest stage or link, the longest lane's latency)

Stages and links that serve the lanes in turn meet this cycle (every circuit of the max-plus system
weighs at most that: Baccelli, Cohen, Olsder and Quadrat, "Synchronization and Linearity", 1992);
with equal lanes no order of service has a shorter one. More lanes keep more stages busy, and each
reads the weights again for fewer rows; the planner tries every count.

Not counted: prompt chunks, the seconds a lane itself needs between two steps, and waiting where
two hops of one step share a wire (their seconds are counted).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from placement.costs import (
    memory_cap_bytes,
    occupied_s,
    stage_activation_bytes,
    stage_cost,
    stage_kv_bytes,
    stage_weight_bytes,
    transfer_s,
)
from placement.errors import InfeasiblePlanError
from placement.stages import StagePlacement, StagesPlan
from placement.topology import Link, Topology
from placement.workload import ModelProfile

ROUNDING = 1e-9
"""Rates closer than this, relatively, are equal: sums in another order differ by less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanePlacement:
    """One lane."""

    index: int
    node: str
    sequences: int
    """That decode together in one step."""
    kv_blocks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneCount:
    """What another number of lanes would do."""

    lanes: int
    sequences_per_lane: int
    """Of the fullest lane."""
    period_s: float
    tokens_per_s: float
    fits: bool
    """The planned context fits the KV of every lane."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodePlan:
    """The lanes, what they should do together, and how good any lanes could be."""

    epoch: int = 0
    model: str
    block_tokens: int
    lanes: tuple[LanePlacement, ...]
    period_s: float
    """Mean time between two finished steps; each sequence gets a token every `cycle_s`."""
    latency_s: float
    """One step of the fullest lane, the ways from and to the lane included."""
    predicted_tokens_per_s: float
    bound_tokens_per_s: float
    """No number of lanes, and no way to share the sequences out, decodes faster on these stages
    (see `_bound_tokens_per_s`); memory is not counted."""
    alternatives: tuple[LaneCount, ...]
    """Every number of lanes tried, fewest first."""

    @property
    def cycle_s(self) -> float:
        """Time in which every lane makes one step."""
        return self.period_s * len(self.lanes)

    @property
    def gap(self) -> float:
        """How much faster the bound is, as a fraction of the prediction; 0: nothing is."""
        return self.bound_tokens_per_s / self.predicted_tokens_per_s - 1.0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        value = asdict(self)
        return value | {name: list(value[name]) for name in ("lanes", "alternatives")}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DecodePlan:
        """Rebuild a plan from the values of `to_json`."""
        fields = dict(value)
        fields["lanes"] = tuple(LanePlacement(**lane) for lane in value["lanes"])
        fields["alternatives"] = tuple(LaneCount(**count) for count in value["alternatives"])
        return cls(**fields)


def plan_decode(
    profile: ModelProfile,
    topology: Topology,
    stages: StagesPlan,
    *,
    sequences: int,
    context_tokens_per_sequence: int,
    block_tokens: int,
    headroom_fraction: float = 0.1,
    max_lanes: int = 64,
    lane_nodes: Sequence[str] | None = None,
    step_tokens: int | None = None,
) -> DecodePlan:
    """Choose the number of lanes that decodes `sequences` concurrent sequences fastest.

    Sequences are shared out evenly. Exact over 1 to `max_lanes` lanes (never more than there are
    sequences); among equal rates (to `ROUNDING`) the fewest lanes. O((max_lanes + sequences) x
    stages). All lanes get the same number of KV blocks, as many as the tightest stage holds beside
    weights and activations; where no stage keeps KV, as many as the load fills.

    Lanes sit where the way to the first stage and from the last is shortest; only latency counts
    (the messages are small). On nodes that tie they take turns, by name: it costs a token nothing
    and shares out the lanes' own work.

    `lane_nodes` may host lanes; None: every node with a device. `step_tokens` is the most rows of
    one step, prompt chunks included, and sizes the activations; None: the decodes alone.

    Raises:
        InfeasiblePlanError: The KV of the load fits no number of lanes, or no lane node reaches
            the stages.
        ValueError: A count or the headroom is malformed, or the stages are of another model.
    """
    _check_counts(
        sequences=sequences,
        context_tokens_per_sequence=context_tokens_per_sequence,
        block_tokens=block_tokens,
        max_lanes=max_lanes,
        step_tokens=1 if step_tokens is None else step_tokens,
    )
    _check_stages(profile, topology, stages)
    nodes, lane_latency_s = _lane_nodes(topology, stages, lane_nodes)
    route = _Route(profile, topology, stages.stages, context_tokens_per_sequence, lane_latency_s)
    memory = _KvMemory(profile, topology, stages.stages, headroom_fraction, step_tokens or 1)
    load = _Load(sequences, -(-context_tokens_per_sequence // block_tokens), block_tokens)
    counts = [
        _lane_count(route, memory, load, lanes) for lanes in range(1, min(max_lanes, sequences) + 1)
    ]
    best = _fastest(counts)
    if best is None:
        raise InfeasiblePlanError(memory.shortfall(counts, load))
    return DecodePlan(
        model=profile.name,
        block_tokens=block_tokens,
        lanes=_placements(best, load, nodes, memory.blocks_per_lane(best, load)),
        period_s=best.period_s,
        latency_s=route.latency_s(best.sequences_per_lane),
        predicted_tokens_per_s=best.tokens_per_s,
        # Rounding alone could put the bound a hair below an optimum that meets it.
        bound_tokens_per_s=max(_bound_tokens_per_s(route, sequences), best.tokens_per_s),
        alternatives=tuple(counts),
    )


class _Load(NamedTuple):
    sequences: int
    blocks_per_sequence: int
    block_tokens: int


class _Route:
    """What one step of a lane costs on its way through the stages."""

    def __init__(
        self,
        profile: ModelProfile,
        topology: Topology,
        stages: Sequence[StagePlacement],
        context_tokens_per_sequence: int,
        lane_latency_s: float,
    ) -> None:
        devices = {device.id: device for device in topology.devices}
        self._costs = [
            stage_cost(devices[stage.device_id], profile, stage.first_layer, stage.end_layer)
            for stage in stages
        ]
        self._context_tokens = context_tokens_per_sequence
        self._row_bytes = profile.hidden_bytes_per_token
        self._lane_latency_s = lane_latency_s
        self._hops = [topology.link(a.node, b.node) for a, b in itertools.pairwise(stages)]
        self._wires: dict[tuple[str, str, int], list[Link]] = {}
        for index, hop in enumerate(self._hops):
            # Hops between the same two nodes share a wire; within a node each has its own socket.
            own = index if hop.source_node == hop.target_node else -1
            self._wires.setdefault((hop.source_node, hop.target_node, own), []).append(hop)

    def stages_s(self, rows: int) -> list[float]:
        """Return the seconds of every stage for a step of `rows` decodes."""
        return [cost.step_s(rows, rows * self._context_tokens) for cost in self._costs]

    def wires_s(self, rows: int) -> list[float]:
        """Return the seconds that a step keeps every wire busy."""
        num_bytes = rows * self._row_bytes
        return [sum(occupied_s(hop, num_bytes) for hop in hops) for hops in self._wires.values()]

    def latency_s(self, rows: int) -> float:
        num_bytes = rows * self._row_bytes
        hops_s = sum(transfer_s(hop, num_bytes) for hop in self._hops)
        return sum(self.stages_s(rows)) + hops_s + self._lane_latency_s

    def cycle_s(self, shares: Sequence[int]) -> float:
        """Return the time in which lanes with these many rows make one step each."""
        seconds = {n: max([*self.stages_s(n), *self.wires_s(n)]) for n in set(shares)}
        longest_s = max(self.latency_s(rows) for rows in seconds)
        return max(math.fsum(seconds[rows] for rows in shares), longest_s)


class _KvMemory:
    """The bytes that every stage has left for KV."""

    def __init__(
        self,
        profile: ModelProfile,
        topology: Topology,
        stages: Sequence[StagePlacement],
        headroom_fraction: float,
        step_tokens: int,
    ) -> None:
        self._profile = profile
        self._stages = stages
        self._headroom_fraction = headroom_fraction
        self._step_tokens = step_tokens
        self._caps = {
            device.id: memory_cap_bytes(device.memory_bytes, headroom_fraction)
            for device in topology.devices
        }

    def free_bytes(self, stage: StagePlacement, rows: int) -> int:
        """Return what weights and the activations of a step leave; negative: they do not fit."""
        first, end = stage.first_layer, stage.end_layer
        step_tokens = max(rows, self._step_tokens)
        return (
            self._caps[stage.device_id]
            - stage_weight_bytes(self._profile, first, end)
            - stage_activation_bytes(
                self._profile, first, end, step_tokens=step_tokens, head_tokens=rows
            )
        )

    def blocks(self, rows: int, load: _Load) -> int | None:
        """Return the blocks that every stage holds, all lanes together; None: without limit."""
        blocks = []
        for stage in self._stages:
            free_bytes, block_bytes = self.free_bytes(stage, rows), self.block_bytes(stage, load)
            if free_bytes < 0:
                return -1
            if block_bytes:
                blocks.append(free_bytes // block_bytes)
        return min(blocks, default=None)

    def block_bytes(self, stage: StagePlacement, load: _Load) -> int:
        return stage_kv_bytes(self._profile, stage.first_layer, stage.end_layer, load.block_tokens)

    def blocks_per_lane(self, count: LaneCount, load: _Load) -> int:
        """Return each lane's share of the blocks, or what its load fills where none are kept."""
        blocks = self.blocks(count.sequences_per_lane, load)
        if blocks is None:
            return count.sequences_per_lane * load.blocks_per_sequence
        return blocks // count.lanes

    def shortfall(self, counts: Sequence[LaneCount], load: _Load) -> str:
        """Say what the tightest stage lacks at the number of lanes that comes closest."""

        def needed_bytes(count: LaneCount, stage: StagePlacement) -> int:
            # Every lane has the blocks of the fullest one.
            blocks = count.lanes * count.sequences_per_lane * load.blocks_per_sequence
            return blocks * self.block_bytes(stage, load)

        def missing_bytes(pair: tuple[LaneCount, StagePlacement]) -> int:
            return needed_bytes(*pair) - self.free_bytes(pair[1], pair[0].sequences_per_lane)

        tightest = [max(((c, s) for s in self._stages), key=missing_bytes) for c in counts]
        count, stage = min(tightest, key=missing_bytes)
        rows = count.sequences_per_lane
        return (
            f"{load.sequences} sequences in {count.lanes} lanes need "
            f"{needed_bytes(count, stage)} bytes of KV on {stage.device_id} "
            f"({load.blocks_per_sequence} blocks of {self.block_bytes(stage, load)} bytes for "
            f"each); it has {self.free_bytes(stage, rows)} left for KV under its cap of "
            f"{self._caps[stage.device_id]} (headroom {self._headroom_fraction:.0%}), and no "
            f"number of lanes fits. Lower sequences ({load.sequences}), "
            f"context_tokens_per_sequence or step_tokens ({max(rows, self._step_tokens)}), or "
            f"give {stage.device_id} fewer layers."
        )


def _lane_count(route: _Route, memory: _KvMemory, load: _Load, lanes: int) -> LaneCount:
    """Price one number of lanes."""
    shares = _even_shares(load.sequences, lanes)
    blocks = memory.blocks(shares[0], load)
    cycle_s = route.cycle_s(shares)
    return LaneCount(
        lanes=lanes,
        sequences_per_lane=shares[0],
        period_s=cycle_s / lanes,
        tokens_per_s=load.sequences / cycle_s,
        fits=blocks is None or blocks // lanes >= shares[0] * load.blocks_per_sequence,
    )


def _fastest(counts: Sequence[LaneCount]) -> LaneCount | None:
    """Return the fewest lanes among the fastest counts that fit; None: none fits."""
    fitting = [count for count in counts if count.fits]
    fastest = max((count.tokens_per_s for count in fitting), default=0.0)
    equal = (count for count in fitting if count.tokens_per_s >= fastest * (1.0 - ROUNDING))
    return next(equal, None)


def _placements(
    count: LaneCount, load: _Load, nodes: Sequence[str], kv_blocks: int
) -> tuple[LanePlacement, ...]:
    return tuple(
        LanePlacement(index=i, node=nodes[i % len(nodes)], sequences=rows, kv_blocks=kv_blocks)
        for i, rows in enumerate(_even_shares(load.sequences, count.lanes))
    )


def _even_shares(sequences: int, lanes: int) -> list[int]:
    """Return how many sequences each lane gets, the larger shares first."""
    each, over = divmod(sequences, lanes)
    return [each + 1] * over + [each] * (lanes - over)


def _bound_tokens_per_s(route: _Route, sequences: int) -> float:
    """Return a rate that no lanes can beat: the least of three.

    - A stage: whatever the lanes' rows, it yields at most the best of rows / seconds.
    - A wire: bytes per second over bytes per row.
    - The latency: no sequence gets its next token before the fastest possible step is back.
    """
    every = range(1, sequences + 1)
    stage_rates = [[rows / seconds for seconds in route.stages_s(rows)] for rows in every]
    best_of_stages = [max(rates) for rates in zip(*stage_rates, strict=True)]
    wire_rates = [1.0 / seconds for seconds in route.wires_s(1)]
    latency_s = min(route.latency_s(rows) for rows in every)
    return float(min([*best_of_stages, *wire_rates, sequences / latency_s]))


def _lane_nodes(
    topology: Topology, stages: StagesPlan, lane_nodes: Sequence[str] | None
) -> tuple[list[str], float]:
    """Return the nodes nearest to the first and last stage, by name, and their round trip."""
    nodes = {device.node for device in topology.devices} if lane_nodes is None else set(lane_nodes)
    if not nodes:
        raise ValueError("lane_nodes names 0 nodes; name at least 1, or leave it out")
    first, last = stages.stages[0].node, stages.stages[-1].node
    trips: list[tuple[float, str]] = []
    for node in sorted(nodes):
        there, back = topology.rate(node, first), topology.rate(last, node)
        if there is not None and back is not None:
            trips.append((there.latency_s + back.latency_s, node))
    if not trips:
        raise InfeasiblePlanError(
            f"none of {len(nodes)} lane nodes ({', '.join(sorted(nodes))}) reaches {first} and is "
            f"reached from {last}; declare the links, set default_link, or name other lane_nodes"
        )
    shortest_s, _ = min(trips)
    return [node for seconds, node in trips if seconds == shortest_s], shortest_s


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")


def _check_stages(profile: ModelProfile, topology: Topology, stages: StagesPlan) -> None:
    ends = [0, *(stage.end_layer for stage in stages.stages)]
    starts = [*(stage.first_layer for stage in stages.stages), profile.num_layers]
    if ends != starts:
        raise ValueError(
            f"the stages of {stages.model} cover {ends[-1]} layers and {profile.name} has "
            f"{profile.num_layers}; plan the stages of this model"
        )
    known = {device.id for device in topology.devices}
    if missing := sorted({stage.device_id for stage in stages.stages} - known):
        raise ValueError(
            f"{len(missing)} stages are on devices the topology lacks ({', '.join(missing)}); "
            f"plan the stages again over these {len(known)} devices"
        )
