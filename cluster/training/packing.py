"""Documents to micro-batches: which tokens run together, as a pure function of (seed, step).

A document longer than a sequence is cut into pieces; a piece attends to itself alone, yet its last
row predicts the token behind the cut, so that every target is counted once. Pieces without a
target to learn are left out: they would change nothing. The rest is packed into sequences by best
fit, longest piece first. Where that leaves a wide gap, pieces all of whose tokens are learnt
(plain text) are taken from the emptiest sequences and cut to fill it; an answer is never parted
from its prompt for that.

Every epoch shuffles and packs anew, with numbers drawn from a counter-based generator keyed by
(seed, epoch), so a run resumes from the number of its step alone.

Shapes: B sequences of a micro-batch, T tokens of a sequence; P pieces.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actors.engine.training_values import IGNORED, PADDING, MicroBatch
from cluster.training.documents import Corpus, Document

Positions = npt.NDArray[np.int64]
_Piece = tuple[int, int, bool]
"""Start, end, and whether it may be cut."""

_WINDOW_SEQUENCES = 1024
"""Sequences' worth of pieces packed at once: bounds how far the order of documents is left, and
wastes at most one part in so many."""
_GAP_FRACTION = 64
"""Gaps up to this part of a sequence stay empty; shreds of text are worth little."""


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Half-open ranges of a corpus's tokens."""

    starts_P: Positions
    ends_P: Positions
    may_be_cut_P: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.starts_P)


@dataclass(frozen=True, slots=True)
class _Layout:
    """One epoch: sequence s holds the pieces `bounds[s]` to `bounds[s + 1]`."""

    starts_P: Positions
    ends_P: Positions
    bounds: Positions

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def pieces(self, sequence: int) -> tuple[Positions, Positions]:
        span = slice(self.bounds[sequence], self.bounds[sequence + 1])
        return self.starts_P[span], self.ends_P[span]


