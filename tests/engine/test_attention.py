"""Paged attention is plain attention over each sequence's own tokens, whatever lies around them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.engine.attention import KVCache, PagedRows, paged_attention
from actors.engine.batch import Rows

pytestmark = pytest.mark.engine

CPU = torch.device("cpu")
SIZE = 4
NUM_BLOCKS = 40
KV_HEADS = 2
HEAD_DIM = 8
LAYER = 5


def cache(**changes: Any) -> KVCache:
    base: dict[str, Any] = {
        "num_blocks": NUM_BLOCKS, "block_tokens": SIZE, "num_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "dtype": torch.float32, "device": CPU,
    }  # fmt: skip
    return KVCache(range(LAYER, LAYER + 2), **(base | changes))


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: int,
    window: int | None,
    scaling: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The textbook: one row at a time, one head at a time. query (T, Hq, D), key (L, Hk, D)."""
    out = torch.zeros_like(query)
    groups = query.shape[1] // key.shape[1]
    for row in range(query.shape[0]):
        end = start + row + 1
        first = max(0, end - window) if window else 0
        for head in range(query.shape[1]):
            keys, values = key[first:end, head // groups], value[first:end, head // groups]
            scores = keys @ query[row, head] * scaling
            if sinks is not None:
                scores = torch.cat((scores, sinks[head : head + 1]))
            out[row, head] = scores.softmax(0)[: end - first] @ values
    return out


class World:
    """Sequences with a past, in scattered blocks full of other people's values."""

    def __init__(self, shapes: Sequence[tuple[int, int]], *, groups: int = 2, seed: int = 0):
        torch.manual_seed(seed)
        self.groups = groups
        self.cache = cache()
        self._write_all(torch.randn(NUM_BLOCKS * SIZE, 2, KV_HEADS, HEAD_DIM) * 9)
        free = random.Random(seed).sample(range(NUM_BLOCKS), NUM_BLOCKS)
        self.rows = []
        self.keys, self.values = [], []
        for start, length in shapes:
            end = start + length
            blocks = [free.pop() for _ in range(-(-end // SIZE))]
            self.rows.append(Rows(start, length, blocks))
            self.keys.append(torch.randn(end, KV_HEADS, HEAD_DIM))
            self.values.append(torch.randn(end, KV_HEADS, HEAD_DIM))
            past = [blocks[p // SIZE] * SIZE + p % SIZE for p in range(start)]
            self.write(past, self.keys[-1][:start], self.values[-1][:start])
        self.query = torch.randn(sum(r.length for r in self.rows), KV_HEADS * groups, HEAD_DIM)

    def write(self, slots: list[int], key: torch.Tensor, value: torch.Tensor) -> None:
        for layer in (LAYER, LAYER + 1):
            self.cache.write(
                layer,
                torch.tensor(slots, dtype=torch.long),
                key.transpose(0, 1)[None],
                value.transpose(0, 1)[None],
            )

    def paged(self) -> PagedRows:
        return PagedRows.build(self.rows, self.cache, CPU)

    def attend(self, paged: PagedRows | None = None, layer: int = LAYER, **how: Any) -> Any:
        """Run the step's rows, (T, Hq, D)."""
        new = [(r.start, r.start + r.length) for r in self.rows]
        key = torch.cat([k[a:b] for k, (a, b) in zip(self.keys, new, strict=True)])
        value = torch.cat([v[a:b] for v, (a, b) in zip(self.values, new, strict=True)])
        out, weights = paged_attention(
            SimpleNamespace(layer_idx=layer),  # type: ignore[arg-type]
            self.query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            None,
            paged=paged or self.paged(),
            **how,
        )
        assert weights is None
        return out[0]

    def expected(
        self,
        *,
        sliding_window: int | None = None,
        scaling: float | None = None,
        s_aux: torch.Tensor | None = None,
    ) -> torch.Tensor:
        parts, row = [], 0
        for entry, key, value in zip(self.rows, self.keys, self.values, strict=True):
            query = self.query[row : row + entry.length]
            parts.append(
                plain_attention(
                    query, key, value, entry.start, sliding_window,
                    scaling or 1 / math.sqrt(HEAD_DIM), s_aux,
                )
            )  # fmt: skip
            row += entry.length
        return torch.cat(parts)

    def _write_all(self, kv: torch.Tensor) -> None:
        self.write(list(range(len(kv))), kv[:, 0], kv[:, 1])


DECODES = ((0, 1), (1, 1), (3, 1), (4, 1), (16, 1), (22, 1))
CHUNKS = ((0, 2), (0, 9), (5, 3), (8, 4))
STEPS = {
    "decodes": DECODES,
    "chunks": CHUNKS,
    "one decode": DECODES[4:5],
    "one chunk": CHUNKS[1:2],
    "mixed": (*DECODES[:3], CHUNKS[1], DECODES[4], CHUNKS[2], DECODES[5]),
}
HOW: dict[str, dict[str, Any]] = {
    "full": {},
    "scaled": {"scaling": 0.5},
    "window 1": {"sliding_window": 1},
    "window 3": {"sliding_window": 3},
    "window 8": {"sliding_window": 8},
    "wider than all": {"sliding_window": 1000},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("shapes", STEPS.values(), ids=STEPS)
def test_every_row_attends_to_its_own_sequence(
    shapes: Sequence[tuple[int, int]], groups: int, how: dict[str, Any]
) -> None:
    world = World(shapes, groups=groups)

    torch.testing.assert_close(world.attend(**how), world.expected(**how), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("shapes", STEPS.values(), ids=STEPS)
def test_a_sink_takes_its_share_and_carries_nothing(
    shapes: Sequence[tuple[int, int]], groups: int, window: int | None
) -> None:
    world = World(shapes, groups=groups)
    sinks = torch.randn(KV_HEADS * groups) * 3

    out = world.attend(sliding_window=window, s_aux=sinks)

    expected = world.expected(sliding_window=window, s_aux=sinks)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_layers_of_one_step_may_differ_in_window_and_do_not_share_tensors() -> None:
    world = World(STEPS["mixed"])
    paged = world.paged()

    for window in (None, 3, None, 8):
        for layer in (LAYER, LAYER + 1):
            out = world.attend(paged, layer, sliding_window=window)
            expected = world.expected(sliding_window=window)
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_a_row_does_not_depend_on_who_else_is_in_the_step() -> None:
    world = World(DECODES)
    together = world.attend()

    rows, query = world.rows, world.query
    keys, values = world.keys, world.values
    for i in range(len(rows)):
        world.rows, world.query = rows[i : i + 1], query[i : i + 1]
        world.keys, world.values = keys[i : i + 1], values[i : i + 1]
        torch.testing.assert_close(world.attend()[0], together[i], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shapes", STEPS.values(), ids=STEPS)
def test_a_sequence_whose_values_are_no_numbers_spoils_no_other(
    shapes: Sequence[tuple[int, int]], bad: float
) -> None:
    world = World(shapes)
    owned = {b * SIZE + i for r in world.rows for b in r.blocks for i in range(SIZE)}
    taken = {
        r.blocks[p // SIZE] * SIZE + p % SIZE for r in world.rows for p in range(r.start + r.length)
    }
    # Stale slots at the end of their own blocks, and every slot of all the others (block 0 pads).
    foreign = sorted(set(range(NUM_BLOCKS * SIZE)) - taken)
    assert set(foreign) & owned
    poison = torch.full((len(foreign), KV_HEADS, HEAD_DIM), bad)
    world.write(foreign, poison, poison)

    hows: tuple[dict[str, Any], ...] = ({}, {"sliding_window": 3})
    for how in hows:
        torch.testing.assert_close(world.attend(**how), world.expected(**how), atol=1e-5, rtol=1e-5)


# --- the cache --------------------------------------------------------------------------------


def contents(kv: KVCache, block: int, layer: int = LAYER) -> float:
    return float(kv.read(layer, torch.tensor([[block]]))[0][0, 0, 0, 0])


def test_blocks_are_copied_all_at_once_in_every_layer() -> None:
    kv = cache(num_blocks=3)
    for layer in (LAYER, LAYER + 1):
        for block in range(3):
            value = torch.full((1, KV_HEADS, 1, HEAD_DIM), float(block + 1))
            kv.write(layer, torch.tensor([block * SIZE]), value, value)

    kv.copy_blocks([(0, 1), (1, 2)])

    for layer in (LAYER, LAYER + 1):
        assert [contents(kv, block, layer) for block in range(3)] == [1.0, 1.0, 2.0]
    kv.copy_blocks([])
    assert contents(kv, 2) == 2.0


def test_what_is_written_is_read_back_in_the_order_of_the_table() -> None:
    kv = cache()
    key = torch.randn(1, KV_HEADS, 6, HEAD_DIM)
    value = torch.randn(1, KV_HEADS, 6, HEAD_DIM)
    kv.write(LAYER, torch.tensor([9 * SIZE + i for i in range(4)] + [2 * SIZE, 2 * SIZE + 1]),
             key, value)  # fmt: skip

    got_key, got_value = kv.read(LAYER, torch.tensor([[9, 2]]))

    assert torch.equal(got_key[:, :, :6], key)
    assert torch.equal(got_value[:, :, :6], value)


def test_bytes_are_those_of_keys_and_values_of_every_layer() -> None:
    assert cache(dtype=torch.bfloat16).num_bytes == 2 * NUM_BLOCKS * SIZE * 2 * KV_HEADS * 8 * 2
    assert cache().num_bytes == 2 * cache(dtype=torch.bfloat16).num_bytes
