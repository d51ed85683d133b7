"""Clients that never rest while something breaks all the time: what a soak is, wherever it runs.

MOTLEY_SOAK_S makes it longer than a minute (1800: half an hour). What happens when is drawn from
MOTLEY_SOAK_SEED, which a failure prints.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.client import AsyncMotleyClient, Overloaded, Unreachable

SECONDS = float(os.environ.get("MOTLEY_SOAK_S", "60"))
SEED = int(os.environ.get("MOTLEY_SOAK_SEED", "1"))
FAULT_EVERY_S = 10.0
NUM_CLIENTS = 8
NUM_KINDS = 24
"""Different requests; each comes again and again."""
MOST_REFUSED_S = 60.0
"""A client is not turned away for longer: what is lost is made good sooner."""
MOST_GROWTH_BYTES = 150 * 2**20

Fault = Callable[[random.Random], None]


class Missed(Exception):
    """What a fault was aimed at is just being replaced."""


class Soak:
    """Clients, faults, and what came of them."""

    def __init__(
        self,
        target: str,
        token: str,
        faults: Sequence[Fault],
        *,
        gateway_pid: int,
        request_timeout_s: float,
    ) -> None:
        """`faults` run on a thread, one at a time."""
        self._target = target
        self._token = token
        self._kinds = faults
        self._gateway_pid = gateway_pid
        self._request_timeout_s = request_timeout_s
        self._random = random.Random(SEED)
        self._expected: dict[int, Any] = {}
        self._faults: Counter[str] = Counter()
        self._num_done = 0
        self._longest_s = 0.0
        """That a request took."""
        self._end_s = 0.0

    async def run(self) -> None:
        """Ask for everything twice without any fault, then go on with faults."""
        async with self._connected() as client:
            answers = await asyncio.gather(*(self._ask(client, kind) for kind in range(NUM_KINDS)))
            again = await asyncio.gather(*(self._ask(client, kind) for kind in range(NUM_KINDS)))
        assert again == answers, "the requests differ without any fault"
        self._expected = dict(enumerate(answers))
        before_bytes = _resident_bytes(self._gateway_pid)
        self._end_s = time.monotonic() + SECONDS
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(NUM_CLIENTS):
                    tasks.create_task(self._client(number))
                tasks.create_task(self._break_things())
        finally:
            grown_bytes = _resident_bytes(self._gateway_pid) - before_bytes
            told = (
                f"seed {SEED}: {self._num_done} requests, the longest {self._longest_s:.0f} s, "
                f"{dict(self._faults)}, {grown_bytes} bytes more"
            )
            logging.getLogger(__name__).warning(told)
        assert self._num_done > NUM_CLIENTS, told
        assert grown_bytes < MOST_GROWTH_BYTES, told

    def _connected(self) -> AsyncMotleyClient:
        return AsyncMotleyClient(self._target, self._token)

    async def _ask(self, client: AsyncMotleyClient, kind: int) -> Any:
        prompt, options = _request(kind)
        began_s = time.monotonic()
        while True:
            try:
                answer = await client.complete(prompt, timeout_s=self._request_timeout_s, **options)
            except (Overloaded, Unreachable) as refused:
                if refused.retry_after_s is None or time.monotonic() - began_s > MOST_REFUSED_S:
                    raise
                await asyncio.sleep(min(refused.retry_after_s, 2.0))
            else:
                return [(c.text, c.token_ids, c.finish_reason) for c in answer.choices]

    async def _client(self, number: int) -> None:
        draws = random.Random(SEED * 1000 + number)
        async with self._connected() as client:
            while time.monotonic() < self._end_s:
                kind = draws.randrange(NUM_KINDS)
                began_s = time.monotonic()
                assert await self._ask(client, kind) == self._expected[kind], f"request {kind}"
                self._num_done += 1
                self._longest_s = max(self._longest_s, time.monotonic() - began_s)

    async def _break_things(self) -> None:
        while time.monotonic() + FAULT_EVERY_S < self._end_s:
            await asyncio.sleep(FAULT_EVERY_S)
            fault = self._random.choice(self._kinds)
            self._faults[fault.__name__] += 1
            try:
                await asyncio.to_thread(fault, self._random)
            except Missed as missed:
                self._faults[f"{fault.__name__} missed: {missed}"] += 1


def _request(kind: int) -> tuple[str, dict[str, Any]]:
    """One of the requests: prompts and outputs of mixed lengths, greedy and sampled."""
    options: dict[str, Any] = {"max_tokens": 16 + 11 * kind, "seed": kind, "ignore_eos": True}
    options |= {"temperature": 0.0} if kind % 2 else {"temperature": 0.9, "top_p": 0.9}
    if kind % 5 == 0:
        options["n"] = 2
    return f"class Number{kind}:\n    " * (1 + kind % 7), options


def _resident_bytes(pid: int) -> int:
    """The memory of a process of this machine."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