class Batches:
    """The micro-batches of a run, without end, and those of an evaluation."""

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        sequence_tokens: int,
        sequences_per_micro_batch: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        """Cut the documents.

        Raises:
            ValueError: No document has a token to learn.
        """
        self._corpus = documents if isinstance(documents, Corpus) else Corpus.of(documents)
        self._row_counts = self._corpus.row_counts()
        self._sequence_tokens = sequence_tokens
        self._batch_sequences = sequences_per_micro_batch
        self._seed = seed
        self._shuffle = shuffle
        self._pieces = _cut(self._corpus, self._row_counts, sequence_tokens)
        if not len(self._pieces):
            raise ValueError(f"none of {len(self._corpus)} documents has a token to learn")
        self._epoch_ends: list[int] = []
        """Sequences up to the end of each epoch that was looked at."""
        self._cache: dict[int, _Layout] = {}

    @property
    def num_documents(self) -> int:
        return len(self._corpus)

    @property
    def num_cut(self) -> int:
        """Documents longer than a sequence: their later pieces do not see the earlier ones."""
        return int((self._corpus.lengths() > self._sequence_tokens).sum())

    @property
    def num_sequences(self) -> int:
        """Of the first epoch; others differ by a few when they are packed otherwise."""
        return len(self._epoch(0))

    @property
    def num_tokens(self) -> int:
        """Rows of an epoch that are not padding."""
        return int((self._pieces.ends_P - self._pieces.starts_P).sum())

    @property
    def num_targets(self) -> int:
        """Targets of an epoch."""
        return int(self._row_counts.sum())

    @property
    def padding_fraction(self) -> float:
        """Share of the first epoch's rows that is there to fill sequences up."""
        return 1 - self.num_tokens / (self.num_sequences * self._sequence_tokens)

    def step(self, step: int, micro_batches: int) -> list[MicroBatch]:
        """Return the micro-batches of optimizer step `step`, which counts from 0.

        Steps share out the sequences of one epoch after another, so a step may end one epoch and
        begin the next. Equal arguments give equal micro-batches, whatever was asked before.
        """
        num_sequences = micro_batches * self._batch_sequences
        first = step * num_sequences
        return self._micro_batches(
            [self._endless(index) for index in range(first, first + num_sequences)]
        )

    def all(self, limit_sequences: int | None = None) -> list[MicroBatch]:
        """Return each sequence once, at most `limit_sequences`, the same ones for every seed.

        The last micro-batch may have fewer sequences.
        """
        layout = self._pack(key=0)
        chosen = range(len(layout))[:limit_sequences]
        return self._micro_batches([layout.pieces(sequence) for sequence in chosen])

    def _endless(self, index: int) -> tuple[Positions, Positions]:
        """Return the pieces of a sequence counted from the start of the first epoch."""
        while not self._epoch_ends or self._epoch_ends[-1] <= index:
            before = self._epoch_ends[-1] if self._epoch_ends else 0
            self._epoch_ends.append(before + len(self._epoch(len(self._epoch_ends))))
        epoch = bisect.bisect_right(self._epoch_ends, index)
        before = self._epoch_ends[epoch - 1] if epoch else 0
        return self._epoch(epoch).pieces(index - before)

    def _epoch(self, epoch: int) -> _Layout:
        if not self._shuffle:
            epoch = 0
        if epoch not in self._cache:
            while len(self._cache) > 1:  # a step touches two epochs as a rule
                del self._cache[next(iter(self._cache))]
            self._cache[epoch] = self._pack(key=(epoch << 64) + self._seed % 2**64)
        return self._cache[epoch]

    def _pack(self, key: int) -> _Layout:
        # The raw bits of a bit generator are the same in every release of numpy.
        bits = np.random.Philox(key=key)
        order = np.arange(len(self._pieces))
        if self._shuffle:
            order = np.argsort(bits.random_raw(len(order)), kind="stable")
        sequences = _pack_windows(self._pieces, order, self._sequence_tokens)
        if self._shuffle:
            places = np.argsort(bits.random_raw(len(sequences)), kind="stable")
            sequences = [sequences[place] for place in places]
        ranges = np.array([piece[:2] for each in sequences for piece in each], dtype=np.int64)
        bounds = np.cumsum([0, *map(len, sequences)])
        return _Layout(starts_P=ranges[:, 0].copy(), ends_P=ranges[:, 1].copy(), bounds=bounds)

    def _micro_batches(self, sequences: list[tuple[Positions, Positions]]) -> list[MicroBatch]:
        size = self._batch_sequences
        return [
            self._micro_batch(sequences[first : first + size])
            for first in range(0, len(sequences), size)
        ]

    def _micro_batch(self, sequences: list[tuple[Positions, Positions]]) -> MicroBatch:
        shape_BT = (len(sequences), self._sequence_tokens)
        starts_P = np.concatenate([starts for starts, _ in sequences])
        lengths_P = np.concatenate([ends for _, ends in sequences]) - starts_P
        num_pieces_B = np.array([len(starts) for starts, _ in sequences])
        num_rows_B = np.add.reduceat(lengths_P, np.cumsum(num_pieces_B) - num_pieces_B)
        # Where each row that is not padding lies in the flattened micro-batch, and in the corpus.
        places = np.repeat(np.arange(len(sequences)) * shape_BT[1], num_rows_B) + _counted_up(
            num_rows_B
        )
        positions = _counted_up(lengths_P)
        rows = np.repeat(starts_P, lengths_P) + positions
        next_rows = np.minimum(rows + 1, len(self._row_counts) - 1)
        targets = np.where(self._row_counts[rows], self._corpus.tokens[next_rows], IGNORED)

        def spread(values: npt.NDArray[np.integer], padding: int) -> Positions:
            flat = np.full(shape_BT[0] * shape_BT[1], padding, dtype=np.int64)
            flat[places] = values
            return flat.reshape(shape_BT)

        return MicroBatch(
            tokens_BT=spread(self._corpus.tokens[rows], 0),
            targets_BT=spread(targets, IGNORED),
            positions_BT=spread(positions, 0),
            documents_BT=spread(np.repeat(_counted_up(num_pieces_B), lengths_P), PADDING),
        )


