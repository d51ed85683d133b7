"""Attention with gradients over packed documents, behind transformers' AttentionInterface.

The attention function `motley_packed` runs rows (B, T) whose documents must not see each other;
where they lie travels as the layer keyword argument `packed` (a `PackedDocuments`). Documents of
similar length are padded to one batch and attend causally: padding follows the document, so no
real row sees it and no mask is needed. A mask exists only where a window is shorter than the
document, one for each length and window, shared by layers. A document's result does not depend on
what it is packed with.

Shapes: B sequences, T rows each, N documents of a group, L rows of its longest, Hq query heads,
Hk KV heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface

from actors.engine.training_values import PADDING, Tokens

PACKED_ATTENTION_NAME = "motley_packed"
_SINK_FEATURES = 8
"""By how many features heads grow to carry a sink: one would do, but kernels want multiples of 8.
"""


@dataclass(frozen=True, slots=True)
class _Group:
    """Documents (their numbers) that run as one batch, each padded to `length` rows."""

    documents: tuple[int, ...]
    length: int


class PackedDocuments:
    """Where the documents of one micro-batch lie, prepared once and used by every layer."""

    def __init__(self, documents_BT: Tokens) -> None:
        self.num_sequences, self.num_rows = documents_BT.shape
        self.lengths = _lengths(documents_BT)
        """Of all documents, in the order of their rows."""
        self.is_whole = len(self.lengths) == self.num_sequences
        """Every sequence is one document, so that it can run as it is."""
        groups: dict[int, list[int]] = {}
        for number, length in enumerate(self.lengths):
            groups.setdefault((length - 1).bit_length(), []).append(number)
        self.groups = tuple(
            _Group(tuple(numbers), max(self.lengths[number] for number in numbers))
            for numbers in groups.values()
        )
        self._masks: dict[tuple[int, int, bool], torch.Tensor] = {}

    def mask(
        self, length: int, window: int | None, query: torch.Tensor, *, has_sink: bool
    ) -> torch.Tensor | None:
        """Return what is added to the scores, (1, 1, L, L) in the type of `query`.

        With a sink, row and column 0 come before the document's. None: plain causal attention.
        """
        if window is None or window >= length:
            return None
        key = (length, window, has_sink)
        if key not in self._masks:
            rows = torch.arange(length, device=query.device)
            behind = rows[:, None] - rows[None]
            mask = torch.zeros(length, length, dtype=query.dtype, device=query.device)
            mask.masked_fill_((behind < 0) | (behind >= window), -torch.inf)
            if has_sink:
                mask = functional.pad(mask, (1, 0, 1, 0))
                mask[0, 1:] = -torch.inf
            self._masks[key] = mask[None, None]
        return self._masks[key]


def _lengths(documents_BT: Tokens) -> list[int]:
    """Rows of every document; padding belongs to the document before it, which never sees it."""
    starts_BT = np.empty(documents_BT.shape, dtype=bool)
    starts_BT[:, 0] = True
    changes = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts_BT[:, 1:] = changes & (documents_BT[:, 1:] != PADDING)
    starts = np.flatnonzero(starts_BT)
    return [int(length) for length in np.diff(starts, append=documents_BT.size)]


@dataclass(frozen=True, slots=True)
class _Options:
    scaling: float | None
    window: int | None
    dropout: float
    sinks_H: torch.Tensor | None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: PackedDocuments,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    s_aux: torch.Tensor | None = None,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally within each document.

    query (B, Hq, T, D), key and value (B, Hk, T, D); returns (B, T, Hq, D). `s_aux` are GPT-OSS's
    per-head attention sinks: a logit that takes part in the softmax and carries no value.
    """
    options = _Options(scaling, sliding_window, dropout, s_aux)
    if packed.is_whole:
        return _attend(packed, query, key, value, options).transpose(1, 2), None
    pieces = [
        torch.split(tensor.transpose(1, 2).flatten(0, 1), packed.lengths)
        for tensor in (query, key, value)
    ]
    outs: dict[int, torch.Tensor] = {}
    for group in packed.groups:
        batch = [_batch(tensors, group, packed.lengths) for tensors in pieces]
        out = _attend(packed, batch[0], batch[1], batch[2], options)
        outs |= zip(group.documents, _unbatch(out, group, packed.lengths), strict=True)
    rows = torch.cat([outs[number] for number in range(len(packed.lengths))])
    return rows.view(packed.num_sequences, packed.num_rows, *rows.shape[1:]), None


def _batch(pieces: tuple[torch.Tensor, ...], group: _Group, lengths: list[int]) -> torch.Tensor:
    """Pad documents, each (rows, H, D), and stack them: (N, H, L, D)."""
    padding = pieces[0].new_zeros(group.length, *pieces[0].shape[1:])
    parts = []
    for number in group.documents:
        parts += [pieces[number], padding[lengths[number] :]]
    return torch.cat(parts).view(-1, group.length, *padding.shape[1:]).transpose(1, 2)


def _unbatch(out: torch.Tensor, group: _Group, lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """Undo `_batch`: the documents' own rows, each (rows, H, D)."""
    sizes = []
    for number in group.documents:
        sizes += [lengths[number], group.length - lengths[number]]
    return torch.split(out.transpose(1, 2).flatten(0, 1), sizes)[::2]


def _attend(
    packed: PackedDocuments,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: _Options,
) -> torch.Tensor:
    """Causal attention of equally long documents, each on its own; returns (N, Hq, L, D)."""
    length, head_dim = query.shape[2:]
    scale = head_dim**-0.5 if options.scaling is None else options.scaling
    has_sink = options.sinks_H is not None
    mask = packed.mask(length, options.window, query, has_sink=has_sink)
    if options.sinks_H is not None:
        query, key, value = _with_sink(query, key, value, options.sinks_H / scale)
    num_groups = query.shape[1] // key.shape[1]
    # On CUDA, the kernel that takes a mask, or float32, without a matrix of scores wants equally
    # many heads.
    is_grouped = num_groups > 1 and mask is None and _groups_heads(query)
    if num_groups > 1 and not is_grouped:
        key, value = (tensor.repeat_interleave(num_groups, 1) for tensor in (key, value))
    out = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=options.dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=is_grouped,
    )
    return out[:, :, 1:, :head_dim] if has_sink else out


def _groups_heads(query: torch.Tensor) -> bool:
    return query.device.type != "cuda" or query.dtype != torch.float32


def _with_sink(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks_H: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put a row with the sink's key before the document's, and a query that is dropped again.

    The sink's logit is the product of one more feature, `sinks_H` in every query and 1 in this key
    alone. As a column of the mask it would cost a gradient as large as the scores.
    """
    grown = (0, _SINK_FEATURES, 1, 0)
    num_documents, num_heads, length, head_dim = query.shape
    feature = sinks_H.to(query.dtype).view(1, num_heads, 1, 1)
    feature = feature.expand(num_documents, num_heads, length, 1)
    query = functional.pad(
        torch.cat((query, feature), -1), (0, _SINK_FEATURES - 1, 1, 0)
    )  # the first row's logit is 0, and its only key the sink's
    key = functional.pad(key, grown)
    one = torch.zeros(1, 1, *key.shape[2:], dtype=key.dtype, device=key.device)
    one[0, 0, 0, head_dim] = 1.0
    return query, key + one, functional.pad(value, grown)


AttentionInterface.register(PACKED_ATTENTION_NAME, packed_attention)
