"""What stands before every RPC of every service: the token, and exceptions turned into statuses.

exception                         status
malformed message, RequestError   INVALID_ARGUMENT (metadata motley-param: the field)
no token, or a wrong one          UNAUTHENTICATED
NotFound                          NOT_FOUND
Overloaded                        RESOURCE_EXHAUSTED (metadata retry-after: seconds)
Unavailable                       UNAVAILABLE (metadata retry-after: seconds)
GenerationFailed, anything else   INTERNAL with a plain sentence; the trace is in the log
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from actors.engine.requests import RequestError
from cluster.backend import Overloaded, Unavailable
from cluster.gateway.auth import BearerAuth
from cluster.gateway.service import GenerationFailed, NotFound

logger = logging.getLogger(__name__)

Handler = Any
"""grpc.RpcMethodHandler, which ships no types."""
Continuation = Callable[[Any], Awaitable[Handler]]

_INTERNAL = "the gateway failed while handling this call; its log says why"


class AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """Refuses every call without the token, before anything of it is read."""

    def __init__(self, auth: BearerAuth) -> None:
        self._auth = auth
        # A stream handler answers any kind of call without waiting for its message.
        self._refusal = grpc.stream_stream_rpc_method_handler(_refuse)

    async def intercept_service(self, continuation: Continuation, details: Any) -> Handler:
        values = [value for key, value in details.invocation_metadata if key == "authorization"]
        if len(values) == 1 and self._auth.accepts(values[0]):
            return await continuation(details)
        return self._refusal


async def _refuse(_requests: Any, context: Any) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "a valid token is needed: metadata `authorization: Bearer <token>`",
    )


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """Parses messages and maps exceptions, so that servicers just raise."""

    async def intercept_service(self, continuation: Continuation, details: Any) -> Handler:
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        parse = handler.request_deserializer
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(handler.unary_stream, parse),
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            _guard_unary(handler.unary_unary, parse),
            response_serializer=handler.response_serializer,
        )


def _guard_unary(method: Any, parse: Any) -> Any:
    async def call(message: bytes, context: Any) -> Any:
        try:
            return await method(parse(message), context)
        except Exception as error:  # noqa: BLE001  # the last layer: each has a status
            await _abort(context, error)

    return call


def _guard_stream(method: Any, parse: Any) -> Any:
    async def call(message: bytes, context: Any) -> None:
        try:
            # Closing here, rather than when the generator is collected, aborts a cancelled
            # request at once.
            async with aclosing(method(parse(message), context)) as responses:
                async for response in responses:
                    await context.write(response)
        except Exception as error:  # noqa: BLE001  # the last layer: each has a status
            await _abort(context, error)

    return call


async def _abort(context: Any, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    code, text, metadata = status_of(error)
    if code is grpc.StatusCode.INTERNAL and not isinstance(error, GenerationFailed):
        logger.error("an RPC failed", exc_info=error)
    await context.abort(code, text, metadata)


def status_of(error: Exception) -> tuple[grpc.StatusCode, str, Sequence[tuple[str, str]]]:
    """Return code, details and trailing metadata for an exception."""
    if isinstance(error, DecodeError):
        return grpc.StatusCode.INVALID_ARGUMENT, f"the message cannot be parsed: {error}", ()
    if isinstance(error, RequestError):
        metadata = (("motley-param", error.param),) if error.param else ()
        return grpc.StatusCode.INVALID_ARGUMENT, error.message, metadata
    if isinstance(error, NotFound):
        return grpc.StatusCode.NOT_FOUND, error.message, ()
    if isinstance(error, Unavailable):
        overloaded = isinstance(error, Overloaded)
        code = grpc.StatusCode.RESOURCE_EXHAUSTED if overloaded else grpc.StatusCode.UNAVAILABLE
        return code, error.message, (("retry-after", f"{error.retry_after_s:.3f}"),)
    if isinstance(error, GenerationFailed):
        return grpc.StatusCode.INTERNAL, str(error), ()
    return grpc.StatusCode.INTERNAL, _INTERNAL, ()
