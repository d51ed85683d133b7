"""Stages and lanes of one machine break all the time: no token is lost, none changes.

How long and by which seed: see `soaking`; `tests/hosts/test_soak_of_links.py` cuts real links.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from leftovers import nothing_left_behind
from soaking import SECONDS, Fault, Missed, Soak

from actors.hosting import FleetError
from actors.losses import Member
from cluster.config import MotleyConfig
from tests.local_ray.conftest import Served, serving

ROOT = Path(__file__).resolve().parents[2]
CALL_TIMEOUT_S = 20.0
REQUEST_TIMEOUT_S = 170.0

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(SECONDS + 600)]


def make_config() -> MotleyConfig:
    return MotleyConfig.model_validate(
        {
            "model": str(ROOT / "deploy" / "checkpoints" / "tiny-qwen3"),
            "devices": [
                {
                    "id": f"paced{i}", "kind": "paced", "flops_per_s": 8e9,
                    "memory_bytes_per_s": 2e9, "memory_bytes": 2**28,
                }
                for i in range(4)
            ],
            "plan": {"lanes": 2, "sequences_per_lane": 8, "context_tokens": 256},
            "engine": {"num_kv_blocks": 256, "step_timeout_s": 120},
            "controller": {"silence_timeout_s": 6, "recovery_timeout_s": 120},
            "gateway": {"http_port": 0, "grpc_port": 0},
            "ray": {"object_store_bytes": "80 MB", "num_cpus": 8},
        }
    )  # fmt: skip


class Breaker:
    """What can go wrong on one machine."""

    def __init__(self, served: Served) -> None:
        self._running = served.running

    def kinds(self) -> list[Fault]:
        return [
            self.kill_stage, self.hang_stage, self.stall_stage, self.kill_lane, self.slow_down,
            self.move_layers,
        ]  # fmt: skip

    def kill_stage(self, draws: random.Random) -> None:
        with aimed():
            os.kill(pid_of(self._stage(draws)), signal.SIGKILL)

    def hang_stage(self, draws: random.Random) -> None:
        """For good: it is counted as lost after a while, and killed."""
        with aimed():
            os.kill(pid_of(self._stage(draws)), signal.SIGSTOP)

    def stall_stage(self, draws: random.Random) -> None:
        """It pauses, and goes on before it counts as lost."""
        with aimed():
            pid = pid_of(self._stage(draws))
            os.kill(pid, signal.SIGSTOP)
            time.sleep(2.0)
            os.kill(pid, signal.SIGCONT)

    def kill_lane(self, draws: random.Random) -> None:
        with aimed():
            os.kill(pid_of(draws.choice(list(self._running.fleet.lanes.values()))), signal.SIGKILL)

    def slow_down(self, draws: random.Random) -> None:
        """Or be as fast again as declared."""
        with aimed():
            slowness = draws.choice([1.0, 2.0, 3.0])
            ray.get(self._stage(draws).actor.slow_down.remote(slowness), timeout=CALL_TIMEOUT_S)

    def move_layers(self, _: random.Random) -> None:
        """An operator asks for the best plan."""
        with aimed():
            self._running.supervisor.rebalance()

    def _stage(self, draws: random.Random) -> Member:
        stages = list(self._running.fleet.stages.values())
        return draws.choice(sorted(stages, key=lambda member: str(member.key)))


@contextmanager
def aimed() -> Iterator[None]:
    """Take it for a miss when the target is being replaced."""
    try:
        yield
    except (FleetError, ray.exceptions.RayError, ProcessLookupError, IndexError) as error:
        raise Missed(type(error).__name__) from error


def pid_of(member: Member) -> int:
    found = member.actor.__ray_call__.remote(lambda _: os.getpid())
    return int(ray.get(found, timeout=CALL_TIMEOUT_S))


async def test_no_token_is_lost_or_changed_whatever_breaks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path))
    with nothing_left_behind():
        block = serving(make_config())
        served = await asyncio.to_thread(block.__enter__)
        try:
            running, faults = served.running, Breaker(served).kinds()
            # Driver, gateway and clients are this process.
            soak = Soak(
                running.grpc_target,
                running.token,
                faults,
                gateway_pid=os.getpid(),
                request_timeout_s=REQUEST_TIMEOUT_S,
            )
            await soak.run()
            await asyncio.to_thread(served.wait_until_idle)
        finally:
            await asyncio.to_thread(block.__exit__, None, None, None)
