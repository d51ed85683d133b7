"""The HTTP front: the OpenAI API, and what an operator reads.

    POST /v1/completions  POST /v1/chat/completions   whole, or as server-sent events
    GET  /v1/models       GET  /v1/models/{id}
    GET  /v1/adapter      POST /v1/adapter      DELETE /v1/adapter     what `motley publish` calls
    GET  /                a page that shows the rest; with /health all that needs no token
    GET  /health          alive
    GET  /ready           200 when every stage is active, else 503 with the progress
    GET  /status          GET  /plan  GET  /metrics  GET  /dashboard.json
    GET  /controller      POST /controller/rebalance  POST /controller/drain

Which scope each needs stands beside it in `_Routes`; one without cannot be added.

A codec around `GatewayService`; checks and defaults live there, errors in `http_guard`. A client
that disconnects aborts its requests, streamed or not.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from actors.engine.adapter import Adapter, AdapterError
from actors.engine.requests import RequestError
from cluster.backend import AdapterStatus, ModelInfo, PublishFailed, PublishInProgress, Unavailable
from cluster.gateway.access import PUBLIC_PATHS, Access, Forbidden, Need, Unauthenticated
from cluster.gateway.controller_routes import ControllerRoutes
from cluster.gateway.dashboard_routes import DashboardRoutes
from cluster.gateway.http_guard import (
    AccessMiddleware,
    BodyLimit,
    BodyTooLarge,
    BodyTooSlow,
    ClientGone,
    InvalidBody,
    Needs,
    describe,
    read_body,
    read_bytes,
    retry_after,
    source_of,
    until_disconnect,
)
from cluster.gateway.openai_calls import Call, chat_call, completion_call, streamed, whole
from cluster.gateway.openai_format import AnswerHead
from cluster.gateway.openai_schema import ChatBody, CompletionBody
from cluster.gateway.service import GatewayService, GenerationFailed, NotFound
from cluster.gateway.sse import EventStream
from cluster.telemetry import METRICS_CONTENT_TYPE

_RETRY_READY_S = 2.0
_NAME_HEADER = "idempotency-key"
"""Of a request that its client may send again; see `cluster.resuming`."""
_CLIENT_CLOSED = 499  # nginx's code; nobody is left to read it


def unix_s() -> int:
    """Return the wall clock, as OpenAI's `created` wants it."""
    return int(datetime.now(UTC).timestamp())


def _name(request: Request) -> str | None:
    """Return the name that a client gives its request; None: it gives none."""
    name = request.headers.get(_NAME_HEADER)
    if name is not None and not name.strip():
        raise RequestError(
            f"the header {_NAME_HEADER} is empty; give 1 to 100 letters, digits and . _ : -, or "
            f"leave it out",
            _NAME_HEADER,
        )
    return name


