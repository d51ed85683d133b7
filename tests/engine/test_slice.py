"""A slice holds its layers and no others, refuses what does not fit, and keeps lanes apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES
from transformers import AutoConfig, AutoModelForCausalLM

from actors.engine.attention import ATTENTION_NAME
from actors.engine.batch import Draw, Rows, StepBatch, StepResult
from actors.engine.checkpoint import Checkpoint, UnsupportedArchitectureError
from actors.engine.config import EngineConfig
from actors.engine.skeleton import check_structure
from actors.engine.slice import StageSlice, resolve_dtype

pytestmark = pytest.mark.engine

NUM_LAYERS = 6
PROMPT = (5, 17, 9, 101, 44, 3, 78, 150, 23, 9)


def open_slice(
    path: Path, first: int = 0, end: int = NUM_LAYERS, *, dtype: Any = "auto", **how: Any
) -> StageSlice:
    config = EngineConfig(kv_block_tokens=4, dtype=dtype)
    return StageSlice(Checkpoint.open(str(path)), first, end, config=config, num_kv_blocks=8, **how)


def step(
    tokens: Sequence[int] = PROMPT,
    start: int = 0,
    *,
    blocks: Sequence[int] = (0, 1, 2),
    lane: int = 0,
    logprobs: int = -1,
) -> StepBatch:
    """One greedy step of one sequence."""
    end = start + len(tokens)
    return StepBatch(
        lane, 0, 0, list(tokens), [Rows(start, len(tokens), list(blocks[: -(-end // 4)]))],
        drawn=[0], draws=[Draw(0, end, logprobs=logprobs)],
    )  # fmt: skip


def result(stage: StageSlice, batch: StepBatch, hidden: torch.Tensor | None = None) -> StepResult:
    out = stage.forward(batch, hidden)
    assert isinstance(out, StepResult)
    return out


@pytest.fixture(scope="module")
def qwen3(checkpoint_dir: Callable[..., Path]) -> Path:
    return checkpoint_dir("qwen3")


# --- what a slice is --------------------------------------------------------------------------


def test_auto_is_float32_on_a_cpu_and_bfloat16_on_cuda() -> None:
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16


@pytest.mark.parametrize(("first", "end"), [(-1, 2), (2, 2), (3, 2), (0, 7), (6, 7)])
def test_layers_that_the_checkpoint_does_not_have_are_refused(
    first: int, end: int, qwen3: Path
) -> None:
    with pytest.raises(ValueError, match=rf"\[{first}, {end}\) are not within .*\[0, 6\)"):
        open_slice(qwen3, first, end)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_slices_hold_the_models_parameters_and_no_others(
    model_type: str, checkpoint_dir: Callable[..., Path], reference: Callable[[Path], Any]
) -> None:
    path = checkpoint_dir(model_type)
    model = reference(path)
    stages = [open_slice(path, 0, 2), open_slice(path, 2, 5), open_slice(path, 5, 6)]

    def weight_bytes(module: torch.nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters())

    layers = [weight_bytes(layer) for layer in model.model.layers]
    embedding = weight_bytes(model.model.embed_tokens)
    end = weight_bytes(model.model.norm) + weight_bytes(model.lm_head)
    assert [stage.weight_bytes for stage in stages] == [
        embedding + sum(layers[0:2]), sum(layers[2:5]), layers[5] + end
    ]  # fmt: skip
    assert not any(p.is_meta for stage in stages for m in stage.layers for p in m.parameters())
    assert [(s.is_first, s.is_last) for s in stages] == [
        (True, False), (False, False), (False, True)
    ]  # fmt: skip
    assert stages[1].embedding is stages[1].norm is stages[1].head is None


def test_parameters_are_frozen_and_of_the_asked_type(qwen3: Path) -> None:
    stage = open_slice(qwen3, 0, 1, dtype="bfloat16")

    parameters = list(stage.layers[0].parameters())
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    assert not any(p.requires_grad for p in parameters)
    assert stage.weight_bytes * 2 == open_slice(qwen3, 0, 1).weight_bytes
    assert stage.kv[0].num_bytes * 2 == open_slice(qwen3, 0, 1).kv[0].num_bytes


def test_progress_rises_to_one(qwen3: Path) -> None:
    shares: list[float] = []

    open_slice(qwen3, 2, 4, on_progress=shares.append)

    assert shares == sorted(set(shares))
    assert shares[0] > 0
    assert shares[-1] == 1.0


def test_every_lane_has_its_own_kv_of_the_slices_layers(qwen3: Path) -> None:
    stage = open_slice(qwen3, 2, 4, num_lanes=3)

    assert len(stage.kv) == 3
    # 2 layers, 8 blocks of 4 tokens, a key and a value, 2 heads of 16 numbers of 4 bytes.
    assert [kv.num_bytes for kv in stage.kv] == [2 * 8 * 4 * 2 * 2 * 16 * 4] * 3


# --- a step -----------------------------------------------------------------------------------


def test_lanes_with_the_same_blocks_do_not_see_each_other(qwen3: Path) -> None:
    stage = open_slice(qwen3, num_lanes=2)
    alone = open_slice(qwen3)
    first = result(alone, step())
    second = result(alone, step(first.tokens, len(PROMPT)))

    result(stage, step(lane=0))
    result(stage, step(PROMPT[::-1], lane=1))

    assert result(stage, step(first.tokens, len(PROMPT), lane=0)) == second


def test_a_step_copies_blocks_before_it_writes(qwen3: Path) -> None:
    stage = open_slice(qwen3)
    drawn = result(stage, step()).tokens
    wanted = result(stage, step(drawn, len(PROMPT), logprobs=3))

    forked = step(drawn, len(PROMPT), blocks=(0, 1, 7), logprobs=3)
    forked.copies.append((2, 7))
    got = result(stage, forked)

    assert got.tokens == wanted.tokens
    assert got.logprobs == wanted.logprobs


def test_rows_that_draw_nothing_give_an_empty_result(qwen3: Path) -> None:
    batch = StepBatch(0, 0, 0, list(PROMPT), [Rows(0, len(PROMPT), [0, 1, 2])])

    assert result(open_slice(qwen3), batch) == StepResult([], [], [])


def test_only_draws_that_want_logprobs_get_them(qwen3: Path) -> None:
    batch = StepBatch(
        0, 0, 0, [5, 6, 7], [Rows(0, 1, [i]) for i in range(3)],
        drawn=[0, 1, 2], draws=[Draw(0, 1), Draw(0, 1, logprobs=2), Draw(0, 1, logprobs=0)],
    )  # fmt: skip

    out = result(open_slice(qwen3), batch)

    assert out.logprobs[0] is None
    assert out.logprobs[1] is not None
    assert len(out.logprobs[1].top) == 2
    assert out.logprobs[1].top[0] == (out.tokens[1], out.logprobs[1].logprob)
    assert out.logprobs[2] is not None
    assert out.logprobs[2].top == ()


def test_a_stage_that_is_not_the_last_returns_rows_and_one_that_is_not_the_first_needs_them(
    qwen3: Path,
) -> None:
    first, last = open_slice(qwen3, 0, 4), open_slice(qwen3, 4, 6)

    hidden = first.forward(step())

    assert isinstance(hidden, torch.Tensor)
    assert hidden.shape == (len(PROMPT), 48)
    assert result(last, step(), hidden) == result(open_slice(qwen3), step())
    with pytest.raises(ValueError, match="step 0: None hidden rows for 10 tokens"):
        last.forward(step())
    with pytest.raises(ValueError, match="step 0: 9 hidden rows for 10 tokens"):
        last.forward(step(), hidden[:9])


def test_received_rows_are_not_written_and_are_converted(qwen3: Path) -> None:
    first, last = open_slice(qwen3, 0, 4), open_slice(qwen3, 4, 6)
    hidden = first.forward(step())
    assert isinstance(hidden, torch.Tensor)
    sent = hidden.clone()

    result(last, step(), sent)
    result(last, step(), sent.bfloat16())

    assert torch.equal(sent, hidden)


def test_a_refused_step_leaves_the_slice_serving(qwen3: Path) -> None:
    stage = open_slice(qwen3)
    wanted = result(stage, step())

    for bad in (
        step([10_000, 5]),
        step(blocks=(0, 1, 99)),
        StepBatch(3, 0, 0, [5], [Rows(0, 1, [0])], drawn=[0], draws=[Draw(0, 1)]),
    ):
        with pytest.raises((ValueError, IndexError)):
            stage.forward(bad)

    assert result(stage, step()) == wanted


def test_a_model_that_overflows_is_refused_and_does_not_spoil_the_next_step(qwen3: Path) -> None:
    stage = open_slice(qwen3)
    wanted = result(stage, step())
    assert stage.embedding is not None
    sound = stage.embedding.weight[5].clone()
    stage.embedding.weight[5] = torch.nan

    with pytest.raises(ValueError, match=r"logits of 1 of 1 rows.*engine\.dtype"):
        stage.forward(step([5, 5, 5, 5, 5]))

    stage.embedding.weight[5] = sound
    first = result(stage, step([9, 9]))
    assert result(stage, step(first.tokens, 2)).tokens  # reads the spoilt end of block 0
    assert result(stage, step()) == wanted


# --- which models plug in ---------------------------------------------------------------------


def meta_model(model_type: str, **config: Any) -> Any:
    made = AutoConfig.for_model(model_type, **config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(made)


class WithoutInterface(torch.nn.Module):
    """Has the parts of a decoder and its own attention."""

    _supports_attention_backend = False


class WithOwnExperts(torch.nn.Module):
    """Uses the attention interface, and experts that no interface reaches."""

    _supports_attention_backend = True

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        for part in ("embed_tokens", "norm", "rotary_emb"):
            setattr(self.model, part, torch.nn.Identity())
        layer = torch.nn.Module()
        layer.experts = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
        self.model.layers = torch.nn.ModuleList([layer])
        self.lm_head = torch.nn.Identity()

    def _can_set_experts_implementation(self) -> bool:
        return False


def test_a_model_without_the_attention_interface_is_refused() -> None:
    with pytest.raises(
        UnsupportedArchitectureError, match=r"WithoutInterface .*AttentionInterface"
    ):
        check_structure(WithoutInterface())


def test_experts_outside_the_experts_interface_are_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"WithOwnExperts .*ExpertsInterface"):
        check_structure(WithOwnExperts())


def test_a_decoder_of_another_shape_is_refused_by_its_missing_parts() -> None:
    model = meta_model("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=10)

    with pytest.raises(
        UnsupportedArchitectureError,
        match="GPT2LMHeadModel has no embed_tokens, layers, norm, rotary_emb",
    ):
        check_structure(model)


def test_a_model_without_a_language_head_is_refused() -> None:
    model = WithOwnExperts()
    del model.lm_head

    with pytest.raises(UnsupportedArchitectureError, match="WithOwnExperts has no lm_head"):
        check_structure(model)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_verified_architecture_plugs_in(
    model_type: str, reference: Callable[[Path], Any], checkpoint_dir: Callable[..., Path]
) -> None:
    check_structure(reference(checkpoint_dir(model_type)))


def test_the_slices_layers_use_motleys_attention(qwen3: Path) -> None:
    stage = open_slice(qwen3, 0, 1)

    assert stage.layers[0].self_attn.config._attn_implementation == ATTENTION_NAME
