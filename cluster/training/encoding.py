"""Records to documents: token ids, and which of them are learnt.

A prompt and its completion are encoded apart, as they are when the model is served: the prompt is
encoded alone and the model goes on from there. A conversation is rendered and encoded as one text,
as its next turn will be, and a token counts if it overlaps an answer.

Text and completions end with the end-of-sequence token, conversations as the template has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from cluster.gateway.tokenizer import load_pretrained
from cluster.training.chats import ChatTemplate, Span
from cluster.training.documents import Corpus, CorpusBuilder, DataError
from cluster.training.records import Chat, Completion, Record, Text

_PIECE_CHARACTERS = 1 << 16
_BATCH_CHARACTERS = 1 << 20
"""Characters encoded at once: an encoding is some thirty times the size of its text."""
# Pre-tokenizers end a word here, whatever stands before and behind; only GPT-2's counts on what
# follows a blank line, and may join its line breaks in another way.
_LINE_START = re.compile(r"(?<=\n)(?=\S)")
_ANCHOR = "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Text that is encoded on its own."""

    text: str
    counted: bool | list[Span]
    """All, none, or the tokens that overlap spans of characters."""
    continues: bool = False
    """Follows another piece of its document."""
    ends: bool = True
    """Is its document's last."""
    bare: bool = False
    """No special tokens are put around it."""


class Encoder:
    """Encodes with the tokenizer and chat template of a checkpoint."""

    def __init__(self, checkpoint_path: Path, *, train_on_prompts: bool) -> None:
        """Load the tokenizer.

        Raises:
            DataError: There is none, or it has no end-of-sequence token.
        """
        try:
            loaded = load_pretrained(checkpoint_path)
        except ValueError as error:
            raise DataError(str(error)) from error
        if loaded.eos_token_id is None:
            raise DataError(
                f"{checkpoint_path}: the tokenizer has no token that ends a text; set eos_token "
                f"in tokenizer_config.json"
            )
        self._eos = int(loaded.eos_token_id)
        self._chat_template = ChatTemplate(loaded)
        self._train_on_prompts = train_on_prompts
        # A copy, since a checkpoint may have saved truncation and padding of its training.
        self._backend = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._opening = self._opening_tokens()
        # SentencePiece puts a blank before a text, which must not come before a continuation.
        anchor, word = self._ids(_ANCHOR), self._ids("a")
        self._anchor = [] if self._ids(f"{_ANCHOR}a") == anchor + word else anchor

    def encode(self, records: Iterable[Record]) -> Corpus:
        """Return one document for each record, without tokens for a blank text.

        Raises:
            DataError: A conversation that the chat template cannot render.
        """
        builder = CorpusBuilder()
        pieces = (piece for record in records for piece in self._pieces_of(record))
        for batch in _batched(pieces):
            texts = [self._text_of(piece) for piece in batch]
            plain = all(isinstance(piece.counted, bool) for piece in batch)
            encode = self._backend.encode_batch_fast if plain else self._backend.encode_batch
            encodings = encode(texts, add_special_tokens=False)
            for piece, encoding in zip(batch, encodings, strict=True):
                self._add(builder, piece, encoding)
        return builder.build()

    def _add(self, builder: CorpusBuilder, piece: _Piece, encoding: Any) -> None:
        ids: list[int] = encoding.ids
        if isinstance(piece.counted, list):
            builder.extend(ids, _overlapping(encoding.offsets, piece.counted))
        else:
            if piece.continues and self._anchor:
                ids = self._continuation(piece, ids)
            opens = not piece.continues and not piece.bare
            if opens and ids[: len(self._opening)] != self._opening:
                builder.extend(self._opening, piece.counted)
            builder.extend(ids, piece.counted)
            if piece.ends and not piece.bare and ids[-1:] != [self._eos]:
                builder.extend([self._eos], piece.counted)
        if piece.ends:
            builder.end_document()

    def _text_of(self, piece: _Piece) -> str:
        return _ANCHOR + piece.text if piece.continues and self._anchor else piece.text

    def _continuation(self, piece: _Piece, ids: list[int]) -> list[int]:
        """Drop the anchor's tokens; where it has merged with the text, do without."""
        if ids[: len(self._anchor)] == self._anchor:
            return ids[len(self._anchor) :]
        return self._ids(piece.text)

    def _pieces_of(self, record: Record) -> Iterator[_Piece]:
        match record:
            case Text():
                yield from _text_pieces(record.text)
            case Completion():
                counted = self._train_on_prompts
                if record.prompt:
                    yield _Piece(text=record.prompt, counted=counted, ends=False)
                yield _Piece(text=record.completion, counted=True, continues=bool(record.prompt))
            case Chat() if self._train_on_prompts:
                yield _Piece(text=self._chat_template.render(record), counted=True, bare=True)
            case Chat():
                text, spans = self._chat_template.answers(record)
                yield _Piece(text=text, counted=spans, bare=True)

    def _ids(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _opening_tokens(self) -> list[int]:
        """Return what the tokenizer puts before a text, such as a begin-of-sequence token."""
        bare = self._ids("a")
        whole = list(self._backend.encode("a", add_special_tokens=True).ids)
        starts = range(len(whole) - len(bare) + 1)
        return whole[: next(i for i in starts if whole[i : i + len(bare)] == bare)]


def _text_pieces(text: str) -> Iterator[_Piece]:
    """Cut a long text at line starts: encoding all of it at once would take gigabytes."""
    if not text.strip():
        yield _Piece(text="", counted=False, bare=True)
        return
    start = 0
    while (line := _LINE_START.search(text, start + _PIECE_CHARACTERS)) is not None:
        piece = text[start : line.start()]
        yield _Piece(text=piece, counted=True, continues=start > 0, ends=False)
        start = line.start()
    yield _Piece(text=text[start:], counted=True, continues=start > 0)


def _overlapping(offsets: list[Span], spans: list[Span]) -> npt.NDArray[np.bool_]:
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    counted = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in spans:
        counted |= (ends > start) & (starts < end)
    return counted


def _batched(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
