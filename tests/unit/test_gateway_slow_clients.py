"""Clients that hold on: too many, too slow, too large, or silent. Each is turned away in time.

The deadlines are shortened by the settings; what is waited for is the server's own act.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest

from cluster.client import AsyncMotleyClient, Overloaded
from protos import motley_pb2 as pb
from protos import motley_pb2_grpc

if TYPE_CHECKING:
    from cluster.gateway.server import GatewayHandle
    from tests.unit.conftest import FakeBackend, GatewayFactory

pytestmark = pytest.mark.asyncio(loop_scope="module")

Eventually = Callable[[Callable[[], bool]], Awaitable[None]]
GENERATE = "/motley.v1.Motley/Generate"
SOON_S = 0.2
LONG_S = 10.0


async def heard_until_closed(gateway: GatewayHandle, *sent: bytes) -> bytes:
    """Connect, send, and return all that comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
    try:
        for data in sent:
            writer.write(data)
            await writer.drain()
        async with asyncio.timeout(LONG_S):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


def head(token: str, *more: str, path: str = "/v1/completions") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {token}", *more]
    return "\r\n".join([*lines, "", ""]).encode()


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost:"])
async def test_a_connection_without_a_whole_head_is_cut_off(
    gateway_with: GatewayFactory, sent: bytes
) -> None:
    async with gateway_with(body_timeout_s=SOON_S) as gateway:
        assert await heard_until_closed(gateway, sent) == b""


async def test_a_body_that_does_not_end_is_answered_and_cut_off(
    gateway_with: GatewayFactory, token: str
) -> None:
    async with gateway_with(body_timeout_s=SOON_S) as gateway:
        heard = await heard_until_closed(
            gateway, head(token, "Content-Length: 100"), b'{"prompt": '
        )

    assert heard.startswith(b"HTTP/1.1 408")
    assert b"11 bytes of the body had come after 0.2 s" in heard
    assert b"gateway.body_timeout_s" in heard


async def test_an_adapter_has_a_deadline_of_its_own(
    gateway_with: GatewayFactory, token: str
) -> None:
    async with gateway_with(adapter_timeout_s=SOON_S) as gateway:
        heard = await heard_until_closed(
            gateway, head(token, "Content-Length: 100", path="/v1/adapter")
        )

    assert heard.startswith(b"HTTP/1.1 408")
    assert b"gateway.adapter_timeout_s" in heard


async def test_a_refused_body_that_goes_on_is_cut_off(gateway_with: GatewayFactory) -> None:
    async with gateway_with(body_timeout_s=SOON_S) as gateway:
        heard = await heard_until_closed(gateway, head("wrong-token", "Content-Length: 100"), b"x")

    assert heard.startswith(b"HTTP/1.1 401")


async def test_a_head_above_the_limit_is_refused(gateway: GatewayHandle, token: str) -> None:
    heard = await heard_until_closed(gateway, head(token, "X-Filler: " + "x" * 40_000))

    assert heard.startswith(b"HTTP/1.1 400")


async def test_connections_above_the_limit_are_turned_away_and_others_served(
    gateway_with: GatewayFactory, eventually: Eventually
) -> None:
    async with gateway_with(max_connections=2) as gateway:
        held = [await asyncio.open_connection("127.0.0.1", gateway.http_port) for _ in range(2)]
        heard = await heard_until_closed(gateway)
        for _, writer in held:
            writer.close()
        connections = gateway._http_server.server_state.connections
        await eventually(lambda: not connections)
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"{gateway.http_url}/health")).status_code == 200

    assert heard.startswith(b"HTTP/1.1 503")
    assert b"Retry-After: 1" in heard


