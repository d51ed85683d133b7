"""What is learnt from, as tokens: all documents of a data set in one array. Numpy only."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt


class DataError(ValueError):
    """The data cannot be learnt from; the message names the file, the line and what would do."""


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens that attend to each other."""

    tokens: npt.NDArray[np.int32]
    counted: npt.NDArray[np.bool_]
    """Which tokens are learnt; the first has nothing before it and never is."""

    def __len__(self) -> int:
        return len(self.tokens)


class Corpus(Sequence[Document]):
    """Documents end to end: five bytes a token and eight a document.

    Document d is `tokens[offsets[d]:offsets[d + 1]]`.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.int32],
        counted: npt.NDArray[np.bool_],
        offsets: npt.NDArray[np.int64],
    ) -> None:
        self.tokens = tokens
        self.counted = counted
        self.offsets = offsets

    @staticmethod
    def of(documents: Iterable[Document]) -> Corpus:
        """Return the documents as a corpus."""
        builder = CorpusBuilder()
        for document in documents:
            builder.extend(document.tokens, document.counted)
            builder.end_document()
        return builder.build()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | Sequence[Document]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        index = range(len(self))[index]
        span = slice(self.offsets[index], self.offsets[index + 1])
        return Document(self.tokens[span], self.counted[span])

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the tokens of every document."""
        return np.diff(self.offsets)

    def row_counts(self) -> npt.NDArray[np.bool_]:
        """Return, for every token, whether the token after it in its document is learnt."""
        counts = np.zeros(len(self.tokens), dtype=np.bool_)
        counts[:-1] = self.counted[1:]
        ends = self.offsets[1:]
        counts[ends[ends > 0] - 1] = False
        return counts

    def subset(self, chosen: npt.NDArray[np.bool_]) -> Corpus:
        """Return the documents for which `chosen` is true, in their order."""
        lengths = self.lengths()
        rows = np.repeat(chosen, lengths)
        return Corpus(self.tokens[rows], self.counted[rows], _offsets(lengths[chosen]))


class CorpusBuilder:
    """Grows a corpus piece by piece."""

    def __init__(self) -> None:
        self._tokens = array("i")
        self._counted = bytearray()
        self._lengths = array("q")
        self._start = 0

    def extend(self, tokens: npt.ArrayLike, counted: bool | npt.ArrayLike) -> None:
        """Add tokens to the document that is being written."""
        added = np.asarray(tokens, dtype=np.int32)
        self._tokens.frombytes(added.tobytes())
        self._counted += np.broadcast_to(np.asarray(counted, dtype=np.bool_), added.shape).tobytes()

    def end_document(self) -> None:
        """Close the document; what follows is the next."""
        self._lengths.append(len(self._tokens) - self._start)
        self._start = len(self._tokens)

    def build(self) -> Corpus:
        """Return all closed documents. The builder is used up."""
        return Corpus(
            np.frombuffer(self._tokens, dtype=np.int32)[: self._start],
            np.frombuffer(self._counted, dtype=np.bool_)[: self._start],
            _offsets(np.frombuffer(self._lengths, dtype=np.int64)),
        )


def _offsets(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
