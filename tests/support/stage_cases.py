"""Small serving questions, and every cut that answers them, priced one by one.

The enumeration knows nothing of the planner: it prices with `placement.costs` only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hypothesis import strategies as st

from placement.costs import (
    memory_cap_bytes,
    occupied_s,
    stage_activation_bytes,
    stage_kv_bytes,
    stage_step_s,
    stage_weight_bytes,
    transfer_s,
)
from placement.stages import StagesPlan
from placement.topology import GIGABIT, Device, Link, LinkRate, Topology
from placement.workload import LayerCost, ModelProfile, ServingWorkload

NODES = ("w", "x", "y", "z")
CLOSE = 1e-8
"""Figures this close, in proportion, count as equal here."""


@dataclass(frozen=True)
class Case:
    """One planning question."""

    profile: ModelProfile
    topology: Topology
    workload: ServingWorkload
    headroom_fraction: float

    @property
    def devices(self) -> tuple[Device, ...]:
        return self.topology.devices

    @property
    def has_energy(self) -> bool:
        return all(device.active_power_w for device in self.devices)

    def in_order(self) -> list[tuple[Device, ...]]:
        """Return every choice of devices, in the order given."""
        sizes = range(1, len(self.devices) + 1)
        return [each for size in sizes for each in itertools.combinations(self.devices, size)]

    def in_any_order(self) -> list[tuple[Device, ...]]:
        """Return every choice of devices, in every order."""
        sizes = range(1, len(self.devices) + 1)
        return [each for size in sizes for each in itertools.permutations(self.devices, size)]


class CutFigures(NamedTuple):
    """What one cut costs."""

    period_s: float
    latency_s: float
    energy_j: float
    """Per token; 0 for devices of unknown power."""
    bottleneck_s: float
    counts: tuple[int, ...]
    """Layers of every device of the topology, in its order."""

    @property
    def num_stages(self) -> int:
        return sum(count > 0 for count in self.counts)


def every_cut(case: Case, orders: Iterable[Sequence[Device]]) -> list[CutFigures]:
    """Price every cut along some orders of devices, all of which are used."""
    return [
        figures
        for order in orders
        for counts in _compositions(case.profile.num_layers, len(order))
        if (figures := _figures(case, order, counts)) is not None
    ]


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    for inner in itertools.combinations(range(1, total), parts - 1):
        edges = (0, *inner, total)
        yield tuple(end - first for first, end in itertools.pairwise(edges))


def _figures(case: Case, order: Sequence[Device], counts: Sequence[int]) -> CutFigures | None:
    rows, steps_s, energy_j, first = case.workload.sequences_per_lane, [], 0.0, 0
    for device, count in zip(order, counts, strict=True):
        end = first + count
        cap_bytes = memory_cap_bytes(device.memory_bytes, case.headroom_fraction)
        if need_bytes(case, first, end) > cap_bytes:
            return None
        step_s = stage_step_s(
            device,
            case.profile,
            first,
            end,
            tokens=rows,
            context_tokens=case.workload.context_tokens,
            head_tokens=rows,
        )
        steps_s.append(step_s)
        energy_j += (device.active_power_w or 0.0) * step_s
        first = end
    rates = [case.topology.rate(a.node, b.node) for a, b in itertools.pairwise(order)]
    joined = [rate for rate in rates if rate is not None]
    if len(joined) < len(rates):
        return None
    num_bytes = rows * case.profile.hidden_bytes_per_token
    latency_s = sum(steps_s) + sum(transfer_s(rate, num_bytes) for rate in joined)
    busy_s = [occupied_s(rate, num_bytes) for rate in joined]
    period_s = max(*steps_s, *busy_s, latency_s / case.workload.lanes)
    by_id = dict(zip((device.id for device in order), counts, strict=True))
    return CutFigures(
        period_s,
        latency_s,
        energy_j / rows,
        max(steps_s),
        tuple(by_id.get(device.id, 0) for device in case.devices),
    )


def need_bytes(case: Case, first: int, end: int) -> int:
    """Return the bytes of a stage: weights, KV and activations."""
    return (
        stage_weight_bytes(case.profile, first, end)
        + stage_kv_bytes(case.profile, first, end, case.workload.kv_tokens)
        + stage_activation_bytes(
            case.profile,
            first,
            end,
            step_tokens=case.workload.step_tokens,
            head_tokens=case.workload.sequences_per_lane,
        )
    )


def is_close(a: float, b: float) -> bool:
    return abs(a - b) <= CLOSE * max(abs(a), abs(b))


def assert_plan_holds(plan: StagesPlan, case: Case) -> None:
    """Each layer once and in order, no cap exceeded, everyone in a stage or left out."""
    by_id = {device.id: device for device in case.devices}
    edges = [0, *(stage.end_layer for stage in plan.stages)]
    assert [stage.first_layer for stage in plan.stages] == edges[:-1]
    assert edges[-1] == case.profile.num_layers
    for stage in plan.stages:
        cap = memory_cap_bytes(by_id[stage.device_id].memory_bytes, case.headroom_fraction)
        assert stage.memory_cap_bytes == cap
        assert stage.need_bytes == need_bytes(case, stage.first_layer, stage.end_layer) <= cap
    used = [stage.device_id for stage in plan.stages]
    assert sorted(used + [device_id for device_id, _ in plan.left_out]) == sorted(by_id)
    assert plan.kv_tokens_capacity >= case.workload.kv_tokens


_layers = st.lists(
    st.builds(
        LayerCost,
        flops_per_token=st.sampled_from([10.0, 500.0]),
        weight_bytes=st.sampled_from([100, 250, 400]),
        kv_bytes_per_token=st.integers(0, 3),
    ),
    min_size=1,
    max_size=5,
)
_figures_of_devices = st.lists(
    st.tuples(
        st.sampled_from(NODES),
        st.sampled_from([100.0, 200.0, 1000.0]),
        st.sampled_from([100.0, 300.0, 1000.0]),
        st.one_of(st.integers(300, 2500), st.sampled_from([900, 10**6])),
        st.sampled_from([1.0, 5.0, 20.0]),
    ),
    min_size=1,
    max_size=4,
)
_links = st.dictionaries(
    st.tuples(st.sampled_from(NODES), st.sampled_from(NODES)),
    st.tuples(st.sampled_from([1.0, 10.0, 1000.0]), st.sampled_from([0.0, 0.5, 3.0])),
    max_size=6,
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to 5 unequal layers and 4 devices on 4 nodes; links, caps and lanes that bind."""
    head_bytes = draw(st.sampled_from([1, 150, 900]))
    profile = ModelProfile(
        name="toy",
        embedding=LayerCost(flops_per_token=0, weight_bytes=draw(st.sampled_from([1, 400]))),
        layers=tuple(draw(_layers)),
        head=LayerCost(
            flops_per_token=draw(st.sampled_from([1.0, 300.0])), weight_bytes=head_bytes
        ),
        hidden_bytes_per_token=draw(st.sampled_from([1, 8])),
        head_is_embedding=draw(st.booleans()),
    )
    has_power = draw(st.integers(0, 4)) > 0
    devices = tuple(
        Device(
            id=f"d{index}",
            node=node,
            kind="paced",
            flops_per_s=flops,
            memory_bytes_per_s=rate,
            memory_bytes=memory,
            active_power_w=watts if has_power else None,
        )
        for index, (node, flops, rate, memory, watts) in enumerate(draw(_figures_of_devices))
    )
    links = tuple(
        Link(source_node=a, target_node=b, bandwidth_bytes_per_s=bandwidth, latency_s=latency)
        for (a, b), (bandwidth, latency) in draw(_links).items()
    )
    slow = LinkRate(bandwidth_bytes_per_s=5.0, latency_s=1.0)
    topology = Topology(
        devices=devices, links=links, default_link=draw(st.sampled_from([GIGABIT, None, slow]))
    )
    workload = ServingWorkload(
        lanes=draw(st.sampled_from([1, 2, 3, 50])),
        sequences_per_lane=draw(st.integers(1, 2)),
        context_tokens_per_sequence=draw(st.sampled_from([1, 7])),
        kv_tokens=draw(st.sampled_from([1, 10, 40])),
        step_tokens=2,
    )
    return Case(profile, topology, workload, draw(st.sampled_from([0.1, 0.5])))


