"""The Ray session that commands run in: which cluster to join, or how to start one here."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import ray

from cluster.config import ConfigError, MotleyConfig

_ROOT = Path(__file__).resolve().parent.parent
_CONNECT_TIMEOUT_S = 5.0
_STARTED_HERE = "local"
"""Ray's word for a cluster of one's own."""
_IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_log = logging.getLogger(__name__)


@asynccontextmanager
async def ray_session(config: MotleyConfig) -> AsyncIterator[None]:
    """Join the configured cluster (or the job's own), or start one here and stop it at the end.

    A session that is there already is used as it is.

    Raises:
        ConfigError: Nothing answers at the cluster's address.
    """
    if ray.is_initialized():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    await asyncio.to_thread(connect, config)
    # Ray installs a crash reporter for SIGTERM, which is our ordinary way to stop.
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield
    finally:
        await asyncio.to_thread(ray.shutdown)


@contextmanager
def prints_logged() -> Iterator[None]:
    """Log what Ray prints on stdout, which is a command's own."""
    with redirect_stdout(_Printed()):
        yield


class _Printed(io.TextIOBase):
    """Ray prints every death of a worker, in a thread of its own; events say it already."""

    def write(self, text: str) -> int:
        if text.strip():
            _log.info("printed: %s", text.strip())
        return len(text)


def connect(config: MotleyConfig) -> None:
    """Join the configured cluster (or the job's own), or start one here.

    Raises:
        ConfigError: Nothing answers at the cluster's address.
    """
    options = ray_options(config)
    address = str(options.get("address", "auto"))
    if (error := connect_error(address)) is not None:
        raise ConfigError(
            f"ray.address: {address} cannot be joined ({error}); start Ray there, or correct the "
            f"address"
        )
    ray.init(**options)


def connect_error(address: str) -> OSError | None:
    """Try the address first: Ray itself retries a dead one for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not port.isdecimal():
        return None  # "auto" and the like: Ray looks the address up
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return error
    return None


def joins_cluster(config: MotleyConfig) -> bool:
    """Whether the settings, RAY_ADDRESS or the job name a cluster; it may grow while it is used."""
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    return address is not None or _IN_JOB in os.environ


def ray_options(config: MotleyConfig) -> dict[str, Any]:
    """Return what to call `ray.init` with: join what the settings, RAY_ADDRESS or the job name."""
    settings = config.ray
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    environment = {
        "OMP_NUM_THREADS": str(config.engine.cpu_threads),
        # glibc maps and unmaps large tensors each time; with huge pages that is cheap: gradients
        # of a head of 8 million parameters took 0.18 s instead of 1.09.
        "THP_MEM_ALLOC_ENABLE": "1",
    }
    if joins_cluster(config):
        options["address"] = settings.address or os.environ.get("RAY_ADDRESS") or "auto"
        if _IN_JOB not in os.environ:
            # A submitted job's workers get its working directory; these must be told.
            options["runtime_env"] = {"env_vars": environment | _python_path()}
        return options
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.update(environment)
    options |= {
        # Else Ray would look for a cluster that someone else started on this machine.
        "address": _STARTED_HERE,
        "num_cpus": settings.num_cpus or _local_cpus(config),
        "include_dashboard": False,
        "runtime_env": {"env_vars": _python_path()},
    }
    if settings.object_store_bytes is not None:
        options["object_store_memory"] = settings.object_store_bytes
    return options


def _local_cpus(config: MotleyConfig) -> int:
    """One worker for each stage and lane may start at once; none waits for a logical CPU."""
    return len(config.devices or (None,)) + config.plan.lanes


def _python_path(extra: Sequence[str] = ()) -> dict[str, str]:
    """Make workers on this machine import the packages that this process imports."""
    known = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(_ROOT), *extra, *([known] if known else [])])}
