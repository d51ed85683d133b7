"""Clients that never rest, and something breaks all the time: no token is lost, none changes.

Three minutes; MOTLEY_SOAK_S makes it longer (1800: half an hour). What happens when is drawn from
MOTLEY_SOAK_SEED, which a failure prints.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from leftovers import nothing_left_behind

from actors.fleet import FleetError
from actors.losses import Member
from cluster.client import AsyncMotleyClient, Overloaded, Unreachable
from cluster.config import MotleyConfig
from tests.local_ray.conftest import Served, serving

ROOT = Path(__file__).resolve().parents[2]
SECONDS = float(os.environ.get("MOTLEY_SOAK_S", "180"))
SEED = int(os.environ.get("MOTLEY_SOAK_SEED", "1"))
FAULT_EVERY_S = 10.0
NUM_CLIENTS = 8
NUM_KINDS = 24
"""Different requests; each comes again and again."""
REQUEST_TIMEOUT_S = 170.0
MOST_REFUSED_S = 60.0
"""A client is not turned away for longer: what is lost is made good sooner."""
MOST_GROWTH_BYTES = 150 * 2**20

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


class Soak:
    """Clients, faults, and what came of them."""

    def __init__(self, served: Served, config: MotleyConfig) -> None:
        self._served = served
        self._config = config
        self._random = random.Random(SEED)
        self.expected: dict[int, Any] = {}
        self.faults: Counter[str] = Counter()
        self.num_done = 0
        self.longest_s = 0.0
        """That a request took."""
        self.end_s = 0.0

    def request(self, kind: int) -> tuple[str, dict[str, Any]]:
        """One of the requests: prompts and outputs of mixed lengths, greedy and sampled."""
        options: dict[str, Any] = {"max_tokens": 16 + 11 * kind, "seed": kind, "ignore_eos": True}
        options |= {"temperature": 0.0} if kind % 2 else {"temperature": 0.9, "top_p": 0.9}
        if kind % 5 == 0:
            options["n"] = 2
        return f"class Number{kind}:\n    " * (1 + kind % 7), options

    async def ask(self, client: AsyncMotleyClient, kind: int) -> Any:
        prompt, options = self.request(kind)
        began_s = time.monotonic()
        while True:
            try:
                answer = await client.complete(prompt, timeout_s=REQUEST_TIMEOUT_S, **options)
            except (Overloaded, Unreachable) as refused:
                if refused.retry_after_s is None or time.monotonic() - began_s > MOST_REFUSED_S:
                    raise
                await asyncio.sleep(min(refused.retry_after_s, 2.0))
            else:
                return [(c.text, c.token_ids, c.finish_reason) for c in answer.choices]

    async def client(self, number: int) -> None:
        draws = random.Random(SEED * 1000 + number)
        async with self.connected() as client:
            while time.monotonic() < self.end_s:
                kind = draws.randrange(NUM_KINDS)
                began_s = time.monotonic()
                assert await self.ask(client, kind) == self.expected[kind], f"request {kind}"
                self.num_done += 1
                self.longest_s = max(self.longest_s, time.monotonic() - began_s)

    def connected(self) -> AsyncMotleyClient:
        running = self._served.running
        return AsyncMotleyClient(running.grpc_target, running.token)

    async def break_things(self) -> None:
        kinds: list[Callable[[], None]] = [
            self.kill_stage, self.hang_stage, self.stall_stage, self.kill_lane, self.slow_down,
            self.move_layers,
        ]  # fmt: skip
        while time.monotonic() + FAULT_EVERY_S < self.end_s:
            await asyncio.sleep(FAULT_EVERY_S)
            fault = self._random.choice(kinds)
            self.faults[fault.__name__] += 1
            try:
                await asyncio.to_thread(fault)
            except (FleetError, ray.exceptions.RayError, ProcessLookupError, IndexError) as error:
                # What it was aimed at is just being replaced.
                self.faults[f"{fault.__name__} missed: {type(error).__name__}"] += 1

    def _stage(self) -> Member:
        return self._random.choice(sorted(self._stages(), key=lambda member: str(member.key)))

    def _stages(self) -> list[Member]:
        return list(self._served.running.fleet.stages.values())

    def kill_stage(self) -> None:
        os.kill(pid_of(self._stage()), signal.SIGKILL)

    def hang_stage(self) -> None:
        """For good: it is counted as lost after a while, and killed."""
        os.kill(pid_of(self._stage()), signal.SIGSTOP)

    def stall_stage(self) -> None:
        """As when a link is cut for a moment: nothing is heard, then all at once."""
        pid = pid_of(self._stage())
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2.0)
        os.kill(pid, signal.SIGCONT)

    def kill_lane(self) -> None:
        lanes = list(self._served.running.fleet.lanes.values())
        os.kill(pid_of(self._random.choice(lanes)), signal.SIGKILL)

    def slow_down(self) -> None:
        """Or be as fast again as declared."""
        slowness = self._random.choice([1.0, 2.0, 3.0])
        ray.get(self._stage().actor.slow_down.remote(slowness), timeout=20)

    def move_layers(self) -> None:
        """An operator asks for the best plan."""
        self._served.running.supervisor.rebalance()


def pid_of(member: Member) -> int:
    return int(ray.get(member.actor.__ray_call__.remote(lambda _: os.getpid()), timeout=20))


def resident_bytes() -> int:
    """Of this process: driver, gateway and clients."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def test_no_token_is_lost_or_changed_whatever_breaks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path))
    config = make_config()
    with nothing_left_behind():
        block = serving(config)
        served = await asyncio.to_thread(block.__enter__)
        try:
            await soak(Soak(served, config))
            await asyncio.to_thread(served.wait_until_idle)
        finally:
            await asyncio.to_thread(block.__exit__, None, None, None)


async def soak(it: Soak) -> None:
    async with it.connected() as client:
        answers = await asyncio.gather(*(it.ask(client, kind) for kind in range(NUM_KINDS)))
        again = await asyncio.gather(*(it.ask(client, kind) for kind in range(NUM_KINDS)))
    assert again == answers, "the requests differ without any fault"
    it.expected = dict(enumerate(answers))
    before_bytes = resident_bytes()
    it.end_s = time.monotonic() + SECONDS
    async with asyncio.TaskGroup() as tasks:
        for number in range(NUM_CLIENTS):
            tasks.create_task(it.client(number))
        tasks.create_task(it.break_things())
    grown_bytes = resident_bytes() - before_bytes
    told = (
        f"seed {SEED}: {it.num_done} requests, the longest {it.longest_s:.0f} s, "
        f"{dict(it.faults)}, {grown_bytes} bytes more"
    )
    logging.getLogger(__name__).warning(told)
    assert it.num_done > NUM_CLIENTS, told
    assert grown_bytes < MOST_GROWTH_BYTES, told
