"""Which block holds which tokens: proved against a shadow cache that remembers every write."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from actors.engine.kv import BlockPool, BlockTable, Growth


def fill(pool: BlockPool, tokens: Sequence[int]) -> BlockTable:
    """Compute `tokens` from nothing and tell the cache."""
    table = BlockTable()
    assert pool.grow(table, 0, len(tokens)) is not None
    pool.register(table, tokens, len(tokens))
    return table


def cached_tokens(pool: BlockPool, tokens: Sequence[int]) -> int:
    """How many tokens the cache holds, asked with one more so that none is held back."""
    table, covered = pool.match([*tokens, 0])
    pool.free(table)
    return covered


def state(pool: BlockPool) -> dict[str, Any]:
    """Everything a pool knows, the order of eviction included."""
    known = copy.deepcopy(vars(pool))
    known["_free"] = list(known["_free"])
    return known


# --- what the cache finds ---------------------------------------------------------------------


def test_a_prefix_is_found_by_whole_blocks() -> None:
    pool = BlockPool(8, 4)
    pool.free(fill(pool, range(10)))

    table, covered = pool.match([*range(10), 99])

    assert covered == 8
    assert len(table.blocks) == 2


def test_the_last_token_always_runs_though_its_block_is_known() -> None:
    pool = BlockPool(8, 4)
    pool.free(fill(pool, range(8)))

    table, covered = pool.match(range(8))

    assert covered == 7
    assert len(table.blocks) == 2


def test_equal_tokens_behind_another_prefix_are_another_content() -> None:
    pool = BlockPool(8, 2)
    first = fill(pool, [1, 2, 3, 4])
    second = fill(pool, [9, 9, 3, 4])

    table, covered = pool.match([9, 9, 3, 4, 5])

    assert covered == 4
    assert table.blocks == second.blocks
    assert not set(table.blocks) & set(first.blocks)


def test_nothing_is_found_or_kept_without_a_prefix_cache() -> None:
    pool = BlockPool(4, 2, prefix_cache=False)
    pool.free(fill(pool, [1, 2, 3, 4]))

    assert pool.match([1, 2, 3, 4, 5]) == (BlockTable(), 0)
    assert pool.num_free == 4


def test_a_block_that_is_not_full_is_not_known() -> None:
    pool = BlockPool(4, 4)
    pool.free(fill(pool, [1, 2, 3]))

    assert cached_tokens(pool, [1, 2, 3]) == 0


def test_content_computed_twice_is_known_once_and_survives_either_ending_first() -> None:
    pool = BlockPool(4, 2)
    first, second = fill(pool, [1, 2]), fill(pool, [1, 2])
    pool.free(first)
    assert cached_tokens(pool, [1, 2]) == 2
    pool.free(second)
    assert cached_tokens(pool, [1, 2]) == 2
    pool.check([])


# --- copy on write ----------------------------------------------------------------------------


def test_rewriting_the_last_token_of_a_known_block_copies_it() -> None:
    pool = BlockPool(8, 4)
    pool.free(fill(pool, range(8)))
    table, covered = pool.match(range(8))
    known = table.blocks[1]

    growth = pool.grow(table, covered, 8)

    assert growth == Growth(((known, table.blocks[1]),))
    assert table.blocks[1] != known
    assert cached_tokens(pool, range(8)) == 8


def test_a_fork_copies_the_partial_block_and_shares_the_others() -> None:
    pool = BlockPool(8, 4)
    leader = fill(pool, range(6))

    table = pool.fork(leader, 6)
    growth = pool.grow(table, 5, 7)

    assert growth == Growth(((leader.blocks[1], table.blocks[1]),))
    assert table.blocks[0] == leader.blocks[0]
    pool.check([leader, table])


def test_the_last_owner_of_a_shared_block_writes_in_place() -> None:
    pool = BlockPool(8, 4)
    leader = fill(pool, range(6))
    table = pool.fork(leader, 6)
    pool.free(leader)

    growth = pool.grow(table, 6, 7)

    assert growth == Growth(())


def test_too_few_blocks_for_the_copies_alone_change_nothing() -> None:
    pool = BlockPool(2, 4)
    leader = fill(pool, range(6))
    table = pool.fork(leader, 6)
    before = state(pool), copy.deepcopy(table)

    assert pool.grow(table, 5, 6) is None

    assert (state(pool), table) == before


# --- other weights ----------------------------------------------------------------------------


def test_content_that_other_weights_made_is_forgotten_and_never_learnt_again() -> None:
    pool = BlockPool(8, 4)
    pool.free(fill(pool, range(8)))
    live = fill(pool, [9, 9, 9])  # its first block is not full yet

    pool.forget_contents([live])

    assert cached_tokens(pool, range(8)) == 0
    assert pool.grow(live, 3, 8) is not None
    pool.register(live, [9] * 8, 8)
    assert cached_tokens(pool, [9] * 8) == 0, "half of it is of the old weights"
    fork = pool.fork(live, 8)
    pool.register(fork, [9] * 8, 8)
    assert cached_tokens(pool, [9] * 8) == 0
    for table in (live, fork):
        pool.free(table)
        assert table == BlockTable(), "what it holds next is of the new weights"
    pool.free(fill(pool, [9] * 8))
    assert cached_tokens(pool, [9] * 8) == 8
    pool.check([])


# --- eviction ---------------------------------------------------------------------------------


def test_blocks_without_content_are_taken_before_any_content_is_evicted() -> None:
    pool = BlockPool(4, 2)
    pool.free(fill(pool, [1, 2]))
    pool.free(fill(pool, [7]))

    fill(pool, [5, 5, 6, 6, 7, 7])

    assert cached_tokens(pool, [1, 2]) == 2


def test_the_least_recently_used_content_is_evicted_first() -> None:
    pool = BlockPool(3, 2)
    for tokens in ([1, 1], [2, 2], [3, 3]):
        pool.free(fill(pool, tokens))
    assert cached_tokens(pool, [1, 1]) == 2  # a look is a use

    fill(pool, [9, 9])

    assert [cached_tokens(pool, [i, i]) for i in (1, 2, 3)] == [2, 0, 2]


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(3, 2)
    pool.free(fill(pool, [1, 1, 2, 2, 3, 3]))

    fill(pool, [9, 9])

    assert cached_tokens(pool, [1, 1, 2, 2, 3, 3]) == 4


def test_a_referenced_block_is_never_evicted() -> None:
    pool = BlockPool(3, 2)
    held = fill(pool, [1, 1])
    pool.free(fill(pool, [2, 2]))

    fill(pool, [8, 8, 9, 9])

    assert cached_tokens(pool, [1, 1]) == 2
    assert cached_tokens(pool, [2, 2]) == 0
    assert pool.grow(BlockTable(), 0, 1) is None
    assert held.blocks == [0]


def test_what_follows_an_evicted_content_is_not_taken_for_what_follows_its_equal() -> None:
    pool = BlockPool(4, 2)
    known, twin = fill(pool, [1, 1]), fill(pool, [1, 1])
    pool.free(known)
    pool.free(fill(pool, [7, 7, 8, 8, 9, 9]))  # evicts the known [1, 1]; its twin lives on
    assert pool.grow(twin, 2, 4) is not None
    pool.register(twin, [1, 1, 2, 2], 4)

    assert cached_tokens(pool, [1, 1, 2, 2]) == 0
    fill(pool, [1, 1])
    assert cached_tokens(pool, [1, 1, 2, 2]) == 2


@pytest.mark.parametrize(("num_blocks", "block_tokens"), [(0, 16), (8, 0), (-1, 16)])
def test_a_pool_of_nothing_is_refused_with_its_numbers(num_blocks: int, block_tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"num_blocks \({num_blocks}\).*\({block_tokens}\)"):
        BlockPool(num_blocks, block_tokens)


# --- any order of operations ------------------------------------------------------------------


@dataclass(eq=False)
class Written:
    """Tokens, and how many of them have been written through the table."""

    table: BlockTable
    tokens: list[int]
    num_written: int


TOKEN = st.integers(0, 1)
"""Two tokens, so that prefixes meet often."""


class PoolAgainstShadow(RuleBasedStateMachine):
    """Random operations; a shadow cache holds what was written where."""

    @initialize(
        num_blocks=st.integers(1, 9), block_tokens=st.integers(1, 4), prefix_cache=st.booleans()
    )
    def make(self, num_blocks: int, block_tokens: int, prefix_cache: bool) -> None:
        self.size = block_tokens
        self.pool = BlockPool(num_blocks, block_tokens, prefix_cache=prefix_cache)
        self.shadow: list[list[int | None]] = [[None] * block_tokens for _ in range(num_blocks)]
        self.sequences: list[Written] = []
        self.weights = 0
        self.made_by: list[list[int]] = [[-1] * block_tokens for _ in range(num_blocks)]

    @rule(tokens=st.lists(TOKEN, min_size=1, max_size=12))
    def match(self, tokens: list[int]) -> None:
        table, covered = self.pool.match(tokens)
        assert covered < len(tokens)
        assert self.read(table, covered) == tokens[:covered]
        positions = [(table.blocks[p // self.size], p % self.size) for p in range(covered)]
        assert all(self.made_by[block][offset] == self.weights for block, offset in positions)
        self.sequences.append(Written(table, tokens, covered))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), count=st.integers(1, 6))
    def grow(self, data: st.DataObject, count: int) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        start, end = sequence.num_written, sequence.num_written + count
        while len(sequence.tokens) < end:
            sequence.tokens.append(data.draw(TOKEN))
        before = state(self.pool), copy.deepcopy(sequence.table)
        growth = self.pool.grow(sequence.table, start, end)
        if growth is None:
            assert (state(self.pool), sequence.table) == before
            return
        self.apply(growth)
        for position in range(start, end):
            block = sequence.table.blocks[position // self.size]
            self.check_writable(sequence, block)
            self.shadow[block][position % self.size] = sequence.tokens[position]
            self.made_by[block][position % self.size] = self.weights
        sequence.num_written = end

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        self.pool.register(sequence.table, sequence.tokens, sequence.num_written)

    @precondition(lambda self: any(s.num_written for s in self.sequences))
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from([s for s in self.sequences if s.num_written]))
        num_tokens = data.draw(st.integers(1, parent.num_written))
        table = self.pool.fork(parent.table, num_tokens)
        # The last shared token runs again, as in the scheduler, to give its logits.
        fork = Written(table, parent.tokens[:num_tokens], num_tokens - 1)
        self.sequences.append(fork)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        self.pool.free(sequence.table)
        assert sequence.table == BlockTable()
        self.sequences.remove(sequence)

    @rule()
    def other_weights(self) -> None:
        self.weights += 1
        self.pool.forget_contents(sequence.table for sequence in self.sequences)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check([s.table for s in self.sequences])
            assert self.pool.blocks_in_use + self.pool.num_free == self.pool.num_blocks

    @invariant()
    def every_sequence_reads_back_its_own_tokens(self) -> None:
        for sequence in getattr(self, "sequences", []):
            written = sequence.tokens[: sequence.num_written]
            assert self.read(sequence.table, sequence.num_written) == written

    def teardown(self) -> None:
        for sequence in getattr(self, "sequences", []):
            self.pool.free(sequence.table)
        if hasattr(self, "pool"):
            self.pool.check([])
            assert self.pool.num_free == self.pool.num_blocks

    def read(self, table: BlockTable, count: int) -> list[int | None]:
        return [self.shadow[table.blocks[p // self.size]][p % self.size] for p in range(count)]

    def apply(self, growth: Growth) -> None:
        for kept in (self.shadow, self.made_by):
            contents: list[Any] = [list(kept[source]) for source, _ in growth.copies]
            for (_, target), content in zip(growth.copies, contents, strict=True):
                kept[target] = content

    def check_writable(self, writer: Written, block: int) -> None:
        """Only the writer holds the block, and no look-up may find it."""
        holders = [s for s in self.sequences if block in s.table.blocks]
        assert holders == [writer]
        assert block not in self.pool._content_of


TestPoolAgainstShadow = PoolAgainstShadow.TestCase
TestPoolAgainstShadow.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
