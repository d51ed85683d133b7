"""Experts on several devices of one process, for tests and for machines with several cards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from actors.engine.expert_calls import Routes, Span, shares
from actors.engine.expert_host import ExpertHost


class LocalDispatcher:
    """Sends rows to hosts of this process, by the routes in force.

    `routes` may be replaced at any time; a call ends with those it began with.
    """

    def __init__(self, hosts: Mapping[str, ExpertHost], routes: Routes) -> None:
        """`hosts` by the device ids of the routes."""
        self._hosts = hosts
        self.routes = routes

    def run(self, layer: int, counts_E: Sequence[int], rows_SH: torch.Tensor) -> torch.Tensor:
        """Run rows on the devices that the routes name.

        Raises:
            ExpertError: A device does not hold what the routes say.
        """
        routes = self.routes
        out_SH = torch.empty_like(rows_SH)
        for (device, experts), spans in shares(counts_E, routes, layer):
            part = self._hosts[device].run(routes.version, layer, experts, gather(rows_SH, spans))
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
        for (device, experts), spans in shares(counts_E, routes, layer):
            part = self._hosts[device].backward(
                routes.version, layer, experts, gather(rows_SH, spans), gather(gradient_SH, spans)
            )
            scatter(out_SH, spans, part)
        return out_SH


def gather(rows_SH: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
    """Return the rows of spans, one after another; of one span without copying."""
    if len(spans) == 1:
        return rows_SH[spans[0].start : spans[0].end]
    return torch.cat([rows_SH[start:end] for start, end in spans])


def scatter(out_SH: torch.Tensor, spans: Iterable[Span], part_SH: torch.Tensor) -> None:
    """Put rows back where `gather` took them from."""
    at = 0
    for start, end in spans:
        out_SH[start:end] = part_SH[at : at + end - start]
        at += end - start
