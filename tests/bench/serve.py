"""Serving through real stages beside transformers' own generate, and paced beside its prediction.

Run: python tests/bench/serve.py [--quick]

Real: two unpaced CPU stages of one thread each and two lanes, against `generate` in one process
with one and with two threads (the better counts), same prompts, same number of tokens, prefill
included. Clients are coroutines at the dispatcher; the gateway's protocols are not timed.
Paced: the three-device default at its planned load, decode rate against the plan's prediction.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from figures import Figure, at_least, median, percentile, report

from actors.engine.requests import Request, SamplingParams
from cluster.config import MotleyConfig, default_config
from cluster.launch import Deployment, deployment

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "deploy" / "checkpoints" / "tiny-qwen3"
PROMPT_TOKENS = 64
BATCHES = (1, 8, 32)


@dataclass(frozen=True)
class Run:
    """What one batch gave: tokens/s, gaps between a stream's tokens, and when tokens came."""

    tokens_per_s: float
    gaps_s: list[float]
    times_s: list[list[float]]


def prompt(index: int, length: int) -> list[int]:
    """A prompt of its own for each stream, so that no prefix is shared."""
    return [5 + (index * 37 + position * 11) % 1500 for position in range(length)]


def make_wide_checkpoint(folder: Path) -> Path:
    """A random 8-layer model of width 512, with the shipped tokenizer."""
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3", vocab_size=2048, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=True, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, folder / name)
    return folder


def baseline(model: Path, threads: int, batch: int, new_tokens: int, repeats: int) -> float:
    """Tokens/s of `generate` in a process of its own."""
    script = f"""
import sys, time, torch
torch.set_num_threads({threads})
from transformers import AutoModelForCausalLM
sys.path.insert(0, {str(Path(__file__).parent)!r})
from serve import prompt
model = AutoModelForCausalLM.from_pretrained({str(model)!r}, dtype=torch.float32).eval()
ids = torch.tensor([prompt(i, {PROMPT_TOKENS}) for i in range({batch})])
def run(n):
    start = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                   max_new_tokens=n, min_new_tokens=n, pad_token_id=0)
    return time.perf_counter() - start
run(8)
print({batch * new_tokens} / min(run({new_tokens}) for _ in range({repeats})))
"""
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300,
        env={**_environment(), "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    return float(out.stdout.strip().splitlines()[-1])


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


async def run_batch(running: Deployment, batch: int, *, prompt_tokens: int, new_tokens: int) -> Run:
    """Send `batch` streams at once and note when each token arrives."""
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)

    async def stream(index: int) -> list[float]:
        ids = tuple(prompt(index, prompt_tokens))
        request = Request(id=f"{time.monotonic_ns()}-{index}", prompt=ids, sampling=sampling)
        times = []
        async for output in running.dispatcher.generate(request):
            times += [time.perf_counter()] * len(output.tokens)
        return times

    start = time.perf_counter()
    times = await asyncio.gather(*(stream(i) for i in range(batch)))
    total_s = time.perf_counter() - start
    gaps = [b - a for series in times for a, b in pairwise(series)]
    return Run(batch * new_tokens / total_s, gaps, times)


def real_config(model: Path) -> MotleyConfig:
    return MotleyConfig.model_validate(
        {
            "model": str(model),
            "devices": [
                {
                    "id": name, "kind": "cpu", "flops_per_s": 1e10, "memory_bytes_per_s": 1e10,
                    "memory_bytes": 2**31,
                }
                for name in ("cpu-a", "cpu-b")
            ],
            "plan": {"lanes": 2, "sequences_per_lane": 16, "context_tokens": 256},
            "engine": {"prefix_cache": False},
            "gateway": {"http_port": 0, "grpc_port": 0},
            "ray": {"object_store_bytes": "80 MiB"},
        }
    )  # fmt: skip