def make_http_app(
    service: GatewayService,
    access: Access,
    *,
    request_limit: BodyLimit,
    adapter_limit: BodyLimit,
    new_id: Callable[[], str] = lambda: secrets.token_hex(16),
    clock_unix_s: Callable[[], int] = unix_s,
) -> FastAPI:
    """Return the ASGI application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(AccessMiddleware, access=access)
    routes = _Routes(service, request_limit, adapter_limit, new_id, clock_unix_s)
    app.include_router(routes.router())
    for kind in (
        RequestError,
        InvalidBody,
        NotFound,
        BodyTooLarge,
        BodyTooSlow,
        Unauthenticated,
        Unavailable,
        GenerationFailed,
        AdapterError,
        PublishInProgress,
        PublishFailed,
        HTTPException,
        Exception,  # logged by uvicorn, which sees it too
    ):
        app.add_exception_handler(kind, _error_response)

    async def forbidden(request: Request, error: Exception) -> Response:
        what = f"{request.method} {request.url.path}"
        await access.note_refusal(error, source_of(request.scope), what)
        return describe(error).response()

    app.add_exception_handler(Forbidden, forbidden)
    for kind in (ClientGone, ClientDisconnect):
        app.add_exception_handler(kind, _nobody_left)
    return app


async def _error_response(_request: Request, error: Exception) -> Response:
    return describe(error).response()


async def _nobody_left(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED)


class _Routes:
    """The endpoints of one service."""

    def __init__(
        self,
        service: GatewayService,
        request_limit: BodyLimit,
        adapter_limit: BodyLimit,
        new_id: Callable[[], str],
        clock_unix_s: Callable[[], int],
    ) -> None:
        self._service = service
        self._request_limit = request_limit
        self._adapter_limit = adapter_limit
        self._dashboard = DashboardRoutes(service)
        self._controller = ControllerRoutes(service, request_limit)
        self._new_id = new_id
        self._clock_unix_s = clock_unix_s

    def router(self) -> APIRouter:
        router = APIRouter()
        routes: list[tuple[str, str, Need, Callable[..., Awaitable[Response]]]] = [
            ("GET", "/", "public", self._dashboard.page),
            ("GET", "/dashboard.json", "any", self._dashboard.document),
            ("GET", "/controller", "any", self._controller.state),
            ("POST", "/controller/rebalance", "admin", self._controller.rebalance),
            ("POST", "/controller/drain", "admin", self._controller.drain),
            ("GET", "/health", "public", self.health),
            ("GET", "/ready", "any", self.ready),
            ("GET", "/status", "any", self.status),
            ("GET", "/plan", "any", self.plan),
            ("GET", "/metrics", "any", self.metrics),
            ("GET", "/v1/models", "any", self.models),
            ("GET", "/v1/models/{model_id:path}", "any", self.model),  # names hold slashes
            ("POST", "/v1/completions", "generate", self.completions),
            ("POST", "/v1/chat/completions", "generate", self.chat_completions),
            ("GET", "/v1/adapter", "any", self.adapter),
            ("POST", "/v1/adapter", "admin", self.publish_adapter),
            ("DELETE", "/v1/adapter", "admin", self.remove_adapter),
        ]
        for method, path, need, endpoint in routes:
            assert (need == "public") == (path in PUBLIC_PATHS), path
            router.add_api_route(
                path,
                endpoint,
                methods=[method],
                response_model=None,
                dependencies=[Depends(Needs(need))],
            )
        return router

    async def completions(self, request: Request) -> Response:
        body = await read_body(request, CompletionBody, limit=self._request_limit)
        name = _name(request)
        head = self._head("cmpl", name)
        call = await completion_call(self._service, body, head, is_named=name is not None)
        return await self._answer(request, call, stream=bool(body.stream))

    async def chat_completions(self, request: Request) -> Response:
        body = await read_body(request, ChatBody, limit=self._request_limit)
        name = _name(request)
        head = self._head("chatcmpl", name)
        call = await chat_call(self._service, body, head, is_named=name is not None)
        return await self._answer(request, call, stream=bool(body.stream))

    async def _answer(self, request: Request, call: Call, *, stream: bool) -> Response:
        if stream:
            return EventStream(streamed(self._service, call))
        return JSONResponse(await until_disconnect(request.receive, whole(self._service, call)))

    def _head(self, prefix: str, name: str | None) -> AnswerHead:
        return AnswerHead(
            id=f"{prefix}-{self._new_id() if name is None else name}",
            created_unix_s=self._clock_unix_s(),
            model=self._service.model_info().name,
        )

    async def adapter(self) -> Response:
        body = asdict(self._service.adapter()) | {"max_bytes": self._adapter_limit.max_bytes}
        return JSONResponse(body)

    async def publish_adapter(self, request: Request) -> Response:
        body = await read_bytes(request, limit=self._adapter_limit)
        adapter = await asyncio.to_thread(Adapter.decode, memoryview(body))
        return JSONResponse(asdict(await self._service.publish(adapter)))

    async def remove_adapter(self) -> Response:
        return JSONResponse(asdict(await self._service.publish(None)))

    async def models(self) -> Response:
        data = [_model(self._service.model_info(), self._service.adapter())]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, model_id: str) -> Response:
        self._service.check_model(model_id)
        return JSONResponse(_model(self._service.model_info(), self._service.adapter()))

    async def health(self) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(self) -> Response:
        status = await self._service.status()
        is_ready = status.ready and all(stage.active for stage in status.stages)
        body = {
            "ready": is_ready,
            "reason": status.reason,
            "progress": status.progress,
            "stages": [
                {
                    "index": stage.index,
                    "device": stage.device,
                    "active": stage.active,
                    "loaded_fraction": stage.loaded_fraction,
                }
                for stage in status.stages
            ],
        }
        if is_ready:
            return JSONResponse(body)
        return JSONResponse(body, 503, headers={"Retry-After": retry_after(_RETRY_READY_S)})

    async def status(self) -> Response:
        return JSONResponse(asdict(await self._service.status()))

    async def plan(self) -> Response:
        return JSONResponse(self._service.plan())

    async def metrics(self) -> Response:
        text = await self._service.render_metrics()
        return Response(text, media_type=METRICS_CONTENT_TYPE)


def _model(info: ModelInfo, adapter: AdapterStatus) -> dict[str, Any]:
    return {
        "id": info.name,
        "object": "model",
        "created": info.created_unix_s,
        "owned_by": "motley",
        "max_model_len": info.max_model_tokens,
        "adapter": asdict(adapter),
    }
