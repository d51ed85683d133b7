"""What stands around every RPC of every service: who calls, deadlines, and exceptions as statuses.

exception                         status
malformed message, RequestError   INVALID_ARGUMENT (metadata motley-param: the field)
Unauthenticated                   UNAUTHENTICATED
Forbidden                         PERMISSION_DENIED
NotFound                          NOT_FOUND
Overloaded, RateLimited           RESOURCE_EXHAUSTED (metadata retry-after: seconds)
Unavailable                       UNAVAILABLE (metadata retry-after: seconds)
MessageTooSlow                    DEADLINE_EXCEEDED
NotImplementedError               UNIMPLEMENTED
GenerationFailed, anything else   INTERNAL with a plain sentence; the trace is in the log
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from actors.engine.requests import RequestError
from cluster.backend import Overloaded, Unavailable
from cluster.gateway.access import Access, Forbidden, Need, Unauthenticated
from cluster.gateway.service import GenerationFailed, NotFound

logger = logging.getLogger(__name__)

Handler = Any
"""grpc.RpcMethodHandler, which ships no types."""
Continuation = Callable[[Any], Awaitable[Handler]]

RPC_NEEDS: Mapping[str, Need] = {
    "/motley.v1.Motley/Generate": "generate",
    "/motley.v1.Motley/Abort": "generate",  # of another's request: admin, which the service knows
    "/motley.v1.Motley/GetModelInfo": "any",
    "/motley.v1.Motley/GetPlan": "any",
    "/grpc.health.v1.Health/Check": "any",
    "/grpc.health.v1.Health/List": "any",
    "/grpc.health.v1.Health/Watch": "any",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "any",
}
"""An RPC that is not here is refused to everyone."""

_FULL_RETRY_S = 1.0
_INTERNAL = "the gateway failed while handling this call; its log says why"


class MessageTooSlow(Exception):
    """The client did not send the call's message, or take the next response, in time."""


class GuardInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """Checks the caller before anything of a call is read; then servicers just raise.

    Every call is served as a stream of bytes in and messages out: so a client that sends nothing
    can be told from one that is served, and a message that cannot be parsed has a status.
    """

    def __init__(self, access: Access, *, max_calls: int, message_timeout_s: float) -> None:
        self._access = access
        self._max_calls = max_calls
        self._message_timeout_s = message_timeout_s
        self._num_calls = 0

    async def intercept_service(self, continuation: Continuation, details: Any) -> Handler:
        values = [value for key, value in details.invocation_metadata if key == "authorization"]
        handler = await continuation(details)
        method = str(details.method)

        async def call(messages: AsyncIterator[bytes], context: Any) -> None:
            try:
                caller = self._access.caller(values, context.peer())
                with self._place(), self._access.serving(caller):
                    if handler is None:
                        raise NotImplementedError(f"there is no method {method}")
                    if method not in RPC_NEEDS:
                        raise Forbidden(f"{method} declares no scope", caller.name)
                    caller.check(RPC_NEEDS[method])
                    await self._run(handler, messages, context)
            except Exception as error:  # noqa: BLE001  # the last layer: each has a status
                await self._access.note_refusal(error, context.peer(), method)
                await _abort(context, error)

        serializer = None if handler is None else handler.response_serializer
        return grpc.stream_stream_rpc_method_handler(call, response_serializer=serializer)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Hold one of the server's places for a call."""
        if self._num_calls >= self._max_calls:
            raise Overloaded(
                f"{self._num_calls} calls are open, the most there may be "
                "(gateway.max_connections); try again",
                _FULL_RETRY_S,
            )
        self._num_calls += 1
        try:
            yield
        finally:
            self._num_calls -= 1

    async def _run(self, handler: Handler, messages: AsyncIterator[bytes], context: Any) -> None:
        parsed = self._parsed(messages, handler.request_deserializer)
        async with aclosing(parsed):
            if handler.request_streaming:
                # Only reflection streams its requests; what it streams back ends with them.
                responses = handler.stream_stream(parsed, context)
            else:
                request = await anext(parsed, None)
                if request is None:
                    raise RequestError("the call carries no message", None)
                if not handler.response_streaming:
                    await context.write(await handler.unary_unary(request, context))
                    return
                responses = handler.unary_stream(request, context)
            # Closing here, rather than when the generator is collected, aborts a cancelled request
            # at once.
            async with aclosing(responses), _reading(context, self._message_timeout_s) as write:
                async for response in responses:
                    await write(response)

    async def _parsed(
        self, messages: AsyncIterator[bytes], parse: Callable[[bytes], Any]
    ) -> AsyncGenerator[Any, None]:
        """Yield the client's messages; raise when one cannot be parsed or takes too long."""
        stream = aiter(messages)
        while True:
            try:
                async with asyncio.timeout(self._message_timeout_s):
                    message = await anext(stream)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise MessageTooSlow(
                    f"no message came within {self._message_timeout_s:g} s (gateway.body_timeout_s)"
                ) from None
            yield parse(message)


