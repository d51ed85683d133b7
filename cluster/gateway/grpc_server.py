"""The gRPC front: motley.v1.Motley, the standard health service and server reflection.

A codec around `GatewayService`: it parses, calls and formats. Which status an exception becomes is
in `grpc_guard`. The deadline of a call is the request's deadline.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from actors.engine.requests import Request, RequestError, RequestOutput
from cluster.gateway import grpc_codec as codec
from cluster.gateway.access import Access
from cluster.gateway.grpc_guard import GuardInterceptor
from cluster.gateway.service import DEFAULT_COMPLETION_TOKENS, GatewayService
from cluster.gateway.settings import GatewaySettings
from protos import motley_pb2 as pb
from protos import motley_pb2_grpc

SERVICE_NAME = "motley.v1.Motley"
_WATCH_INTERVAL_S = 0.5
_MOST_CALLS_OF_A_CONNECTION = 256
_MOST_METADATA_BYTES = 16 * 1024
_PING_EVERY_S = 60
_PONG_WITHIN_S = 20
_IDLE_S = 600


class MotleyServicer(motley_pb2_grpc.MotleyServicer):
    """motley.v1.Motley."""

    def __init__(self, service: GatewayService) -> None:
        self._service = service

    async def Generate(  # noqa: N802  # named by the protocol
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        built = await self._build(request, context)
        usage = pb.Usage(prompt_tokens=len(built.prompt))
        num_ended = 0
        async with aclosing(self._service.generate(built)) as outputs:
            async for output in outputs:
                _add_usage(usage, output)
                num_ended += output.finish_reason is not None
                is_last = num_ended == built.n
                yield codec.response(output, self._service.tokenizer, usage if is_last else None)

    async def _build(self, request: pb.GenerateRequest, context: Any) -> Request:
        self._service.check_model(request.model)
        prompt = await self._prompt(request)
        is_chat = request.WhichOneof("prompt") == "chat"
        return self._service.request(
            request.request_id or f"gen-{secrets.token_hex(16)}",
            prompt,
            codec.sampling_options(request.sampling),
            n=request.n if request.HasField("n") else 1,
            deadline_s=_deadline_s(context),
            default_max_tokens=None if is_chat else DEFAULT_COMPLETION_TOKENS,
            is_named=bool(request.request_id),
        )

    async def _prompt(self, request: pb.GenerateRequest) -> Sequence[int]:
        match request.WhichOneof("prompt"):
            case "text":
                return await self._service.encode_text(request.text)
            case "token_ids":
                return tuple(request.token_ids.ids)
            case "chat":
                return await self._service.encode_chat(
                    codec.chat_messages(request.chat), codec.template_variables(request.chat)
                )
            case _:
                raise RequestError("no prompt; set text, token_ids or chat", "prompt")

    async def Abort(  # noqa: N802
        self, request: pb.AbortRequest, context: Any
    ) -> pb.AbortResponse:
        if not request.request_id:
            raise RequestError("request_id is empty; name the request to end", "request_id")
        await self._service.abort(request.request_id)
        return pb.AbortResponse()

    async def GetModelInfo(  # noqa: N802
        self, request: pb.GetModelInfoRequest, context: Any
    ) -> pb.GetModelInfoResponse:
        return codec.model_info(self._service.model_info())

    async def GetPlan(  # noqa: N802
        self, request: pb.GetPlanRequest, context: Any
    ) -> pb.GetPlanResponse:
        return codec.plan(self._service.plan(), await self._service.status())


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # ships no types
    """grpc.health.v1.Health over the deployment's own status, not over a copy of it."""

    def __init__(self, service: GatewayService, *, watch_interval_s: float) -> None:
        self._service = service
        self._watch_interval_s = watch_interval_s

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        status = await self._status(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"no service `{request.service}`; try {SERVICE_NAME}"
            )
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: Any, context: Any) -> AsyncGenerator[Any, None]:  # noqa: N802
        last = None
        while True:
            status = await self._status(request.service)
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
            last = status
            await asyncio.sleep(self._watch_interval_s)

    async def _status(self, name: str) -> Any:
        if name not in ("", SERVICE_NAME):
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if (await self._service.status()).ready:
            return health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse.NOT_SERVING


def make_grpc_server(
    service: GatewayService,
    access: Access,
    settings: GatewaySettings,
    *,
    watch_interval_s: float = _WATCH_INTERVAL_S,
) -> Any:
    """Return the grpc.aio server with all services added; it has no port yet."""
    guard = GuardInterceptor(
        access, max_calls=settings.max_connections, message_timeout_s=settings.body_timeout_s
    )
    server = grpc.aio.server(
        interceptors=[guard],
        options=[
            ("grpc.max_receive_message_length", settings.max_request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # two gateways on one port is a mistake, not a feature
            ("grpc.max_concurrent_streams", _MOST_CALLS_OF_A_CONNECTION),
            ("grpc.max_metadata_size", _MOST_METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", _MOST_METADATA_BYTES),
            ("grpc.server_handshake_timeout_ms", round(settings.body_timeout_s * 1000)),
            # A client that vanished without a word is noticed, and a connection without a call
            # is not kept for ever; clients connect again by themselves.
            ("grpc.keepalive_time_ms", _PING_EVERY_S * 1000),
            ("grpc.keepalive_timeout_ms", _PONG_WITHIN_S * 1000),
            ("grpc.max_connection_idle_ms", _IDLE_S * 1000),
        ],
    )
    motley_pb2_grpc.add_MotleyServicer_to_server(MotleyServicer(service), server)
    health_pb2_grpc.add_HealthServicer_to_server(
        HealthServicer(service, watch_interval_s=watch_interval_s), server
    )
    reflection.enable_server_reflection(
        (SERVICE_NAME, "grpc.health.v1.Health", reflection.SERVICE_NAME), server
    )
    return server


def _deadline_s(context: Any) -> float | None:
    remaining_s = context.time_remaining()
    # A call whose time is up is about to be cancelled by grpc; the value must just be valid.
    return None if remaining_s is None else max(remaining_s, 0.001)


def _add_usage(usage: pb.Usage, output: RequestOutput) -> None:
    usage.completion_tokens += len(output.tokens)
    usage.cached_prompt_tokens = max(usage.cached_prompt_tokens, output.cached_tokens)
