"""Pieces to OpenAI's JSON: completion and chat objects, whole or as chunks of a stream.

Log-probabilities that JSON cannot hold (minus infinity) are sent as -9999, as OpenAI does.
`text_offset` counts characters from the start of the choice's text.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.engine.requests import TokenLogprob
from cluster.gateway.openai_pieces import Piece
from cluster.gateway.tokenizer import Tokenizer

Json = dict[str, Any]

_IMPOSSIBLE = -9999.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerHead:
    """What every object of one answer repeats."""

    id: str
    created_unix_s: int
    model: str


class AnswerFormat(Protocol):
    """How one API writes an answer."""

    def whole(self, pieces: Sequence[Piece], usage: Json) -> Json: ...

    def chunks(self, piece: Piece) -> list[Json]: ...

    def usage_chunk(self, usage: Json) -> Json: ...


class CompletionFormat:
    """text_completion objects."""

    def __init__(self, head: AnswerHead, tokenizer: Tokenizer, *, with_logprobs: bool) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._offsets: dict[int, _TextOffsets] = {}

    def whole(self, pieces: Sequence[Piece], usage: Json) -> Json:
        return self._object([self._choice(piece) for piece in pieces]) | {"usage": usage}

    def chunks(self, piece: Piece) -> list[Json]:
        if not piece.has_content and piece.finish_reason is None:
            return []
        return [self._object([self._choice(piece)])]

    def usage_chunk(self, usage: Json) -> Json:
        return self._object([]) | {"usage": usage}

    def _object(self, choices: list[Json]) -> Json:
        return {
            "id": self._head.id,
            "object": "text_completion",
            "created": self._head.created_unix_s,
            "model": self._head.model,
            "choices": choices,
        }

    def _choice(self, piece: Piece) -> Json:
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs(piece) if self._with_logprobs else None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }

    def _logprobs(self, piece: Piece) -> Json:
        offsets = self._offsets.setdefault(piece.index, _TextOffsets())
        ids = [entry.token_id for entry in piece.entries]
        return {
            "tokens": [self._tokenizer.token_text(token_id) for token_id in ids],
            "token_logprobs": [_finite(entry.logprob) for entry in piece.entries],
            "top_logprobs": [self._top(entry) for entry in piece.entries],
            "text_offset": [offsets.of(self._tokenizer.token_bytes(each)) for each in ids],
        }

    def _top(self, entry: TokenLogprob) -> Json | None:
        """Return text -> log-probability, best first, the chosen token always among them."""
        if entry.logprob is None:
            return None
        top: Json = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            # Two tokens may read the same; the likelier one, which comes first, is kept.
            top.setdefault(self._tokenizer.token_text(token_id), _finite(logprob))
        return top


class ChatFormat:
    """chat.completion and chat.completion.chunk objects."""

    def __init__(self, head: AnswerHead, tokenizer: Tokenizer, *, with_logprobs: bool) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs

    def whole(self, pieces: Sequence[Piece], usage: Json) -> Json:
        choices = [
            {
                "index": piece.index,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": self._logprobs(piece),
                "finish_reason": piece.finish_reason,
                "stop_reason": piece.stop_reason,
            }
            for piece in pieces
        ]
        return self._object("chat.completion", choices) | {"usage": usage}

    def chunks(self, piece: Piece) -> list[Json]:
        """Return the role, then the text, then the finish reason: whichever there is."""
        chunks = []
        if piece.is_first:
            chunks.append(self._chunk(piece.index, {"role": "assistant", "content": ""}))
        if piece.has_content:
            logprobs = self._logprobs(piece)
            chunks.append(self._chunk(piece.index, {"content": piece.text}, logprobs=logprobs))
        if piece.finish_reason is not None:
            chunks.append(
                self._chunk(
                    piece.index,
                    {},
                    finish_reason=piece.finish_reason,
                    stop_reason=piece.stop_reason,
                )
            )
        return chunks

    def usage_chunk(self, usage: Json) -> Json:
        return self._object("chat.completion.chunk", []) | {"usage": usage}

    def _object(self, name: str, choices: list[Json]) -> Json:
        return {
            "id": self._head.id,
            "object": name,
            "created": self._head.created_unix_s,
            "model": self._head.model,
            "choices": choices,
        }

    def _chunk(
        self,
        index: int,
        delta: Json,
        *,
        logprobs: Json | None = None,
        finish_reason: str | None = None,
        stop_reason: str | int | None = None,
    ) -> Json:
        choice: Json = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        if stop_reason is not None:
            choice["stop_reason"] = stop_reason
        return self._object("chat.completion.chunk", [choice])

    def _logprobs(self, piece: Piece) -> Json | None:
        if not self._with_logprobs:
            return None
        content = [
            self._token(entry.token_id, entry.logprob)
            | {"top_logprobs": [self._token(*pair) for pair in entry.top]}
            for entry in piece.entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float | None) -> Json:
        return {
            "token": self._tokenizer.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


class _TextOffsets:
    """Where each token of one choice begins in its text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0

    def of(self, token_bytes: bytes) -> int:
        start = self._num_characters
        self._num_characters += len(self._decoder.decode(token_bytes))
        return start


def _finite(logprob: float | None) -> float | None:
    if logprob is None or math.isfinite(logprob):
        return logprob
    return _IMPOSSIBLE
