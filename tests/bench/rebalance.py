"""Layers that move under load, beside draining and starting again with the new plan.

Run: python tests/bench/rebalance.py [--quick]

Real: three CPU stages of tiny-qwen3 and two lanes with 32 requests in flight; layers move back and
forth. Paced: the three-device default at its planned load, one device slows to half its speed in
mid-run; the controller answers by itself. The new optimum is what a deployment reaches that was
planned for the slowed device from the start. The baseline lets what is in flight end, stops, and
starts with the new plan; meanwhile no request can begin.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")

from figures import Figure, at_most, median, report
from serve import prompt

from actors.engine.requests import Request, SamplingParams
from actors.moving import MoveReport, move
from cluster.config import MotleyConfig, default_config
from cluster.launch import Deployment, deployment
from cluster.planning import serving_workload
from placement.stages import plan_stages
from placement.topology import Topology

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "deploy" / "checkpoints" / "tiny-qwen3"
NUM_REQUESTS = 32
CUTS = ((2, 4, 2), (4, 2, 2))
SLOWNESS = 2.0
SLOW_DEVICE = "big"
SHARE_OF_OPTIMUM = 0.95
WINDOW_S = 3.0
MOST_PAUSE_S = 0.1
MOST_RECOVERY_S = 15.0


@dataclass
class Load:
    """Requests that keep a deployment busy, and when their tokens came."""

    running: Deployment
    tokens: list[list[int]] = field(default_factory=list)
    """Of every request that has ended, by the order in which they began."""
    times_s: list[float] = field(default_factory=list)

    def rate(self, begin_s: float, end_s: float) -> float:
        """Tokens/s between two times."""
        return sum(begin_s < t <= end_s for t in self.times_s) / (end_s - begin_s)


async def one(load: Load, index: int, prompt_tokens: int, new_tokens: int) -> list[int]:
    sampling = SamplingParams(temperature=0.8, seed=index, max_tokens=new_tokens, ignore_eos=True)
    ids = tuple(prompt(index, prompt_tokens))
    request = Request(id=f"{time.monotonic_ns()}-{index}", prompt=ids, sampling=sampling)
    tokens: list[int] = []
    async for output in load.running.dispatcher.generate(request):
        tokens += output.tokens
        load.times_s += [time.monotonic()] * len(output.tokens)
        if output.error:
            raise RuntimeError(output.error)
    return tokens


@asynccontextmanager
async def kept_busy(
    running: Deployment, streams: int, prompt_tokens: int, new_tokens: int
) -> AsyncIterator[Load]:
    """Keep `streams` requests in flight until the block ends."""
    load, numbers = Load(running), count()

    async def client() -> None:
        while True:
            index = next(numbers)
            # Unlike lengths, so that they do not all begin at the same time.
            length = new_tokens // 2 + index * 37 % new_tokens
            await one(load, index, prompt_tokens, length)

    clients = [asyncio.create_task(client()) for _ in range(streams)]
    try:
        yield load
        for task in clients:
            if task.done():
                task.result()
    finally:
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


def real_config() -> MotleyConfig:
    return MotleyConfig.model_validate(
        {
            "model": str(SHIPPED),
            "devices": [
                {
                    "id": f"cpu-{name}", "kind": "cpu", "flops_per_s": 1e10,
                    "memory_bytes_per_s": 1e10, "memory_bytes": 2**31,
                }
                for name in "abc"
            ],
            "plan": {"lanes": 2, "sequences_per_lane": 16, "context_tokens": 512,
                     "layer_counts": list(CUTS[-1])},
            "engine": {"prefix_cache": False},
            "gateway": {"http_port": 0, "grpc_port": 0},
            "ray": {"object_store_bytes": "80 MiB"},
        }
    )  # fmt: skip


def cut_to(running: Deployment, config: MotleyConfig, counts: Sequence[int]) -> MoveReport:
    plan = plan_stages(
        running.profile,
        Topology(devices=running.devices),
        workload=serving_workload(config),
        layer_counts=counts,
    )
    plan = replace(plan, epoch=running.fleet.plan.epoch + 1)
    with running.supervisor.fleet_turn:
        return move(running.fleet, plan, recompute=False, timeout_s=60.0, step_timeout_s=20.0)


async def batch(running: Deployment, new_tokens: int) -> tuple[Load, list[list[int]]]:
    load = Load(running)
    calls = [one(load, index, 64, new_tokens) for index in range(NUM_REQUESTS)]
    return load, list(await asyncio.gather(*calls))


async def measure_pause(quick: bool) -> list[Figure]:
    """Move layers with 32 requests in flight; then drain and start again instead."""
    config = real_config()
    new_tokens = 192 if quick else 384
    reports: list[MoveReport] = []
    async with deployment(config) as running:
        _, expected = await batch(running, new_tokens)
        moved = asyncio.create_task(batch(running, new_tokens))
        await asyncio.sleep(1.0)
        for counts in CUTS * (2 if quick else 6):
            if moved.done():
                break
            reports.append(await asyncio.to_thread(cut_to, running, config, counts))
        load, actual = await moved
        lost = sum(ours != theirs for ours, theirs in zip(actual, expected, strict=True))
        # The baseline: what is in flight ends, all stops, and the new plan starts.
        draining_s = time.monotonic()
        await batch(running, new_tokens)
    async with deployment(config) as running:
        await one(Load(running), 0, 8, 1)
        restart_s = time.monotonic() - draining_s
    for number, moved_report in enumerate(reports):
        print(
            f"move {number}: pause {moved_report.pause_s * 1e3:.1f} ms, {moved_report.kv_bytes} "
            f"bytes of KV, {moved_report.total_s:.2f} s in all"
        )
    gaps = sorted(b - a for a, b in zip(load.times_s, load.times_s[1:], strict=False))
    print(f"longest time without any token: {gaps[-1] * 1e3:.0f} ms")
    pause_s = median([moved_report.pause_s for moved_report in reports])
    worst_s = max(moved_report.pause_s for moved_report in reports)
    return [
        Figure(
            figure=f"pause of a move, {what}, 32 requests in flight, s",
            value=value, baseline=restart_s, ratio=value / restart_s,
            target=f"<= {MOST_PAUSE_S:g} s", met=value <= MOST_PAUSE_S,
        )
        for what, value in (("median", pause_s), ("worst", worst_s))
    ] + [
        Figure(
            figure="requests whose tokens changed over the moves",
            value=float(lost), baseline=0.0, ratio=float(lost), target="0", met=lost == 0,
        )
    ]  # fmt: skip


def paced_config(slowness: float) -> MotleyConfig:
    """The default's devices, with room; one is slower than declared there."""
    config = default_config()

    def slowness_of(device_id: str) -> float:
        return slowness if device_id == SLOW_DEVICE else 1.0

    gateway = config.gateway.model_copy(update={"http_port": 0, "grpc_port": 0})
    engine = config.engine.model_copy(update={"prefix_cache": False})
    devices = [
        device.model_copy(
            update={
                "flops_per_s": (device.flops_per_s or 0.0) / slowness_of(device.id),
                "memory_bytes_per_s": (device.memory_bytes_per_s or 0.0) / slowness_of(device.id),
                # The default's memories leave no other cut.
                "memory_bytes": 128 * 2**20,
            }
        )
        for device in config.devices or ()
    ]
    return config.model_copy(
        update={"gateway": gateway, "engine": engine, "devices": tuple(devices)}
    )


