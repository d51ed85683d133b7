"""The same pipeline on CUDA. Selected with `-m gpu` on a machine that has a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from identity import Expected, check_identical, generate

from actors.engine.checkpoint import Checkpoint
from actors.engine.config import EngineConfig
from actors.engine.local import LocalPipeline
from actors.engine.requests import Request, SamplingParams

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

PROMPTS = [tuple(range(3, 3 + length)) for length in (1, 7, 30, 60)]
NUM_NEW = 16


def requests() -> list[Request]:
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_NEW)
    return [Request(id=str(i), prompt=p, sampling=sampling) for i, p in enumerate(PROMPTS)]


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe", "gpt_oss"])
def test_float32_tokens_on_cuda_are_those_of_transformers_on_the_cpu(
    model_type: str, checkpoint_dir: Callable[..., Path], reference: Callable[[Path], Any]
) -> None:
    path = checkpoint_dir(model_type)
    expected: list[Expected] = [generate(reference(path), p, NUM_NEW) for p in PROMPTS]
    config = EngineConfig(dtype="float32")
    pipeline = LocalPipeline(Checkpoint.open(str(path)), (1, 4), config=config, device="cuda")

    done = pipeline.generate(requests())

    check_identical(expected, [done[str(i), 0].tokens for i in range(len(PROMPTS))])


def test_auto_type_is_bfloat16_on_cuda(checkpoint_dir: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir("qwen3")))
    pipeline = LocalPipeline(checkpoint, (2,), device="cuda")

    done = pipeline.generate(requests())

    assert pipeline.stages[0].dtype == torch.bfloat16
    assert all(len(completion.tokens) <= NUM_NEW for completion in done.values())
