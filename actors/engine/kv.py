"""Which KV block holds which tokens: paged allocation with a copy-on-write prefix cache.

Owns block numbers only; the tensors live in the stages, and every stage of a pipeline uses the
same numbers. Pure: no torch, no clock. The law it keeps: a block is free, cached (full, known by
its content, referenced by nobody) or referenced; only a block with exactly one reference that is
not known by its content may be written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, in token order."""

    blocks: list[int] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)
    """Content ids of the leading full blocks that the prefix cache knows."""
    is_outdated: bool = False
    """Holds KV that other weights made, in part or whole: for its own sequence only."""


@dataclass(frozen=True, slots=True)
class Growth:
    """Blocks to copy (source, destination) before the step that writes."""

    copies: tuple[tuple[int, int], ...] = ()


class BlockPool:
    """The KV blocks of one lane.

    Content is matched exactly (parent content and the block's tokens), so two prefixes can
    never be taken for one another. Freed content is kept and evicted least recently used first.
    """

    def __init__(self, num_blocks: int, block_tokens: int, *, prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(
                f"num_blocks ({num_blocks}) and block_tokens ({block_tokens}) must be at least 1"
            )
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._prefix_cache = prefix_cache
        self._references = [0] * num_blocks
        # Unreferenced blocks, next to be reused first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_of: dict[tuple[int, tuple[int, ...]], int] = {}
        self._content_of: dict[int, tuple[int, tuple[int, tuple[int, ...]]]] = {}
        self._next_content = 1

    @property
    def blocks_in_use(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def match(self, tokens: Sequence[int]) -> tuple[BlockTable, int]:
        """Take references on the longest cached prefix of `tokens`.

        Returns the table and how many tokens it covers: at most len(tokens) - 1, because the
        last token must run to give logits. When whole blocks cover everything, the last one is
        still taken and copied on write.
        """
        table = BlockTable()
        if not self._prefix_cache:
            return table, 0
        size = self.block_tokens
        for start in range(0, len(tokens) - size + 1, size):
            block = self._block_of.get((_last(table), tuple(tokens[start : start + size])))
            if block is None:
                break
            self._reference(block)
            table.blocks.append(block)
            table.contents.append(self._content_of[block][0])
        return table, min(len(table.blocks) * size, len(tokens) - 1)

    def fork(self, table: BlockTable, num_tokens: int) -> BlockTable:
        """Share the blocks that hold the first `num_tokens` tokens; writes will copy."""
        blocks = table.blocks[: self.blocks_for(num_tokens)]
        for block in blocks:
            self._reference(block)
        contents = table.contents[: num_tokens // self.block_tokens]
        return BlockTable(blocks, contents, table.is_outdated)

    def grow(self, table: BlockTable, start: int, end: int) -> Growth | None:
        """Make positions [start, end) of the table writable; None when blocks are short.

        Nothing changes when it returns None.
        """
        first = start // self.block_tokens
        last = min(self.blocks_for(end), len(table.blocks))
        shared = [i for i in range(first, last) if not self._writable(table.blocks[i])]
        missing = self.blocks_for(end) - len(table.blocks)
        if len(shared) + max(0, missing) > len(self._free):
            return None
        copies = []
        for i in shared:
            source, target = table.blocks[i], self._take()
            copies.append((source, target))
            table.blocks[i] = target
            self._release(source)
            # A block copied to be rewritten is no longer known content.
            del table.contents[i:]
        table.blocks.extend(self._take() for _ in range(missing))
        return Growth(tuple(copies))

    def register(self, table: BlockTable, tokens: Sequence[int], num_computed: int) -> None:
        """Tell the cache the content of the blocks that are now full."""
        if not self._prefix_cache or table.is_outdated:
            return
        size = self.block_tokens
        for index in range(len(table.contents), num_computed // size):
            key = (_last(table), tuple(tokens[index * size : (index + 1) * size]))
            known = self._block_of.get(key)
            if known is None:
                known = table.blocks[index]
                self._block_of[key] = known
                self._content_of[known] = (self._next_content, key)
                self._next_content += 1
            table.contents.append(self._content_of[known][0])

    def free(self, table: BlockTable) -> None:
        """Give the table's references back; its content stays cached until evicted."""
        for block in reversed(table.blocks):
            self._release(block)
        table.blocks = []
        table.contents = []
        table.is_outdated = False

    def forget_contents(self, tables: Iterable[BlockTable]) -> None:
        """Share nothing computed so far with newcomers: the weights change.

        The `tables` of live sequences keep their blocks and are never told to the cache.
        """
        self._block_of.clear()
        self._content_of.clear()
        for table in tables:
            table.contents = []
            table.is_outdated = True

    def referenced(self) -> list[int]:
        """Return the blocks that some sequence holds."""
        return [block for block, count in enumerate(self._references) if count]

    def forget_unreferenced(self) -> None:
        """Share what live sequences hold, and nothing else, with newcomers: only that was moved."""
        for block in self._free:
            content = self._content_of.pop(block, None)
            if content is not None:
                del self._block_of[content[1]]

    def check(self, tables: Sequence[BlockTable]) -> None:
        """Raise AssertionError unless every block is accounted for by `tables` (for tests)."""
        counts = [0] * self.num_blocks
        for table in tables:
            for block in table.blocks:
                counts[block] += 1
        assert counts == self._references
        assert {b for b, n in enumerate(counts) if n == 0} == set(self._free)
        assert set(self._block_of.values()) == set(self._content_of)

    def _writable(self, block: int) -> bool:
        return self._references[block] == 1 and block not in self._content_of

    def _reference(self, block: int) -> None:
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def _release(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free[block] = None
            if block not in self._content_of:
                self._free.move_to_end(block, last=False)

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        content = self._content_of.pop(block, None)
        if content is not None:
            del self._block_of[content[1]]
        self._references[block] = 1
        return block


def _last(table: BlockTable) -> int:
    """Content id of the table's last known block (0: the empty prefix)."""
    return table.contents[-1] if table.contents else 0
