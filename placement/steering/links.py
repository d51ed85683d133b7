"""What links do while they serve: which ones a round of probes times, and what to make of it.

A probe shares its link with the deployment's own traffic, which can make the link look worse than
it is and never better. So of the last few probes of a link the largest bandwidth and the least
round trip count, as in BBR (Cardwell et al., 2016): a link that got better is believed at once, one
that got worse when every probe of a full window says so.

Links seldom change alone: a node's cable or radio carries all of its own. Were one direction told
before the others are known, the best plan would merely turn round and cross the same cable the
other way; so whatever surprises has the links around it timed in the same round.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

from placement.topology import Link, LinkRate, Topology

NUM_PROBES = 3
"""Of the window. With one more, traffic hides a slow link for one round less likely, and a slow
link is believed one round later."""
TOLERANCE_FRACTION = 0.25
"""A figure within this share of what is planned with is no news: probes scatter by as much."""
LEAST_LATENCY_CHANGE_S = 5e-4
"""Below this a round trip tells how busy the processors are."""
MOST_OTHERS = 2
"""Links outside the plan in force that a round times."""

Pair = tuple[str, str]
"""Source node and target node."""


class _Probe(NamedTuple):
    bandwidth_bytes_per_s: float
    latency_s: float


class Finding(NamedTuple):
    """What a probe has shown."""

    link: Link | None
    """To plan with from now on; None: as before."""
    is_surprise: bool
    """The probe by itself is not what is planned with: see `pairs_around`."""


class LinkEstimates:
    """Knows what the controller plans with, and what the last probes of each link have shown.

    Args:
        topology: What the controller was made with.
        num_probes: Probes of a link that count.
        tolerance_fraction: Differences of this share and less are kept back.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        num_probes: int = NUM_PROBES,
        tolerance_fraction: float = TOLERANCE_FRACTION,
    ) -> None:
        if num_probes < 1:
            raise ValueError(f"num_probes ({num_probes}) must be at least 1")
        if not tolerance_fraction >= 0:
            raise ValueError(f"tolerance_fraction ({tolerance_fraction}) must be 0 or more")
        self._planned = topology
        self._num_probes = num_probes
        self._tolerance_fraction = tolerance_fraction
        self._probes: dict[Pair, deque[_Probe]] = {}

    def observe(
        self, source: str, target: str, *, rtt_s: float, bandwidth_bytes_per_s: float
    ) -> Finding:
        """Take in a probe. One of a node to itself, or of nodes that are declared not to reach each
        other, shows nothing."""
        planned = self._planned.rate(source, target)
        if planned is None or source == target:
            return Finding(None, is_surprise=False)
        probe = _Probe(bandwidth_bytes_per_s, rtt_s / 2)
        is_surprise = self._is_news(probe, planned)
        probes = self._probes.setdefault((source, target), deque(maxlen=self._num_probes))
        probes.append(probe)
        link = self._estimate((source, target))
        if len(probes) < self._num_probes:
            link = replace(
                link,
                bandwidth_bytes_per_s=max(
                    link.bandwidth_bytes_per_s, planned.bandwidth_bytes_per_s
                ),
                latency_s=min(link.latency_s, planned.latency_s),
            )
        if not self._is_news(link, planned):
            return Finding(None, is_surprise)
        others = [each for each in self._planned.links if _ends(each) != (source, target)]
        self._planned = replace(self._planned, links=(*others, link))
        return Finding(link, is_surprise)

    def measured(self) -> tuple[Link, ...]:
        """Return what the probes of every link amount to, by its nodes."""
        return tuple(self._estimate(pair) for pair in sorted(self._probes))

    def rejoin(self, node: str, topology: Topology) -> None:
        """A node joins (again): the controller takes its links from `topology`, and the probes of
        before say nothing about them. Other links stay as measured."""
        kept = [link for link in self._planned.links if node not in _ends(link)]
        fresh = [link for link in topology.links if node in _ends(link)]
        known = {_ends(link) for link in (*kept, *fresh)}
        others = [link for link in topology.links if _ends(link) not in known]
        self._planned = replace(topology, links=(*kept, *fresh, *others))
        self._probes = {pair: old for pair, old in self._probes.items() if node not in pair}

    def _estimate(self, pair: Pair) -> Link:
        probes = self._probes[pair]
        return Link(
            source_node=pair[0],
            target_node=pair[1],
            bandwidth_bytes_per_s=max(probe.bandwidth_bytes_per_s for probe in probes),
            latency_s=min(probe.latency_s for probe in probes),
        )

    def _is_news(self, link: Link | _Probe, planned: LinkRate) -> bool:
        rates = link.bandwidth_bytes_per_s, planned.bandwidth_bytes_per_s
        if max(rates) > (1 + self._tolerance_fraction) * min(rates):
            return True
        latencies_s = link.latency_s, planned.latency_s
        change_s = max(latencies_s) - min(latencies_s)
        return change_s > max(LEAST_LATENCY_CHANGE_S, self._tolerance_fraction * min(latencies_s))


def pairs_in_use(stage_nodes: Sequence[str], lane_node: str) -> list[Pair]:
    """Return the links that a step takes: from the lanes through the stages and back."""
    path = [lane_node, *stage_nodes, lane_node]
    return list(dict.fromkeys(pair for pair in itertools.pairwise(path) if pair[0] != pair[1]))


def other_pairs(
    nodes: Collection[str], in_use: Collection[Pair], round_number: int, most: int = MOST_OTHERS
) -> list[Pair]:
    """Return a round's share of the links that no step takes; the rounds come to all of them."""
    others = [pair for pair in itertools.permutations(sorted(nodes), 2) if pair not in in_use]
    if len(others) <= most:
        return others
    first = round_number * most
    return [others[(first + index) % len(others)] for index in range(most)]


def pairs_around(pair: Pair, nodes: Collection[str]) -> list[Pair]:
    """Return the links between these nodes and the ends of a link, both ways, but for itself."""
    near = sorted({*nodes, *pair})
    around = [each for each in itertools.permutations(near, 2) if set(each) & set(pair)]
    return [each for each in around if each != pair]


def _ends(link: Link) -> Pair:
    return link.source_node, link.target_node
