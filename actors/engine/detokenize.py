"""Tokens to text as they come, and where a stop string ends it.

Text is held back while it is part of an incomplete UTF-8 character or could still become a stop
string. What is released, joined, is what decoding all tokens at once adds to the prompt's text.
(One exception: byte-fallback tokenizers turn a whole run of bytes into replacement characters when
a later byte of the run is invalid; characters of it that were complete have been released.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from tokenizers import Tokenizer

_PRIMING_TOKENS = 6
"""Prompt tokens decoded first, so that a leading space of the continuation survives decoders that
strip it at the beginning of a text."""
_REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of one choice.

    `tokenizers.DecodeStream` is not used: it raises when an invalid byte follows a complete
    character of a byte-fallback tokenizer, and gives out what it held back of the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        # Tokens whose text is out, decoded again in front of those whose text is not.
        self._context = list(prompt[-_PRIMING_TOKENS:])
        self._context_text = self._decode(self._context)
        self._pending: list[int] = []
        self._held = ""
        """Text that could still become a stop string."""
        self._stop: str | None = None

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text, once one has."""
        return self._stop

    def push(self, token: int) -> str:
        """Take one token; returns the text that can be released."""
        if self._stop is not None:
            return ""
        self._pending.append(token)
        text = self._pending_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        self._context_text = self._decode(self._context)
        return self._extend(text)

    def finish(self) -> str:
        """Return what was held back. Call once, after the last token."""
        if self._stop is not None:
            return ""
        return self._extend(self._pending_text(), is_end=True)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _pending_text(self) -> str:
        """What the pending tokens add; they may complete a character that the context began."""
        text = self._decode(self._context + self._pending)
        pairs = zip(self._context_text, text, strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return text[shared:]

    def _extend(self, piece: str, *, is_end: bool = False) -> str:
        """Add decoded text, look for stops in what has not been released, release what is safe."""
        fresh = self._held + piece
        found = [(at, stop) for stop in self._stops if (at := fresh.find(stop)) >= 0]
        if found:
            safe, self._stop = min(found, key=lambda pair: (pair[0], -len(pair[1])))
        elif is_end:
            safe = len(fresh)
        else:
            safe = len(fresh) - _partial_stop(fresh, self._stops)
        self._held = fresh[safe:]
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
