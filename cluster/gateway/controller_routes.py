"""What an operator asks of the controller, over HTTP.

GET  /controller             what it is doing, and what it would do now
POST /controller/rebalance   {"dry_run": false}, or nothing: move to the best plan now, if it gains
POST /controller/drain       {"node": ..., "cancel": false}: let a node hold nothing
"""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from cluster.gateway.http_guard import BodyLimit, read_body
from cluster.gateway.service import GatewayService


class DrainBody(BaseModel):
    """Which node."""

    model_config = ConfigDict(extra="forbid")

    node: str = Field(min_length=1, max_length=256)
    cancel: bool = False
    """Use it again."""


class RebalanceBody(BaseModel):
    """May be left out."""

    model_config = ConfigDict(extra="forbid")

    dry_run: bool = False
    """Move nothing."""


class ControllerRoutes:
    """The endpoints of one service."""

    def __init__(self, service: GatewayService, limit: BodyLimit) -> None:
        self._service = service
        self._limit = limit

    async def state(self) -> Response:
        return JSONResponse(
            {
                "controller": self._service.controller(),
                "would": await self._service.would_move(),
            }
        )

    async def rebalance(self, request: Request) -> Response:
        body = await read_body(request, RebalanceBody, limit=self._limit, empty=RebalanceBody())
        if body.dry_run:
            return JSONResponse({"would": await self._service.would_move()})
        return JSONResponse({"would": await self._service.rebalance()}, 202)

    async def drain(self, request: Request) -> Response:
        body = await read_body(request, DrainBody, limit=self._limit)
        await self._service.drain_node(body.node, cancel=body.cancel)
        return JSONResponse({"node": body.node, "cancelled": body.cancel}, 202)
