"""`motley train`: from settings to a trained checkpoint.

`run` opens checkpoint, data and run folder, joins or starts Ray, plans, starts devices and weight
hosts, and trains until the last step, or until a signal: then it saves and stops. What it started,
it stops, also when a step fails.
"""

from __future__ import annotations

import asyncio
import io
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, redirect_stdout

import ray

from cluster.config import MotleyConfig
from cluster.inventory import find_hosts, find_topology
from cluster.ray_session import STARTED_HERE, connect, ray_options
from cluster.training.events import TrainingEvent
from cluster.training.job import TrainingJob, open_job
from cluster.training.loop import TrainingLoop
from cluster.training.object_store import with_object_store

OnEvent = Callable[[TrainingEvent], None]
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_log = logging.getLogger(__name__)


def run(
    config: MotleyConfig, on_event: OnEvent, *, resume: bool = False, trace: bool = False
) -> None:
    """Train to the last step; a signal makes it save a checkpoint and stop early.

    Raises:
        ConfigError, CheckpointError, DataError, RunFolderError, InfeasiblePlanError: It could not
            start.
        TrainingError: It could not go on.
    """
    job = open_job(config, resume=resume)
    with redirect_stdout(_Printed()):
        asyncio.run(_run(job, on_event, trace=trace))


class _Printed(io.TextIOBase):
    """Ray prints every death of a worker, in a thread of its own; the events say it already."""

    def write(self, text: str) -> int:
        if text.strip():
            _log.info("printed: %s", text.strip())
        return len(text)


async def _run(job: TrainingJob, on_event: OnEvent, *, trace: bool) -> None:
    stopping = asyncio.Event()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_session(job))
        stack.enter_context(_signals(stopping))
        hosts = await asyncio.to_thread(find_hosts)
        topology = await asyncio.to_thread(find_topology, job.config, hosts)
        loop = TrainingLoop(job, topology, hosts, on_event, stopping=stopping, trace=trace)
        stack.callback(loop.close)
        await loop.train(time.monotonic())


@asynccontextmanager
async def _session(job: TrainingJob) -> AsyncIterator[None]:
    """Join the configured cluster (or the job's own), or start one here and stop it at the end."""
    if ray.is_initialized():
        yield
        return
    is_own = ray_options(job.config)["address"] == STARTED_HERE
    # A cluster that is joined has the object store that it has.
    config = with_object_store(job) if is_own else job.config
    await asyncio.to_thread(connect, config)
    try:
        yield
    finally:
        await asyncio.to_thread(ray.shutdown)


@contextmanager
def _signals(stopping: asyncio.Event) -> Iterator[None]:
    """Turn the usual signals into a wish to stop; only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stopping.set)
    try:
        yield
    finally:
        for number in _STOP_SIGNALS:
            loop.remove_signal_handler(number)
