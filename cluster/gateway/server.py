"""Both listeners in one event loop: `serve` binds and starts them, the handle stops them.

The gateway may be served before the deployment is ready: requests are then refused with
UNAVAILABLE or 503, and /ready tells the progress. Signals are left to the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import socket
import ssl
from collections.abc import Callable, Generator
from typing import Any

import grpc
import uvicorn
from fastapi import FastAPI

from cluster.audit import AuditLog, default_audit_file
from cluster.backend import Backend
from cluster.gateway.access import Access, on_record
from cluster.gateway.grpc_server import make_grpc_server
from cluster.gateway.http_guard import BodyLimit
from cluster.gateway.http_protocol import ConnectionLimits, GuardedProtocol
from cluster.gateway.http_server import make_http_app
from cluster.gateway.service import GatewayService, random_seed
from cluster.gateway.settings import GatewaySettings
from cluster.gateway.tokenizer import Tokenizer
from cluster.keys import KeyRing
from cluster.resuming import Resuming
from cluster.telemetry import GatewayMetrics

logger = logging.getLogger(__name__)

_BACKLOG = 1024
_MOST_HEAD_BYTES = 32 * 1024
"""Of a request line with its headers."""
_CLOSE_S = 1.0
"""After the drain, how long connections get to take their last bytes."""


async def serve(
    backend: Backend,
    tokenizer: Tokenizer,
    settings: GatewaySettings,
    token: str,
    *,
    audit: AuditLog | None = None,
    resuming: Resuming | None = None,
    metrics: GatewayMetrics | None = None,
    new_seed: Callable[[], int] = random_seed,
) -> GatewayHandle:
    """Bind both ports and start serving; return once both accept connections.

    Raises:
        ValueError: The token, the keys file or a TLS file cannot be used.
        OSError: A port cannot be bound.
    """
    keys = None if settings.api_keys_file is None else KeyRing(settings.api_keys_file)
    access = Access(token, keys=keys, audit=audit)
    service = GatewayService(
        backend,
        tokenizer,
        audit=audit,
        resuming=resuming,
        metrics=metrics,
        new_seed=new_seed,
    )
    app = make_http_app(
        service,
        access,
        request_limit=BodyLimit(settings.max_request_bytes, settings.body_timeout_s),
        adapter_limit=BodyLimit(
            settings.max_adapter_bytes,
            settings.adapter_timeout_s,
            "max_adapter_bytes",
            "adapter_timeout_s",
        ),
    )
    grpc_server = make_grpc_server(service, access, settings)
    http_server = _http_server(app, settings)
    listener = _bind_http(settings)
    http_port = int(listener.getsockname()[1])
    try:
        grpc_port = _bind_grpc(grpc_server, settings)
    except OSError:
        listener.close()
        raise
    await grpc_server.start()
    http_task = await http_server.start(listener)
    handle = GatewayHandle(
        service=service,
        app=app,
        grpc_server=grpc_server,
        http_server=http_server,
        http_task=http_task,
        urls=_Urls(settings, http_port, grpc_port),
        audit=audit,
    )
    logger.info("serving HTTP on %s and gRPC on %s", handle.http_url, handle.grpc_target)
    return handle


def open_audit(settings: GatewaySettings, deployment: str) -> AuditLog:
    """Return the audit log that the settings name; whoever opens it closes it.

    Raises:
        OSError: It cannot be written.
    """
    return AuditLog(settings.audit_file or default_audit_file(), deployment=deployment)


class GatewayHandle:
    """A running gateway."""

    def __init__(
        self,
        *,
        service: GatewayService,
        app: FastAPI,
        grpc_server: Any,
        http_server: _HttpServer,
        http_task: asyncio.Task[None],
        urls: _Urls,
        audit: AuditLog | None,
    ) -> None:
        self.service = service
        self.app = app
        self.http_port = urls.http_port
        self.grpc_port = urls.grpc_port
        self.http_url = urls.http_url
        self.grpc_target = urls.grpc_target
        self._grpc_server = grpc_server
        self._http_server = http_server
        self._http_task = http_task
        self._audit = audit
        self._is_closed = False

    @property
    def openai_url(self) -> str:
        """The `base_url` of an OpenAI client."""
        return f"{self.http_url}/v1"

    async def wait_closed(self) -> None:
        """Return when the gateway has stopped; raise what stopped it if it failed."""
        await asyncio.shield(self._http_task)

    async def close(self, grace_s: float = 5.0) -> None:
        """Refuse new requests, let those in flight finish for `grace_s`, then stop."""
        if not self._is_closed:
            self._is_closed = True
            async with on_record(self._audit, "shut_down"):
                await self.service.drain(grace_s)
        await asyncio.gather(self._grpc_server.stop(_CLOSE_S), self._close_http())

    async def _close_http(self) -> None:
        self._http_server.config.timeout_graceful_shutdown = math.ceil(_CLOSE_S)
        self._http_server.should_exit = True
        await asyncio.gather(self._http_task, return_exceptions=True)
        # uvicorn cancels what is left without waiting for it.
        tasks = list(self._http_server.server_state.tasks)
        await asyncio.gather(*tasks, return_exceptions=True)


class _Urls:
    def __init__(self, settings: GatewaySettings, http_port: int, grpc_port: int) -> None:
        host = _bracketed(settings.host)
        self.http_port = http_port
        self.grpc_port = grpc_port
        self.http_url = f"{'https' if settings.uses_tls else 'http'}://{host}:{http_port}"
        self.grpc_target = f"{host}:{grpc_port}"


class _HttpServer(uvicorn.Server):
    """uvicorn as one part of a process that handles its own signals."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._is_up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._is_up.set()

    async def start(self, listener: socket.socket) -> asyncio.Task[None]:
        """Serve in a task of its own; return it once connections are accepted."""
        task = asyncio.create_task(self.serve(sockets=[listener]))
        is_up = asyncio.create_task(self._is_up.wait())
        await asyncio.wait({task, is_up}, return_when=asyncio.FIRST_COMPLETED)
        is_up.cancel()
        if task.done():
            task.result()
        return task


