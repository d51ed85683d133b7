"""The deployment as a Ray Serve application, for KubeRay's RayService; needs the `serve` extra.

One replica brings the deployment up inside itself: stages and lanes are its actors and go with it.
Serve restarts it when it has not been ready for too long, and routes HTTP to the gateway's own
application, whose routes, token and limits hold there as on the gateway's own ports. Serve neither
scales it (a plan has all the devices) nor carries its gRPC.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

from fastapi import FastAPI
from ray import serve

from cluster.backend import DeploymentStatus
from cluster.config import load_config
from cluster.launch import deployment
from cluster.telemetry import configure_logging

_log = logging.getLogger(__name__)
_PATIENCE_S = 300.0
"""A lost stage is replaced and loads its weights meanwhile: that is no reason to start anew."""


class NotReadyForLongError(RuntimeError):
    """Serve shall restart the replica."""


class Patience:
    """Raises once the deployment has not been ready for too long."""

    def __init__(
        self, limit_s: float = _PATIENCE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._ready_s = clock()

    def check(self, status: DeploymentStatus) -> None:
        now_s = self._clock()
        if status.ready:
            self._ready_s = now_s
        elif now_s - self._ready_s > self._limit_s:
            raise NotReadyForLongError(
                f"not ready for {now_s - self._ready_s:.0f} s, more than {self._limit_s:.0f}: "
                f"{status.reason}"
            )


class GatewayReplica:
    """Holds one deployment from its start to its end."""

    async def __init__(self, config_file: str) -> None:  # type: ignore[misc]  # Serve awaits it
        configure_logging()
        self._stack = AsyncExitStack()
        self._running = await self._stack.enter_async_context(
            deployment(
                load_config(config_file), lambda event: _log.info("%s", type(event).__name__)
            )
        )
        self._patience = Patience()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._running.gateway.app

    async def check_health(self) -> None:
        self._patience.check(await self._running.dispatcher.status())

    async def __del__(self) -> None:
        # Serve awaits it when it stops a replica.
        await self._stack.aclose()


def build(arguments: Mapping[str, str]) -> Any:
    """Return the application; `config` of the arguments is the settings' file on every node."""
    config_file = arguments["config"]
    load_config(config_file)  # refused here, its reason is the application's status
    make: Any = serve.deployment(name="Gateway")  # its types leave `bind` out
    return make(serve.ingress()(GatewayReplica)).bind(config_file)
