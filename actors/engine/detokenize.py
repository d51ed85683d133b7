"""Tokens to text as they come, and where a stop string ends it.

Text is held back while it is part of an incomplete UTF-8 character or could still become a stop
string. What is released, joined, is what decoding all tokens at once gives.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_PRIMING_TOKENS = 6
"""Prompt tokens decoded first, so that a leading space of the continuation survives decoders that
strip it at the beginning of a text."""


class Detokenizer:
    """The text of one choice."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids = list(prompt[-_PRIMING_TOKENS:])
        for token in self._ids:
            self._stream.step(tokenizer, token)
        self._primed_chars = len(tokenizer.decode(self._ids, skip_special_tokens=True))
        self._decoded = ""
        self._num_released = 0
        self._stop: str | None = None

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text, once one has."""
        return self._stop

    def push(self, token: int) -> str:
        """Take one token; returns the text that can be released."""
        self._ids.append(token)
        return self._extend(self._stream.step(self._tokenizer, token) or "")

    def finish(self) -> str:
        """Return what was held back. Call once, after the last token."""
        if self.stop is not None:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)[self._primed_chars :]
        return self._extend(whole[len(self._decoded) :], is_end=True)

    def _extend(self, piece: str, *, is_end: bool = False) -> str:
        """Add decoded text, look for stops in what has not been released, release what is safe."""
        if self._stop is not None:
            return ""
        self._decoded += piece
        fresh = self._decoded[self._num_released :]
        found = [(at, stop) for stop in self._stops if (at := fresh.find(stop)) >= 0]
        if found:
            at, self._stop = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            safe = at
        elif is_end:
            safe = len(fresh)
        else:
            safe = len(fresh) - _partial_stop(fresh, self._stops)
        self._num_released += safe
        return fresh[:safe]


def _partial_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of the stop strings."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
