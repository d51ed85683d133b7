"""From backend outputs to the pieces of an OpenAI answer, streamed or whole.

A piece is what one choice gained. A whole answer is the join of its pieces, so a streamed answer
and a whole one cannot differ. `Pieces` also numbers choices over prompts, echoes prompts and
counts tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.engine.requests import Request, RequestOutput, TokenLogprob


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one choice gained."""

    index: int
    text: str = ""
    entries: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    is_first: bool = False
    is_last: bool = False
    """The last piece of the whole answer."""

    @property
    def has_content(self) -> bool:
        return bool(self.text or self.entries)


@dataclass(slots=True)
class _PromptState:
    entries: tuple[TokenLogprob, ...] | None = None
    held: list[RequestOutput] = field(default_factory=list)
    started: set[int] = field(default_factory=set)
    num_ended: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Pieces:
    """Turns the outputs of one call's requests into pieces."""

    def __init__(self, requests: Sequence[Request], echo: Sequence[str] | None = None) -> None:
        self._requests = requests
        self._echo = echo
        self._prompts = [_PromptState() for _ in requests]
        self._num_left = sum(request.n for request in requests)

    def take(self, prompt_index: int, output: RequestOutput) -> list[Piece]:
        """Return the pieces that are complete with this output."""
        state = self._prompts[prompt_index]
        state.completion_tokens += len(output.tokens)
        state.cached_tokens = max(state.cached_tokens, output.cached_tokens)
        state.num_ended += output.finish_reason is not None
        if output.prompt_logprobs is not None:
            state.entries = output.prompt_logprobs
        state.held.append(output)
        if self._awaits_prompt(prompt_index):
            return []
        held, state.held = state.held, []
        return [self._piece(prompt_index, each) for each in held]

    def _awaits_prompt(self, prompt_index: int) -> bool:
        """Whether the echo still lacks the prompt's log-probabilities.

        They come once, on choice 0, and every choice begins with them.
        """
        state, request = self._prompts[prompt_index], self._requests[prompt_index]
        return (
            self._echo is not None
            and request.sampling.prompt_logprobs is not None
            and state.entries is None
            and state.num_ended < request.n
        )

    def _piece(self, prompt_index: int, output: RequestOutput) -> Piece:
        state = self._prompts[prompt_index]
        is_first = output.index not in state.started
        state.started.add(output.index)
        text, entries = output.text, output.logprobs
        if is_first and self._echo is not None:
            text = self._echo[prompt_index] + text
            entries = (state.entries or ()) + entries
        self._num_left -= output.finish_reason is not None
        return Piece(
            index=prompt_index * self._requests[prompt_index].n + output.index,
            text=text,
            entries=entries,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            is_first=is_first,
            is_last=output.finish_reason is not None and self._num_left == 0,
        )

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's usage object for what has been taken so far."""
        prompt = sum(len(request.prompt) for request in self._requests)
        completion = sum(state.completion_tokens for state in self._prompts)
        cached = sum(state.cached_tokens for state in self._prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def join(pieces: Iterable[Piece]) -> list[Piece]:
    """Return one piece per choice, in order."""
    choices: dict[int, list[Piece]] = {}
    for piece in pieces:
        choices.setdefault(piece.index, []).append(piece)
    return [
        Piece(
            index=index,
            text="".join(part.text for part in parts),
            entries=tuple(entry for part in parts for entry in part.entries),
            finish_reason=parts[-1].finish_reason,
            stop_reason=parts[-1].stop_reason,
            is_first=True,
        )
        for index, parts in sorted(choices.items())
    ]