@asynccontextmanager
async def _reading(
    context: Any, timeout_s: float
) -> AsyncGenerator[Callable[[Any], Awaitable[None]], None]:
    """Give a way to write responses; raise when the client has taken none for once or twice that.

    One clock for all of them: one for each would cost more than the writing.
    """
    loop = asyncio.get_running_loop()
    num_begun = num_done = num_seen = 0
    deadline = asyncio.timeout(None)
    timer: asyncio.TimerHandle

    async def write(response: Any) -> None:
        nonlocal num_begun, num_done
        num_begun += 1
        await context.write(response)
        num_done += 1

    def look() -> None:
        nonlocal num_seen, timer
        if num_done < num_begun == num_seen:
            deadline.reschedule(loop.time())
            return
        num_seen = num_begun
        timer = loop.call_later(timeout_s, look)

    timer = loop.call_later(timeout_s, look)
    try:
        async with deadline:
            yield write
    except TimeoutError:
        if not deadline.expired():
            raise
        raise MessageTooSlow(
            f"nothing was read for {timeout_s:g} s (gateway.body_timeout_s)"
        ) from None
    finally:
        timer.cancel()


async def _abort(context: Any, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    code, text, metadata = status_of(error)
    if code is grpc.StatusCode.INTERNAL and not isinstance(error, GenerationFailed):
        logger.error("an RPC failed", exc_info=error)
    await context.abort(code, text, metadata)


def status_of(error: Exception) -> tuple[grpc.StatusCode, str, Sequence[tuple[str, str]]]:
    """Return code, details and trailing metadata for an exception."""
    if isinstance(error, RequestError):
        metadata = (("motley-param", error.param),) if error.param else ()
        return grpc.StatusCode.INVALID_ARGUMENT, error.message, metadata
    if isinstance(error, Unavailable):
        overloaded = isinstance(error, Overloaded)
        code = grpc.StatusCode.RESOURCE_EXHAUSTED if overloaded else grpc.StatusCode.UNAVAILABLE
        return code, error.message, (("retry-after", f"{error.retry_after_s:.3f}"),)
    for kind, code in _CODES.items():
        if isinstance(error, kind):
            return code, _TEXTS.get(kind, "{}").format(error), ()
    return grpc.StatusCode.INTERNAL, _INTERNAL, ()


_CODES: Mapping[type[Exception], grpc.StatusCode] = {
    DecodeError: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    NotFound: grpc.StatusCode.NOT_FOUND,
    MessageTooSlow: grpc.StatusCode.DEADLINE_EXCEEDED,
    NotImplementedError: grpc.StatusCode.UNIMPLEMENTED,
    GenerationFailed: grpc.StatusCode.INTERNAL,
}
_TEXTS: Mapping[type[Exception], str] = {
    DecodeError: "the message cannot be parsed: {}",
    Unauthenticated: "a valid token is needed: metadata `authorization: Bearer <token>`",
}