async def measure_recovery(quick: bool) -> list[Figure]:
    """One device slows to half its speed; how long until all is as good as it can be?"""
    config = paced_config(1.0)
    plan = config.plan
    streams, new_tokens = plan.lanes * plan.sequences_per_lane, 160
    settle_s = 8.0 if quick else 15.0
    async with (
        deployment(paced_config(SLOWNESS)) as running,
        kept_busy(running, streams, 32, new_tokens) as load,
    ):
        await asyncio.sleep(5.0 + settle_s)
        now_s = time.monotonic()
        optimum = load.rate(now_s - settle_s, now_s)
    async with (
        deployment(config) as running,
        kept_busy(running, streams, 32, new_tokens) as load,
    ):
        await asyncio.sleep(5.0 + settle_s)
        slowed_s = time.monotonic()
        before = load.rate(slowed_s - settle_s, slowed_s)
        running.fleet.stages[SLOW_DEVICE].actor.slow_down.remote(SLOWNESS)
        await asyncio.sleep(MOST_RECOVERY_S + WINDOW_S + settle_s)
        now_s = time.monotonic()
        after = load.rate(now_s - settle_s, now_s)
        recovered_s = _recovered_s(load, slowed_s, SHARE_OF_OPTIMUM * optimum)
        state = running.supervisor.document()
    for record in state["moves"]:
        print(
            f"move to plan {record['epoch']}: {record['reason']}; pause {record['pause_s']} s, "
            f"{record['outcome']}"
        )
    print(
        f"tokens/s: {before:.0f} before, {after:.0f} after, {optimum:.0f} at the new optimum; "
        f"worst after the slow-down {_worst(load, slowed_s):.0f}"
    )
    pauses = [record["pause_s"] or 0.0 for record in state["moves"]]
    return [
        Figure(
            figure="s from a slow-down to 95 % of the new optimum",
            value=recovered_s, baseline=MOST_RECOVERY_S, ratio=recovered_s / MOST_RECOVERY_S,
            target="<= 15 s", met=recovered_s <= MOST_RECOVERY_S, kind="paced",
        ),
        Figure(
            figure="tokens/s after a slow-down, beside a plan made for it",
            value=after, baseline=optimum, ratio=after / optimum,
            target=">= 0.95x baseline", met=after >= SHARE_OF_OPTIMUM * optimum, kind="paced",
        ),
        at_most("pause of the controller's moves, beside 0.1 s", max(pauses, default=0.0),
                MOST_PAUSE_S, 1.0, kind="paced"),
    ]  # fmt: skip


def _recovered_s(load: Load, since_s: float, wanted: float) -> float:
    """When the rate over a window reached what is wanted and the next windows kept it, roughly."""
    end_s = load.times_s[-1]
    at_s = since_s + WINDOW_S
    below_s = since_s
    while at_s < end_s:
        if load.rate(at_s - WINDOW_S, at_s) < wanted:
            below_s = at_s
        at_s += 0.25
    return below_s - since_s


def _worst(load: Load, since_s: float) -> float:
    end_s = load.times_s[-1]
    times = [since_s + WINDOW_S + 0.25 * i for i in range(int((end_s - since_s - WINDOW_S) / 0.25))]
    return min(load.rate(at_s - WINDOW_S, at_s) for at_s in times)


async def measure(quick: bool) -> list[Figure]:
    return [*await measure_pause(quick), *await measure_recovery(quick)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    report(asyncio.run(measure(parser.parse_args().quick)))


if __name__ == "__main__":
    main()
