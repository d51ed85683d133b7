"""How a sender divides the rows of one layer's call: derived from the map and the counts alone.

Many rows are weighed anew over the replicas of their experts, for these very rows, so that the
slowest device finishes first (`RoutingTable.balanced_rows`). Few rows go whole to one replica of
each activated expert, chosen by what the layer takes: experts read and messages sent
(`placement.sharding.few_rows`). Rows are few when the activated experts have no more of them each
than what is computed while an expert's weights are read. Where many rows surprise the map, experts
may be guests elsewhere on their node for the call (`placement.sharding.reactive`). No leader and no
state: the same map, sender's node and counts give the same answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np

from placement.sharding.expert_map import ExpertMap
from placement.sharding.few_rows import StepCosts, choose_replicas
from placement.sharding.reactive import ReactiveTerms, plan_reactive
from placement.sharding.routing import RoutingTable, Rows

MESSAGE_S = 2e-4
"""The sender's time for one more message to another machine: packed, encrypted and queued."""


class Part(NamedTuple):
    """Consecutive rows of one expert, for one device."""

    device_id: str
    expert: int
    rows: int
    is_guest: bool = False
    """The device takes the expert in for this call; the map does not have it there."""


class RowDivision:
    """Divides rows by one version of the map, for senders of one node.

    Args:
        current: The map.
        node: The senders'.
        latency_s: By other node: a message there and back, without its bytes.
        guests: When experts may be guests, and how many; None: never.
    """

    def __init__(
        self,
        current: ExpertMap,
        node: str,
        latency_s: Mapping[str, float],
        guests: ReactiveTerms | None = None,
    ) -> None:
        self.map = current
        self._guests = guests
        self._speeds = [device.rows_per_s for device in current.devices]
        self._costs = StepCosts(
            nodes=tuple(device.node for device in current.devices),
            read_s=tuple(device.expert_read_s or 0.0 for device in current.devices),
            latency_s=tuple(
                0.0 if device.node == node else latency_s.get(device.node, 0.0)
                for device in current.devices
            ),
            message_s={d.node: MESSAGE_S for d in current.devices if d.node != node},
        )
        self._few_rows = median(
            (device.expert_read_s or 0.0) * device.rows_per_s for device in current.devices
        )
        """Of one expert, computed while its weights are read on a middling device."""
        self._tables: dict[int, tuple[RoutingTable, list[list[int]]]] = {}

    def divide(
        self, layer: int, counts_E: Sequence[int], *, with_guests: bool = True
    ) -> list[Part]:
        """Cut a layer's rows, `counts_E[expert]` of each: by expert.

        `layer` counts the layers with experts. Milliseconds for hundreds of experts.
        """
        table, holders = self._table(layer)
        activated = [expert for expert, rows in enumerate(counts_E) if rows]
        ids = self.map.device_ids
        if sum(counts_E) <= self._few_rows * len(activated):
            chosen = choose_replicas(activated, holders, self._costs)
            return [Part(ids[chosen[expert]], expert, counts_E[expert]) for expert in activated]
        rows_R = np.array(counts_E, dtype=np.int64)
        if len(table.expert_R) > len(holders):
            rows_R = table.balanced_rows(rows_R, self._speeds)
        hosts = self._hosts_of_guests(table, rows_R) if with_guests else {}
        taken = np.flatnonzero(rows_R)
        copies = zip(table.device_R[taken].tolist(), table.expert_R[taken].tolist(), strict=True)
        return [
            Part(ids[hosts.get((device, expert), device)], expert, rows, (device, expert) in hosts)
            for (device, expert), rows in zip(copies, rows_R[taken].tolist(), strict=True)
        ]

    def _hosts_of_guests(self, table: RoutingTable, rows_R: Rows) -> dict[tuple[int, int], int]:
        """Return, by (device, expert) of the replicas that leave, where their rows go."""
        if self._guests is None or rows_R.max() < self._guests.least_rows:
            return {}
        plan = plan_reactive(table, rows_R, self.map.devices, self._guests)
        return {(move.source, move.expert): move.target for move in plan.moves}

    def _table(self, layer: int) -> tuple[RoutingTable, list[list[int]]]:
        if layer not in self._tables:
            table = RoutingTable.of_layer(self.map.layers[layer], self.map.num_experts)
            self._tables[layer] = table, table.holders()
        return self._tables[layer]
