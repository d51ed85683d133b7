"""How an adapter comes into use while requests run: every stage loads it, then lanes switch.

Until every stage has the new version no lane knows of it; from then on each lane names it in its
steps, so a step has the same weights in every stage and lanes may switch at different moments.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from actors.engine.adapter import Adapter
from cluster.backend import AdapterStatus, Published, PublishInProgress

_log = logging.getLogger(__name__)


class AdapterHost(Protocol):
    """Where adapters are held. Both calls block."""

    def check(self, adapter: Adapter) -> None:
        """Raise AdapterError unless the adapter fits the base model."""
        ...

    def load(self, version: int, adapter: Adapter, *, keep: int) -> None:
        """Make a version ready on every stage beside `keep`, or raise PublishFailed."""
        ...


Switch = Callable[[int], Awaitable[float]]
"""Makes every lane use a version, or none; returns the longest pause in seconds."""


class Publisher:
    """Numbers the versions and publishes one at a time."""

    def __init__(self, host: AdapterHost, switch: Switch) -> None:
        self.current = AdapterStatus()
        self._host = host
        self._switch = switch
        self._last_version = 0
        self._publishing = asyncio.Lock()

    async def publish(self, adapter: Adapter | None) -> Published:
        """See `Backend.publish`."""
        if self._publishing.locked():
            raise PublishInProgress("another adapter is being published; try again when it is done")
        async with self._publishing:
            began_s = time.monotonic()
            status = AdapterStatus() if adapter is None else await self._load(adapter)
            is_other = status.version != self.current.version
            pause_s = await self._switch(status.version) if is_other else 0.0
            self.current = status
        seconds = time.monotonic() - began_s
        _log.info("adapter version %d (%s) after %.3f s", status.version, status.name, seconds)
        return Published(name=status.name, version=status.version, seconds=seconds, pause_s=pause_s)

    async def _load(self, adapter: Adapter) -> AdapterStatus:
        await asyncio.to_thread(self._host.check, adapter)
        # A number is never used twice: a failed version may still be loaded somewhere.
        self._last_version += 1
        version = self._last_version
        await asyncio.to_thread(self._host.load, version, adapter, keep=self.current.version)
        return AdapterStatus(name=adapter.name, version=version)