def _counted_up(lengths: npt.NDArray[np.int64]) -> Positions:
    """Return 0, 1, ... for each length, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(before, lengths)


def _cut(corpus: Corpus, row_counts: npt.NDArray[np.bool_], sequence_tokens: int) -> _Pieces:
    """Cut documents every `sequence_tokens`; leave out pieces without a target."""
    lengths = corpus.lengths()
    num_pieces = -(-lengths // sequence_tokens)
    starts = np.repeat(corpus.offsets[:-1], num_pieces) + sequence_tokens * _counted_up(num_pieces)
    document_ends = np.repeat(corpus.offsets[1:], num_pieces)
    ends = np.minimum(starts + sequence_tokens, document_ends)
    if not len(starts):
        return _Pieces(starts, ends, np.zeros(0, dtype=np.bool_))
    targets = np.add.reduceat(row_counts, starts, dtype=np.int64)
    # The last row of a document has no target even where all of it is learnt.
    rows_with_target = ends - starts - (ends == document_ends)
    keep = targets > 0
    return _Pieces(starts[keep], ends[keep], (targets == rows_with_target)[keep])


def _pack_windows(pieces: _Pieces, order: Positions, sequence_tokens: int) -> list[list[_Piece]]:
    """Return the pieces of every sequence, packing them in `order`, one window at a time."""
    starts, ends = pieces.starts_P[order], pieces.ends_P[order]
    may_be_cut = pieces.may_be_cut_P[order]
    windows = (np.cumsum(ends - starts) - 1) // (sequence_tokens * _WINDOW_SEQUENCES)
    bounds = np.searchsorted(windows, np.arange(int(windows[-1]) + 2))
    packed: list[list[_Piece]] = []
    for window in map(slice, bounds[:-1], bounds[1:]):
        members = _best_fit(ends[window] - starts[window], sequence_tokens)
        columns = (starts[window].tolist(), ends[window].tolist(), may_be_cut[window].tolist())
        window_pieces = list(zip(*columns, strict=True))
        sequences = [[window_pieces[member] for member in sorted(each)] for each in members]
        sequences.sort(key=lambda sequence: sequence[0])
        packed += _fill_gaps(sequences, sequence_tokens)
    return packed


def _best_fit(lengths: npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Return the members of every bin: longest first, each into the bin it fills best.

    O(pieces x capacity / 64): bit g of `gaps` says that some bin has room for just g.
    """
    bins: list[list[int]] = []
    with_gap: dict[int, list[int]] = {}
    gaps = 0
    sizes = lengths.tolist()
    for member in np.argsort(-lengths, kind="stable").tolist():
        size = sizes[member]
        fitting = gaps >> size
        if fitting:
            gap = size + (fitting & -fitting).bit_length() - 1
            chosen = with_gap[gap].pop()
            if not with_gap[gap]:
                gaps ^= 1 << gap
            bins[chosen].append(member)
        else:
            gap, chosen = capacity, len(bins)
            bins.append([member])
        if gap > size:
            with_gap.setdefault(gap - size, []).append(chosen)
            gaps |= 1 << (gap - size)
    return bins


def _fill_gaps(sequences: list[list[_Piece]], capacity: int) -> list[list[_Piece]]:
    """Fill wide gaps, narrowest first, with pieces that may be cut out of the emptiest sequences.

    Whatever is cut keeps a row with a target: no piece ends up as the last token of a document.
    """
    gaps = [capacity - sum(end - start for start, end, _ in each) for each in sequences]
    least = capacity // _GAP_FRACTION
    wide = sorted((s for s in range(len(gaps)) if gaps[s] > least), key=gaps.__getitem__)
    giver = len(wide) - 1
    for place, taker in enumerate(wide):
        while gaps[taker] > least and giver > place:
            given = sequences[wide[giver]]
            index = next((i for i, piece in enumerate(given) if piece[2]), None)
            if index is None:
                giver -= 1
                continue
            start, end, _ = given[index]
            cut = min(end, start + gaps[taker])
            if end - cut == 1:
                cut -= 1
            if cut == start:
                break
            sequences[taker].append((start, cut, True))
            gaps[taker] -= cut - start
            given[index : index + 1] = [(cut, end, True)] if cut < end else []
    return [each for each in sequences if each]
