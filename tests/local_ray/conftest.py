"""A real deployment for a module's tests: Ray actors, sockets, gRPC and HTTP, on this machine.

One Ray instance serves the whole session (a node takes seconds to start); deployments come and
go on it. The deployment runs on an event loop in a thread, so tests may be plain functions.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import ray

from cluster.backend import DeploymentStatus
from cluster.config import MotleyConfig
from cluster.launch import Deployment, deployment

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "deploy" / "checkpoints"
LAUNCH_TIMEOUT_S = 120.0
DRAIN_TIMEOUT_S = 60.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "local_ray" in item.path.parts:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What deployments write down stays out of the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOTLEY_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def ray_session(own_home: None) -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


class Served:
    """A running deployment seen from a test's thread."""

    def __init__(self, running: Deployment, loop: asyncio.AbstractEventLoop) -> None:
        self.running = running
        self._loop = loop

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        """Run a coroutine on the deployment's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def status(self) -> DeploymentStatus:
        return self.call(self.running.dispatcher.status())

    def wait_until(self, holds: Callable[[DeploymentStatus], bool]) -> DeploymentStatus:
        """Poll the status until it holds; fails with the last one at the deadline."""
        deadline_s = time.monotonic() + DRAIN_TIMEOUT_S
        while not holds(status := self.status()):
            assert time.monotonic() < deadline_s, status
            time.sleep(0.05)
        return status

    def wait_until_idle(self) -> DeploymentStatus:
        """Wait until no choice runs or waits and no block is held."""
        return self.wait_until(
            lambda status: all(
                lane.running == lane.waiting == lane.blocks_in_use == 0 for lane in status.lanes
            )
        )


@contextmanager
def serving(config: MotleyConfig) -> Iterator[Served]:
    """Deploy on a loop of its own thread; everything is gone when the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    leave: asyncio.Event = asyncio.Event()
    up: Future[Deployment] = Future()

    async def main() -> None:
        try:
            async with deployment(config) as running:
                up.set_result(running)
                await leave.wait()
        except BaseException as error:
            if not up.done():
                up.set_exception(error)
            raise

    task = asyncio.run_coroutine_threadsafe(main(), loop)
    try:
        yield Served(up.result(LAUNCH_TIMEOUT_S), loop)
    finally:
        loop.call_soon_threadsafe(leave.set)
        if not up.done() or up.exception() is None:
            task.result(60.0)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10.0)
        loop.close()


def make_config(model: Path | str, layer_counts: tuple[int, ...], **changes: Any) -> MotleyConfig:
    """Unpaced CPU stages with the given cut; `changes` are merged into the settings' sections."""
    tree: dict[str, Any] = {
        "model": str(model),
        "devices": [
            {
                "id": f"cpu{i}",
                "kind": "cpu",
                "flops_per_s": 1e10,
                "memory_bytes_per_s": 1e10,
                "memory_bytes": 2**31,
            }
            for i in range(len(layer_counts))
        ],
        "plan": {"lanes": 2, "layer_counts": list(layer_counts), "context_tokens": 256},
        "engine": {},
        "controller": {},
        "gateway": {"http_port": 0, "grpc_port": 0},
    }
    for section, values in changes.items():
        tree[section] = tree[section] | values if isinstance(values, dict) else values
    return MotleyConfig.model_validate(tree)


@pytest.fixture(scope="module")
def serve_model(ray_session: None) -> Iterator[Callable[..., Served]]:
    """Deploy a model (once for equal settings) until the module's tests are done."""
    open_blocks: list[Any] = []
    made: dict[str, Served] = {}

    def make(model: Path | str, layer_counts: tuple[int, ...], **changes: Any) -> Served:
        config = make_config(model, layer_counts, **changes)
        key = config.model_dump_json()
        if key not in made:
            block = serving(config)
            made[key] = block.__enter__()
            open_blocks.append(block)
        return made[key]

    yield make
    for block in reversed(open_blocks):
        block.__exit__(None, None, None)


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    return CHECKPOINTS
