"""Packed attention against scores worked out in full, document by document."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine.packed_attention import PackedDocuments, packed_attention
from actors.engine.training_values import PADDING, Tokens

pytestmark = pytest.mark.engine

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 8
MODULE = torch.nn.Module()


def layout(sequences: list[list[int]], num_rows: int) -> Tokens:
    """Number the documents, of these lengths, of each sequence; the rest is padding."""
    numbers = np.full((len(sequences), num_rows), PADDING, dtype=np.int64)
    for row, lengths in zip(numbers, sequences, strict=True):
        filled = np.repeat(np.arange(len(lengths)), lengths)
        row[: len(filled)] = filled
    return numbers


def inputs(shape: tuple[int, int], *, seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)

    def tensor(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=random).requires_grad_()

    sequences, rows = shape
    return {
        "query": tensor(sequences, NUM_HEADS, rows, HEAD_DIM),
        "key": tensor(sequences, NUM_KV_HEADS, rows, HEAD_DIM),
        "value": tensor(sequences, NUM_KV_HEADS, rows, HEAD_DIM),
        "s_aux": tensor(NUM_HEADS),
    }


def attend(
    tensors: dict[str, torch.Tensor], packed: PackedDocuments, **options: Any
) -> torch.Tensor:
    sinks = tensors["s_aux"] if options.pop("sinks", False) else None
    out, _ = packed_attention(
        MODULE,
        tensors["query"],
        tensors["key"],
        tensors["value"],
        None,
        packed=packed,
        s_aux=sinks,
        **options,
    )
    return out


def in_full(
    tensors: dict[str, torch.Tensor],
    numbers_BT: Tokens,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    sinks: bool = False,
) -> torch.Tensor:
    """Softmax over all pairs of rows in float64, with a mask for what may be seen."""
    groups = NUM_HEADS // NUM_KV_HEADS
    query = tensors["query"].double()
    key, value = (tensors[name].double().repeat_interleave(groups, 1) for name in ("key", "value"))
    scores = query @ key.transpose(2, 3) * (scaling or 1 / math.sqrt(HEAD_DIM))
    numbers = torch.from_numpy(numbers_BT)
    rows = torch.arange(numbers.shape[1])
    behind = rows[:, None] - rows[None]
    seen = (behind >= 0) & (behind < (sliding_window or len(rows)))
    seen = seen & (numbers[:, :, None] == numbers[:, None])
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if sinks:
        sink = tensors["s_aux"].double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), -1)
    return (scores.softmax(-1)[..., : len(rows)] @ value).transpose(1, 2)


def check(numbers_BT: Tokens, **options: Any) -> None:
    """Real rows, and the gradients that they cause, are equal; no row is infinite."""
    tensors = inputs(numbers_BT.shape)
    expected_tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for tensor in expected_tensors.values():
        tensor.requires_grad_()
    real = torch.from_numpy(numbers_BT != PADDING)[:, :, None, None]
    weight = torch.randn(*numbers_BT.shape, NUM_HEADS, HEAD_DIM) * real

    actual = attend(tensors, PackedDocuments(numbers_BT), **options)
    expected = in_full(expected_tensors, numbers_BT, **options).float()

    torch.testing.assert_close(actual * real, expected * real, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(actual).all()
    torch.autograd.backward(actual, weight)
    torch.autograd.backward(expected, weight)
    for name, tensor in tensors.items():
        wanted = expected_tensors[name].grad
        if wanted is None:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, wanted, rtol=1e-4, atol=1e-5)


@st.composite
def layouts(draw: st.DrawFn) -> Tokens:
    num_rows = draw(st.integers(1, 24))
    sequences = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(1, num_rows), max_size=5)))
        sequences.append([int(n) for n in np.diff([0, *cuts])])
    return layout(sequences, num_rows)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from([None, 1, 3, 10]), st.booleans(), st.sampled_from([None, 0.5]))
def test_any_layout_is_attended_document_by_document(
    numbers_BT: Tokens, window: int | None, sinks: bool, scaling: float | None
) -> None:
    check(numbers_BT, sliding_window=window, sinks=sinks, scaling=scaling)


def test_a_document_is_the_same_alone_and_packed() -> None:
    numbers_BT = layout([[5, 7, 3], [15]], 16)
    tensors = inputs(numbers_BT.shape)
    packed = attend(tensors, PackedDocuments(numbers_BT), sliding_window=4, sinks=True)
    part = {
        name: tensor if name == "s_aux" else tensor[:1, :, 5:12] for name, tensor in tensors.items()
    }

    alone = attend(part, PackedDocuments(layout([[7]], 7)), sliding_window=4, sinks=True)

    torch.testing.assert_close(packed[:1, 5:12], alone)


def test_one_document_a_sequence_runs_as_it_is() -> None:
    assert PackedDocuments(layout([[16], [11], [1]], 16)).is_whole
    assert not PackedDocuments(layout([[16], [11, 5]], 16)).is_whole


def test_documents_run_in_as_many_batches_as_there_are_doublings_of_length() -> None:
    packed = PackedDocuments(layout([[3, 4, 9, 16], [4, 3, 20, 5]], 32))

    assert packed.lengths == [3, 4, 9, 16, 4, 3, 20, 5]
    assert [(group.documents, group.length) for group in packed.groups] == [
        ((0, 1, 4, 5), 4),
        ((2, 3), 16),
        ((6,), 20),
        ((7,), 5),
    ]


def test_masks_exist_only_where_a_window_is_shorter_and_are_shared() -> None:
    packed = PackedDocuments(layout([[16]], 16))
    query = torch.zeros(1)

    assert packed.mask(16, None, query, has_sink=False) is None
    assert packed.mask(16, 16, query, has_sink=False) is None
    mask = packed.mask(16, 4, query, has_sink=False)
    assert mask is not None
    assert packed.mask(16, 4, query, has_sink=False) is mask


def test_dropout_draws_from_the_seeded_generator() -> None:
    numbers_BT = layout([[5, 7], [12]], 12)
    tensors, packed = inputs(numbers_BT.shape), PackedDocuments(numbers_BT)

    def dropped(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return attend(tensors, packed, dropout=0.5)

    assert torch.equal(dropped(1), dropped(1))
    assert not torch.equal(dropped(1), dropped(2))
