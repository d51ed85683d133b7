"""Tokens are transformers' own: every architecture, cut, batch and scheduling condition.

Identical means token for token, except where the reference's two best logits lie within 1e-4;
such places are counted and must be rare.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from identity import Expected, check_identical, generate
from tiny_models import ARCHITECTURES, MOE

from actors.engine.batch import Rows, StepBatch
from actors.engine.checkpoint import Checkpoint
from actors.engine.config import EngineConfig
from actors.engine.local import LocalPipeline
from actors.engine.requests import Request, SamplingParams

pytestmark = pytest.mark.engine

CUTS = {1: (), 2: (4,), 3: (1, 4), 4: (3, 4, 5)}
NUM_NEW = 16
# A prompt longer than every sliding window, one of a single token, and shared beginnings.
LENGTHS = (1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 24, 31, 33, 40, 48, 60)


def prompts(seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    shared = [rng.randrange(3, 199) for _ in range(60)]
    out = []
    for i, length in enumerate(LENGTHS):
        own = [rng.randrange(3, 199) for _ in range(length)]
        out.append(tuple(shared[:length] if i % 3 == 0 else own))
    return out


@pytest.fixture(scope="module")
def expected(
    checkpoint_dir: Callable[..., Path], reference: Callable[[Path], Any]
) -> Callable[[str], list[Expected]]:
    made: dict[str, list[Expected]] = {}

    def make(model_type: str) -> list[Expected]:
        if model_type not in made:
            model = reference(checkpoint_dir(model_type))
            made[model_type] = [generate(model, prompt, NUM_NEW) for prompt in prompts()]
        return made[model_type]

    return make


def greedy_requests() -> list[Request]:
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_NEW)
    return [Request(id=str(i), prompt=p, sampling=sampling) for i, p in enumerate(prompts())]


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("num_stages", CUTS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_batch_of_16_with_chunks_and_preemption(
    model_type: str,
    num_stages: int,
    prefix_cache: bool,
    checkpoint_dir: Callable[..., Path],
    expected: Callable[[str], list[Expected]],
) -> None:
    tight = EngineConfig(
        kv_block_tokens=4,
        num_kv_blocks=40,
        max_running=16,
        max_step_tokens=20,
        prefix_cache=prefix_cache,
    )
    checkpoint = Checkpoint.open(str(checkpoint_dir(model_type)))
    pipeline = LocalPipeline(checkpoint, CUTS[num_stages], config=tight)

    done = pipeline.generate(greedy_requests())

    check_identical(expected(model_type), [done[str(i), 0].tokens for i in range(len(LENGTHS))])
    assert pipeline.scheduler.num_preemptions > 0
    assert (pipeline.scheduler.prefix_hit_tokens > 0) is prefix_cache
    assert pipeline.scheduler.pool.blocks_in_use == 0


@pytest.mark.parametrize("num_stages", CUTS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_one_at_a_time_without_prefix_cache(
    model_type: str,
    num_stages: int,
    checkpoint_dir: Callable[..., Path],
    expected: Callable[[str], list[Expected]],
) -> None:
    roomy = EngineConfig(kv_block_tokens=16, num_kv_blocks=32, prefix_cache=False)
    checkpoint = Checkpoint.open(str(checkpoint_dir(model_type)))
    pipeline = LocalPipeline(checkpoint, CUTS[num_stages], config=roomy)

    got = [pipeline.generate([request])[request.id, 0].tokens for request in greedy_requests()]

    check_identical(expected(model_type), got)
    assert pipeline.scheduler.prefix_hit_tokens == 0


@pytest.mark.parametrize("model_type", MOE)
def test_fused_expert_layout_gives_the_same_tokens(
    model_type: str,
    checkpoint_dir: Callable[..., Path],
    expected: Callable[[str], list[Expected]],
) -> None:
    path = checkpoint_dir(model_type, fused=True)
    assert len(list(path.glob("*.safetensors"))) > 1
    pipeline = LocalPipeline(Checkpoint.open(str(path)), (1, 4))

    done = pipeline.generate(greedy_requests())

    check_identical(expected(model_type), [done[str(i), 0].tokens for i in range(len(LENGTHS))])


@pytest.mark.parametrize("num_stages", CUTS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_logits_are_within_1e_4(
    model_type: str,
    num_stages: int,
    checkpoint_dir: Callable[..., Path],
    reference: Callable[[Path], Any],
) -> None:
    path = checkpoint_dir(model_type)
    tokens = list(prompts()[-1])
    with torch.inference_mode():
        wanted = reference(path)(torch.tensor([tokens])).logits[0]
    pipeline = LocalPipeline(Checkpoint.open(str(path)), CUTS[num_stages])

    got = []
    for step, (start, end) in enumerate(((0, 37), (37, 38), (38, 60))):
        blocks = list(range(-(-end // 16)))
        batch = StepBatch(0, step, 0, tokens[start:end], [Rows(start, end - start, blocks)])
        hidden: torch.Tensor | None = None
        for stage in pipeline.stages:
            hidden = stage.run_layers(batch, hidden)
        assert hidden is not None
        got.append(pipeline.stages[-1].logits(hidden))

    assert (torch.cat(got) - wanted).abs().max() < 1e-4


def sampled_requests() -> list[Request]:
    base = {"max_tokens": 12, "ignore_eos": True}
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 11},
        {"temperature": 0.7, "top_k": 20, "seed": 12},
        {"temperature": 1.3, "top_p": 0.8, "seed": 13},
        {"temperature": 0.9, "min_p": 0.05, "seed": 14},
        {"temperature": 1.0, "repetition_penalty": 1.3, "seed": 15},
        {"temperature": 1.0, "presence_penalty": 0.7, "frequency_penalty": 0.4, "seed": 16},
    ]
    all_prompts = prompts(3)
    return [
        Request(
            id=f"s{i}",
            prompt=all_prompts[i + 6],
            sampling=SamplingParams(**(base | kind)),
            n=2,
        )
        for i, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("model_type", ["qwen3", "gpt_oss"])
def test_seeded_sampling_is_the_same_whatever_the_batch_and_the_stages(
    model_type: str, checkpoint_dir: Callable[..., Path]
) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir(model_type)))
    tight = EngineConfig(kv_block_tokens=4, num_kv_blocks=24, max_running=8, max_step_tokens=9)
    outcomes = []
    for cuts, config in (((), EngineConfig()), ((1, 4), EngineConfig()), ((3, 4, 5), tight)):
        done = LocalPipeline(checkpoint, cuts, config=config).generate(sampled_requests())
        outcomes.append({key: completion.tokens for key, completion in done.items()})
    alone = LocalPipeline(checkpoint, (2,))
    singles = {}
    for request in sampled_requests():
        singles.update({k: c.tokens for k, c in alone.generate([request]).items()})

    assert outcomes[0] == outcomes[1] == outcomes[2] == singles
    names = {name for name, _ in singles}
    assert any(singles[name, 0] != singles[name, 1] for name in names)
