"""A typed client of a Motley deployment over gRPC, blocking (`MotleyClient`) or not (`Async...`).

    with MotleyClient("127.0.0.1:8001", token) as client:
        print(client.complete("Once upon a time", max_tokens=32).text)
        for chunk in client.generate("Once upon", max_tokens=32):
            print(chunk.text, end="")

Every call takes `timeout_s`, which the server keeps too. Closing the iterator of `generate`, or
leaving it, cancels the request there. What a call raises:

    MotleyError                any failure; the message is the server's
      InvalidRequest           INVALID_ARGUMENT; `param` names the field to change
      Unauthenticated          UNAUTHENTICATED
      Forbidden                PERMISSION_DENIED: the key lacks a scope, which the message names
      NotFound                 NOT_FOUND: no such model, or no such request in flight
      Unreachable              UNAVAILABLE; `retry_after_s` when the server itself said so
        Overloaded             RESOURCE_EXHAUSTED: every queue is full, or the key's rate used up
      DeadlineExceeded         DEADLINE_EXCEEDED: `timeout_s` passed
      ServerFailed             INTERNAL and whatever else

Options are those of `GenerateOptions`; what is left out takes the server's default.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client_values import (
    Choice,
    Chunk,
    Completion,
    DeadlineExceeded,
    Forbidden,
    GenerateOptions,
    Heard,
    InvalidRequest,
    Message,
    ModelInfo,
    MotleyError,
    NotFound,
    Overloaded,
    Plan,
    Prompt,
    ServerFailed,
    Stage,
    TokenLogprob,
    Unauthenticated,
    Unreachable,
    Usage,
    chunk_of,
    error_of,
    generate_request,
    join,
    model_info_of,
    plan_of,
)
from protos import motley_pb2 as pb
from protos import motley_pb2_grpc

__all__ = [
    "AsyncMotleyClient",
    "Choice",
    "Chunk",
    "Completion",
    "DeadlineExceeded",
    "Forbidden",
    "GenerateOptions",
    "InvalidRequest",
    "Message",
    "ModelInfo",
    "MotleyClient",
    "MotleyError",
    "NotFound",
    "Overloaded",
    "Plan",
    "ServerFailed",
    "Stage",
    "TokenLogprob",
    "Unauthenticated",
    "Unreachable",
    "Usage",
]

GENERATE_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 10.0

_OPTIONS = (("grpc.max_receive_message_length", -1),)


class MotleyClient:
    """Blocking calls. Safe to share between threads."""

    def __init__(
        self,
        target: str,
        token: str,
        *,
        tls_ca_file: Path | str | None = None,
        tls_client_cert_file: Path | str | None = None,
        tls_client_key_file: Path | str | None = None,
    ) -> None:
        """`target` is host:port of the gRPC listener; with `tls_ca_file` the channel is TLS.

        The client's own certificate and key are for a gateway with `tls_client_ca_file`.
        """
        credentials = _credentials(tls_ca_file, tls_client_cert_file, tls_client_key_file)
        self._channel = (
            grpc.insecure_channel(target, options=_OPTIONS)
            if credentials is None
            else grpc.secure_channel(target, credentials, options=_OPTIONS)
        )
        self._stub = motley_pb2_grpc.MotleyStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._metadata = _metadata(token)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; calls in flight are cancelled."""
        self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout_s: float = GENERATE_TIMEOUT_S,
        **options: Unpack[GenerateOptions],
    ) -> Generator[Chunk, None, None]:
        """Yield what is generated as it comes. A prompt is text, token ids or `Message`s.

        With a `request_id` of one's own it goes on after the connection, or the gateway, was lost.
        """
        return self._chunks(generate_request(prompt, options), timeout_s)

    def _chunks(
        self, request: pb.GenerateRequest, timeout_s: float
    ) -> Generator[Chunk, None, None]:
        end_s = time.monotonic() + timeout_s
        heard = Heard(request, time.monotonic())
        while True:
            try:
                for chunk in self._once(request, end_s - time.monotonic()):
                    if heard.is_new(chunk, time.monotonic()):
                        yield chunk
            except Unreachable as error:
                time.sleep(heard.wait_s(error, time.monotonic()))
            else:
                return

    def _once(self, request: pb.GenerateRequest, timeout_s: float) -> Generator[Chunk, None, None]:
        with _mapped_errors():
            call = self._stub.Generate(request, **self._options(timeout_s))
            try:
                for response in call:
                    yield chunk_of(response)
            finally:
                call.cancel()

    def complete(
        self,
        prompt: Prompt,
        *,
        timeout_s: float = GENERATE_TIMEOUT_S,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """Return the whole answer."""
        chunks = self.generate(prompt, timeout_s=timeout_s, **options)
        with closing(chunks):
            return join(chunks)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        timeout_s: float = GENERATE_TIMEOUT_S,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """Return the assistant's next turn."""
        return self.complete(messages, timeout_s=timeout_s, **options)

    def abort(self, request_id: str, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """End a request in flight; raise `NotFound` when there is none of that id."""
        with _mapped_errors():
            self._stub.Abort(pb.AbortRequest(request_id=request_id), **self._options(timeout_s))

    def model_info(self, *, timeout_s: float = CALL_TIMEOUT_S) -> ModelInfo:
        """Return what is served."""
        with _mapped_errors():
            message = self._stub.GetModelInfo(pb.GetModelInfoRequest(), **self._options(timeout_s))
        return model_info_of(message)

    def plan(self, *, timeout_s: float = CALL_TIMEOUT_S) -> Plan:
        """Return the plan in force and where its stages are."""
        with _mapped_errors():
            message = self._stub.GetPlan(pb.GetPlanRequest(), **self._options(timeout_s))
        return plan_of(message)

    def ready(self, *, timeout_s: float = CALL_TIMEOUT_S) -> bool:
        """Return whether requests are served."""
        with _mapped_errors():
            reply = self._health.Check(health_pb2.HealthCheckRequest(), **self._options(timeout_s))
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def _options(self, timeout_s: float) -> dict[str, Any]:
        return {"timeout": timeout_s, "metadata": self._metadata}


class AsyncMotleyClient:
    """The same calls for asyncio. Make it inside the event loop that uses it."""

    def __init__(
        self,
        target: str,
        token: str,
        *,
        tls_ca_file: Path | str | None = None,
        tls_client_cert_file: Path | str | None = None,
        tls_client_key_file: Path | str | None = None,
    ) -> None:
        """`target` is host:port of the gRPC listener; with `tls_ca_file` the channel is TLS.

        The client's own certificate and key are for a gateway with `tls_client_ca_file`.
        """
        credentials = _credentials(tls_ca_file, tls_client_cert_file, tls_client_key_file)
        self._channel = (
            grpc.aio.insecure_channel(target, options=_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options=_OPTIONS)
        )
        self._stub: Any = motley_pb2_grpc.MotleyStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._metadata = _metadata(token)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; calls in flight are cancelled."""
        await self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout_s: float = GENERATE_TIMEOUT_S,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[Chunk, None]:
        """Yield what is generated as it comes; see `MotleyClient.generate`.

        An `async for` that is left early does not close its iterator at once; use
        `contextlib.aclosing` around it.
        """
        return self._chunks(generate_request(prompt, options), timeout_s)

    async def _chunks(
        self, request: pb.GenerateRequest, timeout_s: float
    ) -> AsyncGenerator[Chunk, None]:
        end_s = time.monotonic() + timeout_s
        heard = Heard(request, time.monotonic())
        while True:
            try:
                async with aclosing(self._once(request, end_s - time.monotonic())) as chunks:
                    async for chunk in chunks:
                        if heard.is_new(chunk, time.monotonic()):
                            yield chunk
            except Unreachable as error:
                await asyncio.sleep(heard.wait_s(error, time.monotonic()))
            else:
                return

    async def _once(
        self, request: pb.GenerateRequest, timeout_s: float
    ) -> AsyncGenerator[Chunk, None]:
        async with _async_mapped_errors():
            call = self._stub.Generate(request, **self._options(timeout_s))
            try:
                async for response in call:
                    yield chunk_of(response)
            finally:
                call.cancel()

    async def complete(
        self,
        prompt: Prompt,
        *,
        timeout_s: float = GENERATE_TIMEOUT_S,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """Return the whole answer."""
        chunks = self.generate(prompt, timeout_s=timeout_s, **options)
        async with aclosing(chunks):
            return join([chunk async for chunk in chunks])

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        timeout_s: float = GENERATE_TIMEOUT_S,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """Return the assistant's next turn."""
        return await self.complete(messages, timeout_s=timeout_s, **options)

    async def abort(self, request_id: str, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """End a request in flight; raise `NotFound` when there is none of that id."""
        request = pb.AbortRequest(request_id=request_id)
        async with _async_mapped_errors():
            await self._stub.Abort(request, **self._options(timeout_s))

    async def model_info(self, *, timeout_s: float = CALL_TIMEOUT_S) -> ModelInfo:
        """Return what is served."""
        request = pb.GetModelInfoRequest()
        async with _async_mapped_errors():
            return model_info_of(await self._stub.GetModelInfo(request, **self._options(timeout_s)))

    async def plan(self, *, timeout_s: float = CALL_TIMEOUT_S) -> Plan:
        """Return the plan in force and where its stages are."""
        request = pb.GetPlanRequest()
        async with _async_mapped_errors():
            return plan_of(await self._stub.GetPlan(request, **self._options(timeout_s)))

    async def ready(self, *, timeout_s: float = CALL_TIMEOUT_S) -> bool:
        """Return whether requests are served."""
        request = health_pb2.HealthCheckRequest()
        async with _async_mapped_errors():
            reply = await self._health.Check(request, **self._options(timeout_s))
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def _options(self, timeout_s: float) -> dict[str, Any]:
        return {"timeout": timeout_s, "metadata": self._metadata}


@contextmanager
def _mapped_errors() -> Generator[None, None, None]:
    try:
        yield
    except grpc.RpcError as error:
        raise error_of(error) from None


@asynccontextmanager
async def _async_mapped_errors() -> AsyncGenerator[None, None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_of(error) from None


def _credentials(
    tls_ca_file: Path | str | None, cert_file: Path | str | None, key_file: Path | str | None
) -> Any:
    if (cert_file is None) != (key_file is None):
        raise ValueError("a client's certificate and its key come together; one is missing")
    if tls_ca_file is None:
        if cert_file is not None:
            raise ValueError("a client's certificate needs tls_ca_file: without it there is no TLS")
        return None
    if cert_file is None or key_file is None:
        return grpc.ssl_channel_credentials(Path(tls_ca_file).read_bytes())
    return grpc.ssl_channel_credentials(
        Path(tls_ca_file).read_bytes(), Path(key_file).read_bytes(), Path(cert_file).read_bytes()
    )


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)
