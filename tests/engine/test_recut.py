"""A slice that is cut anew shares what it keeps, reads what it lacks, and computes the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from adapters import save_adapter
from tiny_models import ARCHITECTURES

from actors.engine.adapter import Adapter
from actors.engine.batch import Draw, Rows, StepBatch, StepResult
from actors.engine.checkpoint import Checkpoint
from actors.engine.config import EngineConfig
from actors.engine.slice import StageSlice

pytestmark = pytest.mark.engine

NUM_LAYERS = 6
BLOCKS = [2, 0, 5]
PROMPT = [5, 17, 9, 101, 44, 3, 78]


def open_slice(path: Path, first: int, end: int) -> StageSlice:
    config = EngineConfig(kv_block_tokens=4)
    checkpoint = Checkpoint.open(str(path))
    return StageSlice(checkpoint, first, end, config=config, num_kv_blocks=8, num_lanes=2)


def step(tokens: Sequence[int], start: int, *, adapter_version: int = 0) -> StepBatch:
    end = start + len(tokens)
    rows = [Rows(start, len(tokens), BLOCKS[: -(-end // 4)])]
    return StepBatch(
        1, start, 0, list(tokens), rows, drawn=[0], draws=[Draw(0, end)],
        adapter_version=adapter_version,
    )  # fmt: skip


def run(stages: Sequence[StageSlice], batch: StepBatch) -> int:
    hidden: torch.Tensor | StepResult | None = None
    for stage in stages:
        assert not isinstance(hidden, StepResult)
        hidden = stage.forward(batch, hidden)
    assert isinstance(hidden, StepResult)
    return hidden.tokens[0]


def generate(
    stages: Sequence[StageSlice], tokens: list[int], start: int, count: int, version: int = 0
) -> list[int]:
    """Run `tokens` from position `start` on, then draw greedily; returns what was drawn."""
    drawn: list[int] = []
    for _ in range(count):
        drawn.append(run(stages, step(tokens, start, adapter_version=version)))
        start, tokens = start + len(tokens), drawn[-1:]
    return drawn


def move_kv(old: Sequence[StageSlice], new: Sequence[StageSlice]) -> None:
    """Bring every layer's KV from the slice that had it to the one that has it now."""
    for source in old:
        for target in new:
            first = max(source.first_layer, target.first_layer)
            layers = range(first, min(source.end_layer, target.end_layer))
            if layers and source.kv[1] is not target.kv[1]:
                target.kv[1].put(layers, BLOCKS, source.kv[1].take(layers, BLOCKS))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_tokens_do_not_change_when_layers_move_in_mid_sequence(
    model_type: str, checkpoint_dir: Callable[..., Path]
) -> None:
    path = checkpoint_dir(model_type)
    expected = generate([open_slice(path, 0, NUM_LAYERS)], PROMPT, 0, 5)

    old = [open_slice(path, a, b) for a, b in pairwise((0, 2, 5, NUM_LAYERS))]
    drawn = generate(old, PROMPT, 0, 2)
    new = [
        stage.recut(a, b)
        for stage, (a, b) in zip(old, pairwise((0, 4, 5, NUM_LAYERS)), strict=True)
    ]
    move_kv(old, new)
    drawn += generate(new, drawn[-1:], len(PROMPT) + 1, 1)
    # Two merge into one, and one splits in two.
    merged = [new[0].recut(0, 5), open_slice(path, 5, NUM_LAYERS)]
    move_kv(new, merged)
    drawn += generate(merged, drawn[-1:], len(PROMPT) + 2, 1)
    split = [open_slice(path, 0, 3), merged[0].recut(3, 5), merged[1]]
    move_kv(merged, split)
    drawn += generate(split, drawn[-1:], len(PROMPT) + 3, 1)

    assert drawn == expected


def test_a_recut_reads_what_it_lacks_and_keeps_the_rest(
    checkpoint_dir: Callable[..., Path],
) -> None:
    path = checkpoint_dir("qwen3")
    stage = open_slice(path, 2, 5)
    wider = stage.recut(1, 5)

    assert wider.bytes_read == open_slice(path, 1, 2).bytes_read
    assert wider.layers[1:] == stage.layers
    assert stage.recut(2, 5).bytes_read == 0
    whole = stage.recut(0, NUM_LAYERS)
    assert whole.bytes_read + stage.bytes_read == open_slice(path, 0, NUM_LAYERS).bytes_read


def test_what_no_slice_has_any_more_is_freed(checkpoint_dir: Callable[..., Path]) -> None:
    stage = open_slice(checkpoint_dir("qwen3"), 0, 4)
    gone, kept = stage.layers[3].self_attn.q_proj.weight, stage.layers[0].self_attn.q_proj.weight
    cache = weakref.ref(stage.kv[0])
    narrower = stage.recut(0, 2)
    narrower.settle([stage])
    assert gone.numel() == 0
    assert kept.numel() > 0
    assert cache() is None


def test_an_adapter_in_use_comes_along_to_layers_that_are_new(
    checkpoint_dir: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoint_dir("qwen3")
    adapter = Adapter.read(save_adapter(path, tmp_path / "adapter"))
    whole = open_slice(path, 0, NUM_LAYERS)
    whole.adapters.load(1, adapter, keep=0)
    expected = generate([whole], PROMPT, 0, 3, version=1)

    old = [open_slice(path, 0, 3), open_slice(path, 3, NUM_LAYERS)]
    for stage in old:
        stage.adapters.load(1, adapter, keep=0)
    drawn = generate(old, PROMPT, 0, 1, version=1)
    new = [old[0].recut(0, 5), old[1].recut(5, NUM_LAYERS)]
    move_kv(old, new)
    drawn += generate(new, drawn[-1:], len(PROMPT), 1, version=1)
    for before, stage in zip(old, new, strict=True):
        stage.settle([before])
    drawn += generate(new, drawn[-1:], len(PROMPT) + 1, 1, version=1)
    assert drawn == expected
    assert generate([whole], PROMPT, 0, 3) == generate(new, PROMPT, 0, 3)


def test_kv_of_another_shape_is_refused(checkpoint_dir: Callable[..., Path]) -> None:
    stage = open_slice(checkpoint_dir("qwen3"), 0, 2)
    values = stage.kv[0].take([0, 1], [1, 2, 3])
    with pytest.raises(ValueError, match=r"layers \[0\] and 3 blocks take"):
        stage.kv[0].put([0], [1, 2, 3], values)
    with pytest.raises(ValueError, match="float64"):
        stage.kv[0].put([0, 1], [1, 2, 3], values.double())