def _http_server(app: FastAPI, settings: GatewaySettings) -> _HttpServer:
    limits = ConnectionLimits(
        max_connections=settings.max_connections, wait_s=settings.body_timeout_s
    )
    protocol: Any = functools.partial(GuardedProtocol, limits)
    config = uvicorn.Config(
        app,
        http=protocol,
        h11_max_incomplete_event_size=_MOST_HEAD_BYTES,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ssl_certfile=str(settings.tls_cert_file) if settings.tls_cert_file else None,
        ssl_keyfile=str(settings.tls_key_file) if settings.tls_key_file else None,
        ssl_ca_certs=str(settings.tls_client_ca_file) if settings.tls_client_ca_file else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if settings.tls_client_ca_file else ssl.CERT_NONE,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        names = "tls_cert_file and tls_key_file"
        if settings.tls_client_ca_file:
            names = "tls_cert_file, tls_key_file and tls_client_ca_file"
        raise ValueError(f"{names} cannot be used: {error}") from None
    return _HttpServer(config)


def _bind_http(settings: GatewaySettings) -> socket.socket:
    host = settings.host.strip("[]")
    # asyncio turns Nagle's delay off only on sockets that name TCP as their protocol; with the
    # delay on, every event of a stream can wait 40 ms for the client's acknowledgement.
    listener = None
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, settings.http_port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise OSError(
            f"cannot listen on {_bracketed(host)}:{settings.http_port}: {error}; "
            "set gateway.http_port to another port, or 0 for a free one"
        ) from None
    return listener


def _bind_grpc(server: Any, settings: GatewaySettings) -> int:
    address = f"{_bracketed(settings.host)}:{settings.grpc_port}"
    try:
        if settings.tls_cert_file and settings.tls_key_file:
            pair = (settings.tls_key_file.read_bytes(), settings.tls_cert_file.read_bytes())
            authority = settings.tls_client_ca_file
            credentials = grpc.ssl_server_credentials(
                [pair],
                root_certificates=None if authority is None else authority.read_bytes(),
                require_client_auth=authority is not None,
            )
            port = server.add_secure_port(address, credentials)
        else:
            port = server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if port == 0:
        raise OSError(
            f"cannot listen on {address} for gRPC; "
            "set gateway.grpc_port to another port, or 0 for a free one"
        )
    return int(port)


def _bracketed(host: str) -> str:
    host = host.strip("[]")
    return f"[{host}]" if ":" in host else host