async def test_a_client_that_does_not_read_is_cut_off(
    gateway_with: GatewayFactory, backend: FakeBackend, eventually: Eventually, token: str
) -> None:
    backend.reply = "x" * 60
    body = b'{"prompt": "ab", "max_tokens": 60, "n": 32, "logprobs": 20, "stream": true}'
    request = head(token, f"Content-Length: {len(body)}") + body
    async with gateway_with(body_timeout_s=SOON_S) as gateway:
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port, limit=1)
        writer.write(request * 40)
        connections = gateway._http_server.server_state.connections
        await eventually(lambda: len(backend.requests) > 0)
        async with asyncio.timeout(LONG_S):
            while connections:  # noqa: ASYNC110  # the server has no event for it
                await asyncio.sleep(0.01)
        writer.close()

    assert len(backend.closed) == len(backend.requests)


async def test_an_rpc_that_sends_no_message_is_ended(
    gateway_with: GatewayFactory, metadata: Any
) -> None:
    silent = asyncio.Event()

    async def never() -> AsyncIterator[bytes]:
        await silent.wait()
        yield b""

    async with (
        gateway_with(body_timeout_s=SOON_S) as gateway,
        grpc.aio.insecure_channel(gateway.grpc_target) as channel,
    ):
        for path in (GENERATE, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
            call = channel.stream_stream(path)(never(), metadata=metadata, timeout=LONG_S)
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "gateway.body_timeout_s" in await call.details()


async def test_an_rpc_without_a_message_is_refused(channel: Any, metadata: Any) -> None:
    call = channel.stream_stream(GENERATE)(iter([]), metadata=metadata, timeout=LONG_S)

    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "carries no message" in await call.details()


async def test_calls_above_the_limit_are_refused_until_one_ends(
    gateway_with: GatewayFactory, backend: FakeBackend, eventually: Eventually, token: str
) -> None:
    backend.hang_after = 1
    async with (
        gateway_with(max_connections=1) as gateway,
        AsyncMotleyClient(gateway.grpc_target, token) as client,
    ):
        running: asyncio.Task[Any] = asyncio.create_task(client.complete("ab", request_id="r"))
        await eventually(lambda: len(backend.requests) == 1)
        with pytest.raises(Overloaded, match=r"gateway.max_connections"):
            await client.model_info()
        backend.release()
        await running
        await client.model_info()


async def test_metadata_above_the_limit_is_refused(channel: Any, metadata: Any) -> None:
    call = channel.stream_stream(GENERATE)(
        iter([b""]), metadata=(*metadata, ("filler", "x" * 20_000)), timeout=LONG_S
    )

    assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_an_rpc_whose_responses_are_not_read_is_ended(
    gateway_with: GatewayFactory, backend: FakeBackend, metadata: Any
) -> None:
    backend.reply = "x" * 60
    options = pb.SamplingOptions(max_tokens=60, logprobs=20)
    request = pb.GenerateRequest(text="ab", n=32, sampling=options)
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384)]
    async with (
        gateway_with(body_timeout_s=SOON_S) as gateway,
        grpc.aio.insecure_channel(gateway.grpc_target, options=small_window) as channel,
    ):
        call = motley_pb2_grpc.MotleyStub(channel).Generate(request, metadata=metadata)
        await call.read()
        async with asyncio.timeout(LONG_S):
            while not backend.closed:  # noqa: ASYNC110  # the fake has no event for it
                await asyncio.sleep(0.01)
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await call.read() is not grpc.aio.EOF:
                pass

        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "nothing was read for 0.2 s" in await call.details()


async def test_a_client_that_reads_slowly_and_goes_on_is_served(
    gateway_with: GatewayFactory, backend: FakeBackend, metadata: Any
) -> None:
    backend.reply = "x" * 20
    request = pb.GenerateRequest(text="ab", sampling=pb.SamplingOptions(max_tokens=20))
    async with (
        gateway_with(body_timeout_s=SOON_S) as gateway,
        grpc.aio.insecure_channel(gateway.grpc_target) as channel,
    ):
        call = motley_pb2_grpc.MotleyStub(channel).Generate(request, metadata=metadata)
        texts = []
        async for response in call:
            texts.append(response.text)
            await asyncio.sleep(3 * SOON_S / 20)

    assert "".join(texts) == "x" * 20
