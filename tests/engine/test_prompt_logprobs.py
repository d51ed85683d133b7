"""A scored prompt (echo) has the log-probabilities of one full forward pass of transformers.

Through a whole lane: requests in, wire-encoded steps over two stages, outputs out.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from actors.engine.batch import StepBatch, StepResult
from actors.engine.batching import LaneLimits
from actors.engine.checkpoint import Checkpoint
from actors.engine.config import EngineConfig
from actors.engine.lane import LaneCore
from actors.engine.requests import Request, RequestOutput, SamplingParams, TokenLogprob
from actors.engine.slice import StageSlice

pytestmark = pytest.mark.engine

TOLERANCE = 1e-4


def tokenizer() -> Tokenizer:
    """One token a byte: enough text for any id of the tiny models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.decoder = decoders.ByteLevel()
    return made


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(3, 199) for _ in range(length))


def ask(id_: str, tokens: tuple[int, ...], n: int = 1, **how: Any) -> Request:
    base: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}
    return Request(id=id_, prompt=tokens, sampling=SamplingParams(**(base | how)), n=n)


class Lane:
    """A lane and two stages in this process; what crosses a wire is encoded."""

    def __init__(self, path: Path, **limits: Any) -> None:
        base: dict[str, Any] = {
            "num_blocks": 64, "block_tokens": 4, "max_running": 8, "max_step_tokens": 64,
            "max_model_tokens": 128,
        }  # fmt: skip
        self.limits = LaneLimits(**(base | limits))
        self.core = LaneCore(self.limits, tokenizer())
        checkpoint = Checkpoint.open(str(path))
        config = EngineConfig(kv_block_tokens=self.limits.block_tokens)
        self.stages = [
            StageSlice(checkpoint, a, b, config=config, num_kv_blocks=self.limits.num_blocks)
            for a, b in ((0, 2), (2, 6))
        ]

    def run(self, *requests: Request) -> list[RequestOutput]:
        outputs = [out for asked in requests for out in self.core.add(asked, 0.0)]
        while (step := self.core.next_step(0.0)) is not None:
            batch = StepBatch.decode(step.batch.encode())
            hidden = self.stages[0].forward(batch)
            assert isinstance(hidden, torch.Tensor)
            result = self.stages[1].forward(batch, hidden)
            assert isinstance(result, StepResult)
            answer = StepResult.from_wire(msgpack.unpackb(msgpack.packb(result.to_wire())))
            self.core.accept_result(batch.step, answer, now_s=0.0, stage_s=0.0)
            outputs += self.core.render()
        assert self.core.counters().blocks_in_use == 0
        return outputs


def scores(outputs: list[RequestOutput], id_: str) -> tuple[TokenLogprob, ...]:
    """The one scored prompt of a request, on choice 0's first output."""
    mine = [out for out in outputs if out.id == id_]
    [scored] = [out for out in mine if out.prompt_logprobs is not None]
    assert scored is next(out for out in mine if out.index == 0)
    assert scored.prompt_logprobs is not None
    return scored.prompt_logprobs


def check(model: Any, tokens: tuple[int, ...], got: tuple[TokenLogprob, ...], k: int) -> None:
    with torch.inference_mode():
        wanted = model(torch.tensor([list(tokens)])).logits[0].log_softmax(-1)
    assert [entry.token_id for entry in got] == list(tokens)
    assert (got[0].logprob, got[0].top) == (None, ())
    for i, entry in enumerate(got[1:]):
        assert entry.logprob == pytest.approx(wanted[i, tokens[i + 1]].item(), abs=TOLERANCE)
        best = wanted[i].topk(k) if k else None
        values = [] if best is None else best.values.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values, abs=TOLERANCE)
        for token, value in entry.top:
            assert wanted[i, token].item() == pytest.approx(value, abs=TOLERANCE)


