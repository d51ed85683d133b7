"""Experts on several devices of one process, for tests and for machines with several cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from actors.engine.expert_calls import Routes, shares
from actors.engine.expert_host import ExpertHost
from actors.engine.row_spans import gather, scatter


class LocalDispatcher:
    """Sends rows to hosts of this process, by the routes in force.

    `routes` may be replaced at any time; a call ends with those it began with.
    """

    def __init__(
        self, hosts: Mapping[str, ExpertHost], routes: Routes, *, is_frozen: bool = False
    ) -> None:
        """`hosts` by the device ids of the routes."""
        self.is_frozen = is_frozen
        self._hosts = hosts
        self.routes = routes

    def run(self, layer: int, counts_E: Sequence[int], rows_SH: torch.Tensor) -> torch.Tensor:
        """Run rows on the devices that the routes name.

        Raises:
            ExpertError: A device does not hold what the routes say.
        """
        routes = self.routes
        out_SH = torch.empty_like(rows_SH)
        for (device, experts, guests), spans in shares(counts_E, routes, layer):
            rows = gather(rows_SH, spans)
            part = self._hosts[device].run(routes.version, layer, experts, rows, guests=guests)
            scatter(out_SH, spans, part)
        return out_SH

    def backward(
        self,
        layer: int,
        counts_E: Sequence[int],
        rows_SH: torch.Tensor,
        gradient_SH: torch.Tensor,
    ) -> torch.Tensor:
        """Return the rows' gradient; the weights' gradients stay with the hosts.

        Raises:
            ExpertError: As `run`.
        """
        routes = self.routes
        out_SH = torch.empty_like(rows_SH)
        for (device, experts, _), spans in shares(counts_E, routes, layer, with_guests=False):
            part = self._hosts[device].backward(
                routes.version, layer, experts, gather(rows_SH, spans), gather(gradient_SH, spans),
                of_weights=not self.is_frozen,
            )  # fmt: skip
            scatter(out_SH, spans, part)
        return out_SH
