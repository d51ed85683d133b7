"""What real stages, lanes and servers answer is what transformers generates in one process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from identity import Expected, check_identical, generate

from actors.engine.requests import Request, SamplingParams

TEXTS = (
    "def fibonacci(n):",
    "import os",
    "class Queue:\n    def __init__(self):",
    '"""Return the',
    "for i in range(10):\n    print(",
    "try:\n    value = int(text)\nexcept ValueError:",
    "x",
    "The quick brown fox jumps over the lazy dog and then, after a while, it " * 8,
)
NUM_NEW = 24


def reference(path: Path, prompts: list[tuple[int, ...]]) -> list[Expected]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return [generate(model, prompt, NUM_NEW) for prompt in prompts]


async def collect(dispatcher: Any, request: Request) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {i: [] for i in range(request.n)}
    async for output in dispatcher.generate(request):
        assert output.error == ""
        tokens[output.index] += output.tokens
    return tokens


@pytest.mark.parametrize(
    ("name", "layer_counts"), [("tiny-qwen3", (5, 2, 1)), ("tiny-qwen3-moe", (1, 2, 1, 2))]
)
def test_greedy_tokens_through_stages_and_lanes(
    name: str, layer_counts: tuple[int, ...], serve_model: Callable[..., Any], checkpoints: Path
) -> None:
    served = serve_model(checkpoints / name, layer_counts)
    prompts = [served.running.tokenizer.encode(text) for text in TEXTS]
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_NEW)

    async def all_at_once() -> list[dict[int, list[int]]]:
        requests = [
            Request(id=f"{name}-{i}", prompt=prompt, sampling=sampling)
            for i, prompt in enumerate(prompts)
        ]
        dispatcher = served.running.dispatcher
        return await asyncio.gather(*(collect(dispatcher, request) for request in requests))

    got = served.call(all_at_once())

    check_identical(reference(checkpoints / name, prompts), [tokens[0] for tokens in got])
    status = served.wait_until_idle()
    assert all(stage.steps > 0 for stage in status.stages)
    assert all(sent > 0 for sent in status.link_bytes.values())


def test_seeded_samples_are_the_same_alone_and_in_a_crowd(
    serve_model: Callable[..., Any], checkpoints: Path
) -> None:
    served = serve_model(checkpoints / "tiny-qwen3", (5, 2, 1))
    prompt = served.running.tokenizer.encode("def ")
    sampling = SamplingParams(temperature=1.0, top_p=0.95, seed=7, max_tokens=16, ignore_eos=True)
    dispatcher = served.running.dispatcher

    alone = served.call(
        collect(dispatcher, Request(id="alone", prompt=prompt, sampling=sampling, n=2))
    )

    async def crowd() -> list[dict[int, list[int]]]:
        requests = [
            Request(id=f"crowd-{i}", prompt=prompt, sampling=sampling, n=2) for i in range(8)
        ]
        return await asyncio.gather(*(collect(dispatcher, request) for request in requests))

    assert all(tokens == alone for tokens in served.call(crowd()))
    assert alone[0] != alone[1]