async def measure_real(
    label: str, model: Path, *, new_tokens: int, repeats: int
) -> tuple[list[Figure], dict[int, Run]]:
    bases = {
        batch: max(baseline(model, threads, batch, new_tokens, repeats) for threads in (1, 2))
        for batch in BATCHES
    }
    best: dict[int, Run] = {}
    async with deployment(real_config(model)) as running:
        await run_batch(running, 4, prompt_tokens=8, new_tokens=8)
        for batch in BATCHES:
            runs = [
                await run_batch(running, batch, prompt_tokens=PROMPT_TOKENS, new_tokens=new_tokens)
                for _ in range(repeats)
            ]
            best[batch] = max(runs, key=lambda run: run.tokens_per_s)
        added_ms = await added_ms_per_token(running, new_tokens)
    figures = [
        Figure(
            figure=f"{label}: ms a token added to the stages' own compute, batch 1",
            value=added_ms, baseline=1.0, ratio=added_ms, target="<= 1 ms", met=added_ms <= 1.0,
        )
    ]  # fmt: skip
    for batch, least in ((8, 1.0), (32, 1.2)):
        name = f"{label}: tokens/s at batch {batch}, two stages beside generate"
        figures.append(at_least(name, best[batch].tokens_per_s, bases[batch], least))
    for batch in BATCHES:
        run = best[batch]
        print(
            f"{label}, batch {batch}: {run.tokens_per_s:.0f} tokens/s (generate "
            f"{bases[batch]:.0f}), inter-token p50 {median(run.gaps_s) * 1e3:.1f} ms, "
            f"p99 {percentile(run.gaps_s, 99) * 1e3:.1f} ms"
        )
    return figures, best


async def added_ms_per_token(running: Deployment, new_tokens: int) -> float:
    """Batch 1: the mean gap at the client less the stages' own seconds of those steps."""
    await asyncio.sleep(0.6)  # reports come every 0.25 s; this run's must not miss the last one
    before = _lane_sums(running)
    run = await run_batch(running, 1, prompt_tokens=1, new_tokens=new_tokens)
    await asyncio.sleep(0.6)
    after = _lane_sums(running)
    stage_s = (after["stage_s"] - before["stage_s"]) / (after["steps"] - before["steps"])
    return (sum(run.gaps_s) / len(run.gaps_s) - stage_s) * 1e3


def _lane_sums(running: Deployment) -> dict[str, float]:
    reports: Any = running.dispatcher.lane_reports().values()
    return {key: sum(entry[key] for entry in reports) for key in ("stage_s", "steps")}


async def measure_paced(new_tokens: int) -> Figure:
    """The embedded default at its planned load: every lane full, mean context as planned."""
    config = default_config()
    gateway = config.gateway.model_copy(update={"http_port": 0, "grpc_port": 0})
    engine = config.engine.model_copy(update={"prefix_cache": False})
    config = config.model_copy(update={"gateway": gateway, "engine": engine})
    plan = config.plan
    async with deployment(config) as running:
        run = await run_batch(
            running,
            plan.lanes * plan.sequences_per_lane,
            prompt_tokens=plan.context_tokens - new_tokens // 2,
            new_tokens=new_tokens,
        )
        predicted = running.plan.predicted_tokens_per_s
    # Decoding with every lane full: from the last stream's first token to the first one's last.
    begin = max(series[0] for series in run.times_s)
    end = min(series[-1] for series in run.times_s)
    tokens = sum(begin < t <= end for series in run.times_s for t in series)
    measured = tokens / (end - begin)
    print(f"paced default: {measured:.1f} tokens/s measured, {predicted:.1f} predicted")
    ratio = measured / predicted
    return Figure(
        figure="paced default: decode tokens/s beside the plan's prediction",
        value=measured, baseline=predicted, ratio=ratio, target="within 10 %",
        met=abs(ratio - 1) <= 0.1, kind="paced",
    )  # fmt: skip


async def measure(quick: bool) -> list[Figure]:
    new_tokens = 64 if quick else 128
    repeats = 1 if quick else 3
    figures, _ = await measure_real("tiny-qwen3", SHIPPED, new_tokens=new_tokens, repeats=repeats)
    if not quick:
        with tempfile.TemporaryDirectory() as folder:
            wide = make_wide_checkpoint(Path(folder))
            more, _ = await measure_real("width 512", wide, new_tokens=new_tokens, repeats=repeats)
            figures += more
    figures.append(await measure_paced(64 if quick else 96))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    figures = asyncio.run(measure(parser.parse_args().quick))
    report(figures)


if __name__ == "__main__":
    main()