def large_case(num_devices: int, num_nodes: int, *, lanes: int, memory_bytes: float) -> Case:
    """94 layers, the first two dense and the others of 128 experts, on devices all different."""
    dense = LayerCost(
        flops_per_token=1.2e9,
        weight_bytes=400_000_000,
        kv_bytes_per_token=2048,
        attention_flops_per_context_token=16384.0,
    )
    routed = LayerCost(
        flops_per_token=1.2e9,
        weight_bytes=2_500_000_000,
        kv_bytes_per_token=2048,
        attention_flops_per_context_token=16384.0,
        routed_bytes=2_300_000_000,
        num_experts=128,
        experts_per_token=8,
    )
    head = LayerCost(flops_per_token=1.2e9, weight_bytes=1_200_000_000)
    devices = tuple(
        Device(
            id=f"d{index:03}",
            node=f"n{index % num_nodes:03}",
            kind="cuda",
            # Steps coprime with the counts spread the figures without a pattern.
            flops_per_s=80e12 * (0.3 + 2.7 * (index * 37 % num_devices) / num_devices),
            memory_bytes_per_s=900e9 * (0.3 + 2.7 * (index * 37 % num_devices) / num_devices),
            memory_bytes=int(memory_bytes * (0.6, 1.0, 2.0)[index * 7 % 3]),
            active_power_w=100.0 + 300.0 * (index * 11 % num_devices) / num_devices,
        )
        for index in range(num_devices)
    )
    links = tuple(
        Link(
            source_node=f"n{a:03}",
            target_node=f"n{b:03}",
            bandwidth_bytes_per_s=(1e8, 1e9, 5e9)[(a + b) % 3],
            latency_s=(1e-4, 5e-4, 2e-3)[(a * b) % 3],
        )
        for a in range(min(num_nodes, 20))
        for b in range(a)
    )
    return Case(
        ModelProfile(
            name="moe94",
            embedding=LayerCost(flops_per_token=0, weight_bytes=1_200_000_000),
            layers=(dense, dense, *[routed] * 92),
            head=head,
            hidden_bytes_per_token=8192,
        ),
        Topology(devices=devices, links=links),
        ServingWorkload(
            lanes=lanes,
            sequences_per_lane=8,
            context_tokens_per_sequence=4096,
            kv_tokens=lanes * 8 * 4096,
            step_tokens=512,
        ),
        0.1,
    )
