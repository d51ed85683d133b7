"""What one step of a lane asks of the stages, and what the last stage answers.

The lane encodes a `StepBatch` once; every stage decodes the same bytes and passes them on. No
torch: the lane stays light.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import msgpack

from actors.engine.packed import are_finite, are_whole, is_whole, unpack
from actors.engine.requests import MAX_LOGPROBS, MAX_SEED, TokenLogprob


class Draw(NamedTuple):
    """How the next token of one sequence is drawn; `position` is the drawn token's own."""

    seed: int
    position: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int = -1
    """-1: none wanted."""
    banned: tuple[int, ...] = ()
    """Ids that must not be drawn (end-of-sequence before `min_tokens`)."""
    history: tuple[int, ...] = ()
    """Prompt and output so far; sent only when a penalty needs it."""
    num_prompt: int = 0
    """How many of `history` are prompt."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


class Rows(NamedTuple):
    """The rows that one sequence runs in a step: `tokens[start : start + length]`."""

    start: int
    length: int
    blocks: list[int]
    """The blocks that hold positions [0, start + length)."""


class StepBounds(NamedTuple):
    """What a stage can hold, so that a step which does not fit is refused before it runs."""

    vocab_size: int
    num_blocks: int
    block_tokens: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step of one lane.

    Rows of sequence i follow those of i - 1. `drawn[j]` is the index of the sequence whose last
    row draws with `draws[j]`. `prompt_logprobs` holds (sequence, k) for prompts that are scored.
    """

    lane: int
    step: int
    epoch: int
    tokens: list[int]
    rows: list[Rows]
    copies: list[tuple[int, int]] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, int]] = field(default_factory=list)
    targets: list[list[int]] = field(default_factory=list)
    """For each scored prompt, the token that follows each of its rows (one short at the end)."""
    adapter_version: int = 0
    """What every stage runs the step with; 0: the base model."""
    life: int = 0
    """Of the lane: a step of one that was lost and replaced is dropped."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def context_tokens(self) -> int:
        """KV entries read by the step, summed over its sequences."""
        return sum(rows.start + rows.length for rows in self.rows)

    @property
    def num_head_rows(self) -> int:
        scored = sum(self.rows[i].length for i, _ in self.prompt_logprobs)
        return len(self.drawn) + scored

    def check_within(self, bounds: StepBounds) -> None:
        """Raise ValueError for a token or block that the stage has not.

        On a card an index out of bounds would end the process, and every request with it.
        """
        scored = (token for targets in self.targets for token in targets)
        worst = max((*self.tokens, *scored), default=0)
        if worst >= bounds.vocab_size:
            raise ValueError(
                f"step {self.step} holds token id {worst}; the model has {bounds.vocab_size}"
            )
        copied = (block for pair in self.copies for block in pair)
        block = max((*copied, *(block for rows in self.rows for block in rows.blocks)), default=0)
        if block >= bounds.num_blocks:
            raise ValueError(
                f"step {self.step} names block {block}; the stage has {bounds.num_blocks} a lane"
            )
        for rows in self.rows:
            if rows.start + rows.length > len(rows.blocks) * bounds.block_tokens:
                raise ValueError(
                    f"step {self.step}: {rows.start + rows.length} positions in {len(rows.blocks)} "
                    f"blocks of {bounds.block_tokens}"
                )

    def encode(self) -> bytes:
        data: bytes = msgpack.packb(
            [
                self.lane, self.step, self.epoch, self.tokens, self.rows, self.copies,
                self.drawn, self.draws, self.prompt_logprobs, self.targets, self.adapter_version,
                self.life,
            ]
        )  # fmt: skip
        return data

    @classmethod
    def decode(cls, data: bytes | memoryview) -> StepBatch:
        """Decode a step; raises ValueError when it is malformed."""
        try:
            *head, rows, copies, drawn, draws, scored, targets, version, life = unpack(data)
            lane, step, epoch, tokens = head
            batch = cls(
                lane, step, epoch, tokens,
                [Rows(*entry) for entry in rows], [(s, d) for s, d in copies],
                drawn, [Draw(*entry) for entry in draws], [(i, k) for i, k in scored], targets,
                version, life,
            )  # fmt: skip
            wrong = _what_is_wrong(batch)
        except (TypeError, ValueError) as error:
            raise ValueError(f"malformed step message of {len(data)} bytes: {error}") from error
        if wrong:
            raise ValueError(f"malformed step message of {len(data)} bytes: {wrong}")
        if sum(entry.length for entry in batch.rows) != len(tokens):
            raise ValueError(f"step {step}: rows do not add up to its {len(tokens)} tokens")
        return batch


def _what_is_wrong(batch: StepBatch) -> str:
    """Name the first field of a decoded step whose type or range is wrong; "" when none is.

    Every stage asks this of every step, so fields are looked at by columns.
    """
    num_rows = len(batch.rows)
    starts, lengths, blocks = zip(*batch.rows, strict=True) if num_rows else ((), (), ())
    scored, tops = zip(*batch.prompt_logprobs, strict=True) if batch.prompt_logprobs else ((), ())
    checks = (
        ("lane", is_whole(batch.lane)),
        (
            "step, epoch, adapter or life",
            are_whole((batch.step, batch.epoch, batch.adapter_version, batch.life), high=2**63 - 1),
        ),
        ("tokens", are_whole(batch.tokens)),
        ("rows", are_whole(starts) and are_whole(lengths, low=1) and _are_lists(blocks)),
        ("copies", _are_lists(batch.copies)),
        ("drawn", are_whole(batch.drawn, high=num_rows - 1)),
        ("draws", len(batch.draws) == len(batch.drawn) and _are_draws(batch.draws)),
        (
            "prompt_logprobs",
            are_whole(scored, high=num_rows - 1) and are_whole(tops, high=MAX_LOGPROBS),
        ),
        ("targets", len(batch.targets) == len(scored) and _are_lists(batch.targets)),
    )
    for name, is_right in checks:
        if not is_right:
            return f"{name} out of place"
    if any(len(targets) > lengths[i] for i, targets in zip(scored, batch.targets, strict=True)):
        return "targets out of place"
    return ""


def _are_lists(values: Sequence[Sequence[int]]) -> bool:
    """Whether all are lists of whole numbers."""
    if not set(map(type, values)) <= {list, tuple}:
        return False
    return are_whole(list(chain.from_iterable(values)))


def _are_draws(draws: Sequence[Draw]) -> bool:
    if not draws:
        return True
    column = Draw(*zip(*draws, strict=True))  # type: ignore[arg-type]  # of tuples
    numbers = (
        column.temperature, column.top_p, column.min_p, column.repetition_penalty,
        column.presence_penalty, column.frequency_penalty,
    )  # fmt: skip
    return (
        are_whole(column.seed, high=MAX_SEED)
        and are_whole(column.position)
        and are_whole(column.top_k)
        and are_whole(column.num_prompt)
        and are_whole(column.logprobs, low=-1, high=MAX_LOGPROBS)
        and are_finite(chain(*numbers))  # type: ignore[arg-type]
        and _are_lists(column.banned)  # type: ignore[arg-type]
        and _are_lists(column.history)  # type: ignore[arg-type]
    )


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the last stage answers: one token a draw, and log-probabilities where asked for."""

    tokens: list[int]
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    """One a draw; empty when no draw wants any."""
    prompt_logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    """One list a scored prompt: for each row, the token that follows it."""

    def to_wire(self) -> list[Any]:
        return [
            self.tokens,
            [None if entry is None else entry.to_wire() for entry in self.logprobs],
            [[entry.to_wire() for entry in entries] for entries in self.prompt_logprobs],
        ]

    def check_answers(self, batch: StepBatch) -> None:
        """Raise ValueError unless this is an answer to that step, as far as its form tells."""
        asked = [len(targets) for targets in batch.targets]
        given = [len(entries) for entries in self.prompt_logprobs]
        num_draws = len(batch.drawn)
        if len(self.tokens) != num_draws or len(self.logprobs) not in (0, num_draws):
            raise ValueError(
                f"step {batch.step} draws {num_draws} tokens; the answer has {len(self.tokens)} "
                f"with {len(self.logprobs)} log-probabilities"
            )
        if asked != given:
            raise ValueError(f"step {batch.step} scores {asked} tokens; the answer has {given}")

    @classmethod
    def from_wire(cls, value: list[Any]) -> StepResult:
        """Take a result from its wire form; raises ValueError or TypeError for a malformed one."""
        tokens, logprobs, prompts = value
        if not are_whole(tokens):
            raise ValueError("the tokens of a result are not token ids")
        return cls(
            tokens,
            [None if entry is None else TokenLogprob.from_wire(entry) for entry in logprobs],
            [[TokenLogprob.from_wire(entry) for entry in entries] for entries in prompts],
        )