@pytest.mark.parametrize("k", [0, 1, 20])
@pytest.mark.parametrize("model_type", ["qwen3", "gpt_oss"])
def test_scores_are_those_of_one_full_forward_pass(
    model_type: str, k: int, checkpoint_dir: Callable[..., Path], reference: Callable[[Path], Any]
) -> None:
    path, tokens = checkpoint_dir(model_type), prompt(33)

    outputs = Lane(path).run(ask("r", tokens, prompt_logprobs=k))

    check(reference(path), tokens, scores(outputs, "r"), k)


@pytest.mark.parametrize("max_step_tokens", [2, 5, 8, 16, 32, 33])
def test_scores_do_not_depend_on_the_chunks_of_the_prompt(
    max_step_tokens: int,
    checkpoint_dir: Callable[..., Path],
    reference: Callable[[Path], Any],
) -> None:
    path, tokens = checkpoint_dir("llama"), prompt(33)
    lane = Lane(path, max_step_tokens=max_step_tokens, max_running=2)

    outputs = lane.run(ask("r", tokens, prompt_logprobs=2))

    check(reference(path), tokens, scores(outputs, "r"), 2)


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_choices_are_scored_once_and_continue(
    max_tokens: int, checkpoint_dir: Callable[..., Path], reference: Callable[[Path], Any]
) -> None:
    path, tokens = checkpoint_dir("llama"), prompt(17)
    lane = Lane(path, max_step_tokens=10)

    outputs = lane.run(ask("r", tokens, 2, prompt_logprobs=1, max_tokens=max_tokens))

    check(reference(path), tokens, scores(outputs, "r"), 1)
    for index in (0, 1):
        mine = [out for out in outputs if out.index == index]
        assert sum(len(out.tokens) for out in mine) == max_tokens
        assert mine[-1].finish_reason == "length"


def test_scores_survive_preemption_and_neighbours(
    checkpoint_dir: Callable[..., Path], reference: Callable[[Path], Any]
) -> None:
    path = checkpoint_dir("llama")
    tokens = [prompt(length, seed) for seed, length in enumerate((14, 18, 22, 9))]
    lane = Lane(path, num_blocks=13, max_step_tokens=9, max_running=4)

    outputs = lane.run(
        *(
            ask(str(i), tokens[i], 1 + i % 2, prompt_logprobs=3, max_tokens=14)
            for i in range(len(tokens))
        )
    )

    assert lane.core.counters().preemptions > 0
    for i, wanted in enumerate(tokens):
        check(reference(path), wanted, scores(outputs, str(i)), 3)


def test_a_prompt_that_the_cache_holds_is_scored_all_the_same(
    checkpoint_dir: Callable[..., Path], reference: Callable[[Path], Any]
) -> None:
    path, tokens = checkpoint_dir("llama"), prompt(16)
    lane = Lane(path)
    lane.run(ask("plain", tokens))

    outputs = lane.run(ask("scored", tokens, prompt_logprobs=0), ask("cached", tokens))

    check(reference(path), tokens, scores(outputs, "scored"), 0)
    cached = {out.id: out.cached_tokens for out in reversed(outputs)}
    assert cached == {"scored": 0, "cached": 15}


def test_a_prompt_of_one_token_has_one_entry_without_a_score(
    checkpoint_dir: Callable[..., Path],
) -> None:
    outputs = Lane(checkpoint_dir("llama")).run(ask("r", (7,), prompt_logprobs=5))

    assert scores(outputs, "r") == (TokenLogprob(7, None),)


def test_the_echo_of_the_reply_agrees_with_its_own_logprobs(
    checkpoint_dir: Callable[..., Path],
) -> None:
    lane, tokens = Lane(checkpoint_dir("qwen3")), prompt(12)
    reply = lane.run(ask("r", tokens, logprobs=0, max_tokens=8))
    drawn = [entry for out in reply for entry in out.logprobs]

    echoed = scores(
        lane.run(ask("e", tokens + tuple(e.token_id for e in drawn), prompt_logprobs=0)), "e"
    )

    for said, heard in zip(drawn, echoed[len(tokens) :], strict=True):
        assert said.token_id == heard.token_id
        assert said.logprob == pytest.approx(heard.logprob, abs=TOLERANCE)
