"""Steps of decoding while experts move all the time, beside steps while none does.

Run: python tests/bench/expert_moves.py [--quick]

A deployment of tiny-qwen3-moe with its experts sharded over three paced devices decodes sixteen
sequences; then it is told every moment that other experts are hot, so that experts are read and
changed over without a pause. All devices are alike and hold alike many experts, so a step costs the
same on any of the maps. A step is the time between two tokens of one stream.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from expert_loads import hot  # noqa: E402 - the path above
from figures import Figure, at_most, median, percentile, report  # noqa: E402

from actors.engine.requests import Request, SamplingParams  # noqa: E402
from actors.experts_shell import ExpertsShell  # noqa: E402
from cluster.config import MotleyConfig  # noqa: E402
from cluster.launch import Deployment, deployment  # noqa: E402
from placement.sharding.rebalance_values import LoadsMeasured, RebalanceRequested  # noqa: E402

MODEL = ROOT / "deploy" / "checkpoints" / "tiny-qwen3-moe"
MEMORY = {"a": "13.8 MiB", "b": "12.8 MiB", "c": "9.5 MiB"}
"""Room for six experts of each layer beside what is there of a stage."""
SEQUENCES = 16
TOKENS = 440
TELL_EVERY_S = 0.25
STEP_BYTES = 400_000
MOST_OVER_MEDIAN = 1.2


def config() -> MotleyConfig:
    return MotleyConfig.model_validate(
        {
            "model": str(MODEL),
            "devices": [
                {
                    "id": f"paced-{name}", "kind": "paced", "flops_per_s": 2e9,
                    "memory_bytes_per_s": 3e7, "memory_bytes": memory,
                }
                for name, memory in MEMORY.items()
            ],
            "plan": {
                "experts": "shards", "lanes": 1, "sequences_per_lane": SEQUENCES,
                "context_tokens": 64, "layer_counts": [4, 2, 0],
            },
            "engine": {"max_running": SEQUENCES},
            "controller": {"rebalance": False, "expert_step_bytes": STEP_BYTES},
            "gateway": {"http_port": 0, "grpc_port": 0},
            "ray": {"object_store_bytes": "80 MiB"},
        }
    )  # fmt: skip


async def steps_s(running: Deployment, name: str, num_tokens: int) -> list[float]:
    """Decode; returns the seconds of every step in which all sequences took part."""
    sampling = SamplingParams(temperature=0.8, max_tokens=num_tokens, ignore_eos=True)

    async def one(index: int) -> list[float]:
        ids = tuple(running.tokenizer.encode(f"{index} apples and"))
        drawn = replace(sampling, seed=index)
        times_s = []
        async for output in running.dispatcher.generate(
            Request(id=f"{name}-{index}", prompt=ids, sampling=drawn)
        ):
            if output.error:
                raise SystemExit(output.error)
            times_s += [time.monotonic()] * bool(output.tokens)
        return times_s

    streams = await asyncio.gather(*(one(index) for index in range(SEQUENCES)))
    first_s, last_s = max(each[0] for each in streams), min(each[-1] for each in streams)
    whole = [t for t in streams[0] if first_s <= t <= last_s]
    return [b - a for a, b in pairwise(whole)]


async def move_experts(shell: ExpertsShell, num_layers: int, num_experts: int) -> None:
    turn = 0
    while True:
        turn += 1
        shell.tell(RebalanceRequested())
        shell.tell(LoadsMeasured(summary=hot(num_layers, num_experts, 4 * turn)))
        await asyncio.sleep(TELL_EVERY_S)


async def measure(*, quick: bool) -> list[Figure]:
    async with deployment(config()) as running:
        shell, crew = running.supervisor.experts, running.fleet.experts
        if shell is None or crew is None:
            raise SystemExit("no shards")
        num_tokens = 150 if quick else TOKENS
        await steps_s(running, "warm", 10)
        still = await steps_s(running, "still", num_tokens)
        shown = crew.map
        moving = asyncio.create_task(move_experts(shell, len(shown.layers), shown.num_experts))
        moved = await steps_s(running, "moving", num_tokens)
        moving.cancel()
        copies = [len(change.copies) for change in shell.changes]
        print(
            f"{shell.num_maps} maps came into force in {len(moved)} steps, the last "
            f"{len(copies)} with {sum(copies)} experts read"
        )
    for name, each in (("still", still), ("moving", moved)):
        print(
            f"{name}: median {median(each) * 1e3:.1f} ms, p99 {percentile(each, 99) * 1e3:.1f}, "
            f"longest {max(each) * 1e3:.1f}",
            flush=True,
        )
    made = at_most(
        "experts, longest step while they move, ms, beside the median step",
        max(moved) * 1e3,
        median(moved) * 1e3,
        MOST_OVER_MEDIAN,
        kind="paced",
    )
    beside = at_most(
        "experts, longest step while none moves, ms, beside the median step",
        max(still) * 1e3,
        median(still) * 1e3,
        MOST_OVER_MEDIAN,
        kind="paced",
    )
    return [made, replace(beside, target="reported")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps: under 3 minutes")
    options = parser.parse_args()
    report(asyncio.run(measure(quick=options.quick)))


if __name__ == "__main__":
    main()
