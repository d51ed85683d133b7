"""What one step of a lane asks of the stages, and what the last stage answers.

The lane encodes a `StepBatch` once; every stage decodes the same bytes and passes them on. No
torch: the lane stays light.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgpack

from actors.engine.requests import TokenLogprob


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
            fields = msgpack.unpackb(data)
            (
                lane,
                step,
                epoch,
                tokens,
                rows,
                copies,
                drawn,
                draws,
                scored,
                targets,
                version,
                life,
            ) = fields
            batch = cls(
                lane, step, epoch, tokens,
                [Rows(*entry) for entry in rows], [(s, d) for s, d in copies],
                drawn, [Draw(*entry) for entry in draws], [(i, k) for i, k in scored], targets,
                version, life,
            )  # fmt: skip
            is_whole = sum(entry.length for entry in batch.rows) == len(tokens)
        except (TypeError, ValueError, msgpack.exceptions.UnpackException) as error:
            raise ValueError(f"malformed step message of {len(data)} bytes: {error}") from error
        if not is_whole:
            raise ValueError(f"step {step}: rows do not add up to its {len(tokens)} tokens")
        return batch


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

    @classmethod
    def from_wire(cls, value: list[Any]) -> StepResult:
        tokens, logprobs, prompts = value
        return cls(
            tokens,
            [None if entry is None else TokenLogprob.from_wire(entry) for entry in logprobs],
            [[TokenLogprob.from_wire(entry) for entry in entries] for entries in prompts],
        )
