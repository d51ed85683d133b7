"""Documents to micro-batches: every target once, nothing across documents, resumable by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st

from actors.engine.training_values import IGNORED, PADDING, MicroBatch
from cluster.training.documents import Corpus, Document
from cluster.training.packing import Batches

Target = tuple[int, int]
"""A token and the one before it; tokens of the made-up documents are all different."""


def documents_of(lengths: Sequence[int], first_counted: Sequence[int] | None = None) -> Corpus:
    """Documents of different tokens; each learns its tokens from `first_counted` on."""
    starts = np.cumsum([0, *lengths])
    return Corpus.of(
        Document(
            np.arange(start + 1, start + length + 1, dtype=np.int32),
            np.arange(length) >= counted,
        )
        for start, length, counted in zip(
            starts, lengths, first_counted or [0] * len(lengths), strict=False
        )
    )


def batches_of(documents: Sequence[Document], sequence_tokens: int = 8, **changes: int) -> Batches:
    values = {"sequences_per_micro_batch": 2, "seed": 0, "shuffle": True} | changes
    return Batches(
        documents,
        sequence_tokens=sequence_tokens,
        sequences_per_micro_batch=values["sequences_per_micro_batch"],
        seed=values["seed"],
        shuffle=bool(values["shuffle"]),
    )


def epoch_of(batches: Batches, epoch: int = 0) -> list[MicroBatch]:
    """One sequence at a time; every epoch of these batches is as long as the first."""
    num_sequences = batches.num_sequences
    return [
        micro_batch
        for step in range(epoch * num_sequences, (epoch + 1) * num_sequences)
        for micro_batch in batches.step(step, micro_batches=1)
    ]


def targets_of(micro_batches: Sequence[MicroBatch]) -> list[Target]:
    return [
        (int(token), int(target))
        for batch in micro_batches
        for token, target in zip(batch.tokens_BT.flat, batch.targets_BT.flat, strict=True)
        if target != IGNORED
    ]


def expected_targets(documents: Sequence[Document]) -> list[Target]:
    return [
        (int(document.tokens[i - 1]), int(document.tokens[i]))
        for document in documents
        for i in range(1, len(document))
        if document.counted[i]
    ]


def same(first: Sequence[MicroBatch], second: Sequence[MicroBatch]) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for a, b in zip(first, second, strict=True)
        for name in MicroBatch.__slots__
    )


CORPORA = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=25).map(
    lambda sizes: documents_of(*zip(*sizes, strict=True))
)
LEARNABLE = CORPORA.filter(lambda corpus: bool(corpus.row_counts().any()))


# By hand


def test_two_short_documents_share_a_sequence() -> None:
    batches = batches_of(documents_of([3, 4]), shuffle=0, sequences_per_micro_batch=1)

    [batch] = batches.step(0, micro_batches=1)

    assert batch.tokens_BT.tolist() == [[1, 2, 3, 4, 5, 6, 7, 0]]
    assert batch.targets_BT.tolist() == [[2, 3, IGNORED, 5, 6, 7, IGNORED, IGNORED]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert batch.documents_BT.tolist() == [[0, 0, 0, 1, 1, 1, 1, PADDING]]
    assert (batch.num_tokens, batch.num_targets) == (7, 5)
    assert batch.tokens_BT.dtype == batch.targets_BT.dtype == np.int64


def test_a_long_document_is_cut_and_the_row_before_the_cut_predicts_the_token_behind_it() -> None:
    batches = batches_of(documents_of([6]), sequence_tokens=4, shuffle=0)

    [batch] = batches.step(0, micro_batches=1)

    assert batch.tokens_BT.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert batch.targets_BT.tolist() == [[2, 3, 4, 5], [6, IGNORED, IGNORED, IGNORED]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batches.num_cut == 1


def test_a_piece_without_a_target_is_left_out() -> None:
    # A prompt of nine tokens and an answer of two: the first sequence would learn nothing.
    batches = batches_of(documents_of([11], first_counted=[9]), shuffle=0)

    [batch] = batches.all()

    assert batch.tokens_BT.tolist() == [[9, 10, 11, 0, 0, 0, 0, 0]]
    assert batch.targets_BT[0, :3].tolist() == [10, 11, IGNORED]
    assert batches.num_targets == 2


def test_text_is_cut_to_fill_gaps_and_answers_are_not() -> None:
    lengths = [40] * 8  # no two fit into 64

    text = batches_of(documents_of(lengths), sequence_tokens=64)
    answers = batches_of(documents_of(lengths, first_counted=[30] * 8), sequence_tokens=64)

    assert (text.num_sequences, text.padding_fraction) == (5, 0.0)
    assert (answers.num_sequences, answers.padding_fraction) == (8, 1 - 5 / 8)


def test_documents_without_anything_to_learn_are_refused() -> None:
    with pytest.raises(ValueError, match="none of 2 documents has a token to learn"):
        batches_of(documents_of([1, 4], first_counted=[0, 4]))


def test_in_order_without_shuffling() -> None:
    batches = batches_of(documents_of([8] * 6), shuffle=0)

    tokens = np.concatenate([b.tokens_BT.ravel() for b in batches.step(0, micro_batches=3)])

    assert tokens.tolist() == list(range(1, 49))
    assert same(batches.step(0, 3), batches.step(1, 3))


def test_fewer_sequences_than_a_step_needs_are_repeated() -> None:
    documents = documents_of([8, 8, 8])
    batches = batches_of(documents)

    step = batches.step(0, micro_batches=4)

    assert sum(batch.tokens_BT.shape[0] for batch in step) == 8
    counts = Counter(targets_of(step))
    assert set(counts) == set(expected_targets(documents))
    assert set(counts.values()) <= {2, 3}


def test_an_evaluation_sees_each_sequence_once_up_to_its_limit() -> None:
    documents = documents_of([8] * 5)
    batches = batches_of(documents)

    everything, some = batches.all(), batches.all(limit_sequences=3)

    assert [batch.tokens_BT.shape for batch in everything] == [(2, 8), (2, 8), (1, 8)]
    assert sorted(targets_of(everything)) == expected_targets(documents)
    assert [len(batch.tokens_BT) for batch in some] == [2, 1]
    assert same(some, batches_of(documents, seed=7).all(limit_sequences=3))
    assert same(everything, batches.all(limit_sequences=100))


def test_realistic_lengths_leave_less_than_two_percent_empty() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1, 3000).astype(int) + 2
    starts = np.cumsum([0, *lengths])
    tokens = np.arange(starts[-1], dtype=np.int32)

    for counted in (np.ones(len(tokens), dtype=bool), tokens % 3 == 0):
        batches = batches_of(Corpus(tokens, counted, starts), sequence_tokens=2048)
        assert batches.padding_fraction < 0.02


# Whatever the documents


@given(documents=LEARNABLE, sequence_tokens=st.integers(2, 12), epoch=st.integers(0, 2))
@run_settings(deadline=None, max_examples=50)
def test_an_epoch_holds_every_target_once_after_its_own_predecessor(
    documents: Corpus, sequence_tokens: int, epoch: int
) -> None:
    batches = batches_of(documents, sequence_tokens, sequences_per_micro_batch=1)
    # Epochs may differ in length, so the sequences are read from as many steps as that takes.
    steps = [batches.step(step, 1)[0] for step in range(3 * batches.num_sequences + 20)]
    expected = expected_targets(documents)

    ends = np.cumsum([batch.num_targets for batch in steps])
    first = int(np.searchsorted(ends, epoch * len(expected), side="right"))
    last = int(np.searchsorted(ends, (epoch + 1) * len(expected)))

    assert all(batch.num_targets for batch in steps)
    assert sorted(targets_of(steps[first : last + 1])) == sorted(expected)


@given(documents=LEARNABLE, sequence_tokens=st.integers(2, 12), shuffle=st.booleans())
@run_settings(deadline=None, max_examples=50)
def test_rows_are_runs_of_a_document_from_position_0(
    documents: Corpus, sequence_tokens: int, shuffle: bool
) -> None:
    batches = batches_of(documents, sequence_tokens, shuffle=shuffle)
    owner = np.repeat(np.arange(len(documents)), documents.lengths())
    seen: list[int] = []

    for batch in batches.all():
        for tokens, positions, members in zip(
            batch.tokens_BT, batch.positions_BT, batch.documents_BT, strict=True
        ):
            real = members[members != PADDING]
            assert (members[len(real) :] == PADDING).all()  # padding is at the end
            assert (np.diff(real) >= 0).all()
            assert set(real.tolist()) == set(range(len(set(real.tolist()))))
            for member in set(real.tolist()):
                run = tokens[members == member]
                assert positions[members == member].tolist() == list(range(len(run)))
                assert (np.diff(run) == 1).all()
                assert len(set(owner[run - 1].tolist())) == 1
            seen += tokens[: len(real)].tolist()
            assert (batch.targets_BT[batch.documents_BT == PADDING] == IGNORED).all()

    # No token is there twice, and those of a document all of which is learnt are all there, but
    # for a last one that stands alone behind a cut.
    assert len(seen) == len(set(seen)) == batches.num_tokens
    for document in documents:
        if len(document) > 1 and document.counted[1:].all():
            assert set(document.tokens[:-1].tolist()) <= set(seen)


@given(
    documents=LEARNABLE,
    seed=st.integers(0, 2**70),
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=6),
)
@run_settings(deadline=None, max_examples=50)
def test_a_resumed_run_sees_what_an_unbroken_one_does(
    documents: Corpus, seed: int, steps: list[int]
) -> None:
    unbroken = batches_of(documents, seed=seed)
    run = [unbroken.step(step, micro_batches=2) for step in range(max(steps) + 1)]
    resumed = batches_of(list(documents), seed=seed)

    assert all(same(resumed.step(step, micro_batches=2), run[step]) for step in steps)


@given(lengths=st.lists(st.integers(2, 40), min_size=6, max_size=30), shuffle=st.booleans())
@run_settings(deadline=None, max_examples=50)
def test_sequences_have_no_gap_that_text_could_fill(lengths: list[int], shuffle: bool) -> None:
    batches = batches_of(documents_of(lengths), sequence_tokens=16, shuffle=shuffle)

    # One row may be left where a cut would part a last token from the one that predicts it.
    rows = batches.num_tokens + batches.num_sequences
    assert batches.num_sequences <= -(-rows // 15)


def test_seeds_and_epochs_differ() -> None:
    documents = documents_of([3, 5, 8, 2, 7, 6, 4] * 6)
    one, other = batches_of(documents, seed=1), batches_of(documents, seed=2)
    steps = one.num_sequences // 2

    def epoch(batches: Batches, first: int) -> list[MicroBatch]:
        return [batch for step in range(first, first + steps) for batch in batches.step(step, 1)]

    assert not same(epoch(one, 0), epoch(other, 0))
    assert not same(epoch(one, 0), epoch(one, steps))
    assert same(epoch(one, 0), epoch(batches_of(documents, seed=1), 0))


def test_the_order_is_the_same_in_every_release() -> None:
    batches = batches_of(documents_of([8] * 6), sequences_per_micro_batch=6, seed=3)

    [batch] = batches.step(1, micro_batches=1)

    assert (batch.tokens_BT[:, 0] // 8).tolist() == [3, 1, 2, 0, 4, 5]
