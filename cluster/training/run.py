"""`motley train`: from settings to a trained checkpoint.

`run` opens checkpoint, data and run folder, joins or starts Ray, plans, starts devices and weight
hosts, and trains until the last step, or until a signal: then it saves and stops. What it started,
it stops, also when a step fails.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager

from cluster.config import MotleyConfig
from cluster.inventory import find_hosts, find_topology
from cluster.ray_session import STOP_SIGNALS, joins_cluster, prints_logged, ray_session
from cluster.training.events import TrainingEvent
from cluster.training.job import TrainingJob, open_job
from cluster.training.loop import TrainingLoop
from cluster.training.object_store import with_object_store

OnEvent = Callable[[TrainingEvent], None]


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
    with prints_logged():
        asyncio.run(_run(job, on_event, trace=trace))


async def _run(job: TrainingJob, on_event: OnEvent, *, trace: bool) -> None:
    config, stopping = job.config, asyncio.Event()
    async with AsyncExitStack() as stack:
        # A cluster that is joined has the object store that it has.
        session = ray_session(config if joins_cluster(config) else with_object_store(job))
        await stack.enter_async_context(session)
        stack.enter_context(_signals(stopping))
        hosts = await asyncio.to_thread(find_hosts)
        topology = await asyncio.to_thread(find_topology, config, hosts)
        loop = TrainingLoop(job, topology, hosts, on_event, stopping=stopping, trace=trace)
        stack.callback(loop.close)
        await loop.train(time.monotonic())


@contextmanager
def _signals(stopping: asyncio.Event) -> Iterator[None]:
    """Turn the usual signals into a wish to stop; only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stopping.set)
    try:
        yield
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
