"""Starting and stopping both listeners: ports, TLS, draining."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cluster.client import AsyncMotleyClient, Unreachable
from cluster.gateway.server import serve
from cluster.gateway.settings import GatewaySettings
from cluster.gateway.tokenizer import Tokenizer

if TYPE_CHECKING:
    from cluster.gateway.server import GatewayHandle
    from tests.unit.conftest import FakeBackend, GatewayFactory

pytestmark = pytest.mark.asyncio(loop_scope="module")

Eventually = Callable[[Callable[[], bool]], Awaitable[None]]
BODY = {"prompt": "ab"}


def headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "motley test")])
    today = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return cert_file, key_file


async def test_tls_covers_both_listeners(
    gateway_with: GatewayFactory, certificate: tuple[Path, Path], token: str
) -> None:
    cert_file, key_file = certificate
    async with gateway_with(tls_cert_file=cert_file, tls_key_file=key_file) as gateway:
        assert gateway.http_url.startswith("https://127.0.0.1:")
        trust = ssl.create_default_context(cafile=str(cert_file))
        async with httpx.AsyncClient(verify=trust, headers=headers(token)) as http:
            assert (await http.get(f"{gateway.http_url}/ready")).status_code == 200
        async with AsyncMotleyClient(gateway.grpc_target, token, tls_ca_file=cert_file) as client:
            assert await client.ready()
            assert (await client.complete("ab")).text == "Hi there"
        async with AsyncMotleyClient(gateway.grpc_target, token) as plaintext:
            with pytest.raises(Unreachable):
                await plaintext.ready(timeout_s=5)


async def test_unusable_tls_files_are_named(
    backend: FakeBackend, tokenizer: Tokenizer, tmp_path: Path, token: str
) -> None:
    (tmp_path / "bad.pem").write_text("not a certificate", encoding="utf-8")
    for name in ("bad.pem", "absent.pem"):
        path = tmp_path / name
        settings = GatewaySettings(http_port=0, grpc_port=0, tls_cert_file=path, tls_key_file=path)
        with pytest.raises(ValueError, match="tls_cert_file and tls_key_file cannot be used"):
            await serve(backend, tokenizer, settings, token)


async def test_a_weak_token_is_refused_before_anything_listens(
    backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ValueError, match="at least 8"):
        await serve(backend, tokenizer, GatewaySettings(http_port=0, grpc_port=0), "")


@pytest.mark.parametrize("name", ["http_port", "grpc_port"])
async def test_a_taken_port_is_refused_with_its_setting(
    gateway_with: GatewayFactory, name: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"127.0.0.1:{port}.*set gateway.{name}"):
            async with gateway_with(**{name: port}):
                pass


async def test_a_second_gateway_cannot_share_a_port(
    gateway_with: GatewayFactory, gateway: GatewayHandle
) -> None:
    for name in ("http_port", "grpc_port"):
        with pytest.raises(OSError, match=f"set gateway.{name}"):
            async with gateway_with(**{name: getattr(gateway, name)}):
                pass


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
async def test_ipv6_is_bracketed(gateway_with: GatewayFactory, token: str) -> None:
    with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6 loopback")
    async with gateway_with(host="::1") as gateway:
        assert gateway.http_url == f"http://[::1]:{gateway.http_port}"
        async with httpx.AsyncClient(headers=headers(token)) as http:
            assert (await http.get(f"{gateway.http_url}/ready")).status_code == 200
        async with AsyncMotleyClient(gateway.grpc_target, token) as client:
            assert await client.ready()


async def test_signal_handlers_are_left_to_the_caller(gateway_with: GatewayFactory) -> None:
    before = signal.getsignal(signal.SIGTERM)
    async with gateway_with():
        assert signal.getsignal(signal.SIGTERM) is before


async def test_small_writes_are_not_held_back(gateway: GatewayHandle) -> None:
    async with httpx.AsyncClient() as http:
        await http.get(f"{gateway.http_url}/health")
        [connection] = gateway._http_server.server_state.connections
        sock = connection.transport.get_extra_info("socket")

        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


async def test_closing_lets_what_runs_finish_and_refuses_the_rest(
    gateway_with: GatewayFactory, backend: FakeBackend, eventually: Eventually, token: str
) -> None:
    backend.hang_after = 2
    async with (
        gateway_with() as gateway,
        httpx.AsyncClient(base_url=gateway.http_url, headers=headers(token)) as http,
    ):
        running = asyncio.create_task(http.post("/v1/completions", json=BODY))
        await eventually(lambda: len(backend.requests) == 1)
        closing = asyncio.create_task(gateway.close(grace_s=3))
        await asyncio.sleep(0.05)
        refused = await http.post("/v1/completions", json=BODY)
        assert refused.status_code == 503
        assert "shutting down" in refused.text
        assert not closing.done()
        backend.release()

        assert (await running).json()["choices"][0]["text"] == "Hi there"
        await closing
        with pytest.raises(httpx.ConnectError):
            await http.get("/health")


async def test_closing_aborts_what_outlasts_the_grace(
    gateway_with: GatewayFactory, backend: FakeBackend, eventually: Eventually, token: str
) -> None:
    backend.hang_after = 2
    async with (
        gateway_with() as gateway,
        httpx.AsyncClient(base_url=gateway.http_url, headers=headers(token)) as http,
        AsyncMotleyClient(gateway.grpc_target, token) as client,
    ):
        whole = asyncio.create_task(http.post("/v1/completions", json=BODY))
        rpc: asyncio.Task[Any] = asyncio.create_task(client.complete("ab"))
        await eventually(lambda: len(backend.requests) == 2)
        await gateway.close(grace_s=0.05)

        assert (await whole).json()["choices"][0]["finish_reason"] == "abort"
        assert (await rpc).choices[0].finish_reason == "abort"
        assert len(backend.closed) == 2


async def test_closing_twice_is_harmless(gateway_with: GatewayFactory) -> None:
    async with gateway_with() as gateway:
        await gateway.close(0)
        await gateway.wait_closed()
        await gateway.close(0)


async def test_a_large_grpc_message_is_refused(gateway_with: GatewayFactory, token: str) -> None:
    async with (
        gateway_with(max_request_bytes=2048) as gateway,
        grpc.aio.insecure_channel(gateway.grpc_target) as channel,
    ):
        call = channel.unary_stream("/motley.v1.Motley/Generate")(
            b"x" * 2049, metadata=(("authorization", f"Bearer {token}"),)
        )

        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
