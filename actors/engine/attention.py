"""Paged attention behind transformers' AttentionInterface.

Owns the KV tensors of a stage's layers and the attention function `motley_paged`, which
transformers calls from every layer with packed rows: hidden states are (1, T, H), T rows of any
number of sequences. Where each row's keys and values go, and which blocks each sequence reads,
travels as the layer keyword argument `paged` (a `PagedRows`).

Shapes: T rows, N decoding sequences, L context, Hq query heads, Hk KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from actors.engine.batch import Rows

ATTENTION_NAME = "motley_paged"


class KVCache:
    """The KV tensors of one stage: per layer (num_blocks, block_tokens, 2, Hk, D)."""

    def __init__(
        self,
        layers: Sequence[int],
        *,
        num_blocks: int,
        block_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_tokens = block_tokens
        self._shape = (num_blocks, block_tokens, 2, num_kv_heads, head_dim)
        self._options: dict[str, Any] = {"dtype": dtype, "device": device}
        self._blocks = {i: torch.zeros(self._shape, **self._options) for i in layers}

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._blocks.values())

    def recut(self, layers: Sequence[int]) -> KVCache:
        """Return a cache of other layers; those that both have they share."""
        cache = copy(self)
        cache._blocks = {
            i: self._blocks[i] if i in self._blocks else torch.zeros(self._shape, **self._options)
            for i in layers
        }
        return cache

    def take(self, layers: Sequence[int], blocks: Sequence[int]) -> torch.Tensor:
        """Return a copy of blocks of some layers: (layers, blocks, block_tokens, 2, Hk, D)."""
        index = torch.tensor(blocks, dtype=torch.int64, device=self._options["device"])
        return torch.stack([self._blocks[layer].index_select(0, index) for layer in layers])

    def put(self, layers: Sequence[int], blocks: Sequence[int], values: torch.Tensor) -> None:
        """Store what another cache's `take` returned.

        Raises:
            ValueError: It has another shape or type than these layers and blocks.
        """
        shape = (len(layers), len(blocks), *self._shape[1:])
        if values.shape != shape or values.dtype != self._options["dtype"]:
            raise ValueError(
                f"KV of shape {tuple(values.shape)} and {values.dtype} was sent; layers {layers} "
                f"and {len(blocks)} blocks take {shape} of {self._options['dtype']}"
            )
        index = torch.tensor(blocks, dtype=torch.int64, device=self._options["device"])
        for layer, part in zip(layers, values.to(self._options["device"]), strict=True):
            self._blocks[layer][index] = part

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in every layer, all at once."""
        if not copies:
            return
        sources, targets = (list(column) for column in zip(*copies, strict=True))
        for blocks in self._blocks.values():
            blocks[targets] = blocks[sources]

    def write(
        self, layer: int, slots_T: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Store keys and values, each (1, Hk, T, D), at the rows' slots.

        What is not finite is stored as 0: a masked NaN would still spoil every sequence that pads
        with its block or takes it over (0 x NaN is NaN). Its own sequence keeps its NaN rows.
        """
        blocks = self._blocks[layer]
        flat = blocks.view(-1, *blocks.shape[2:])
        kv = torch.stack((key[0], value[0])).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        flat[slots_T] = kv.permute(2, 0, 1, 3)

    def read(self, layer: int, table_NB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather keys and values of block tables: each (N, Hk, L, D)."""
        blocks = self._blocks[layer]
        rows, width = table_NB.shape
        flat = blocks.view(blocks.shape[0], -1).index_select(0, table_NB.reshape(-1))
        kv = flat.view(rows, width * self.block_tokens, *blocks.shape[2:])
        return kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)


@dataclass(slots=True)
class _Chunk:
    """Rows [row, row + count) of one sequence, at positions [start, start + count)."""

    row: int
    count: int
    start: int
    table_1B: torch.Tensor


@dataclass(slots=True)
class _Decodes:
    """Sequences that run one row each; `table_NB` is padded with block 0."""

    rows_N: torch.Tensor
    positions: list[int]
    tables: list[list[int]]


@dataclass(slots=True)
class _DecodeView:
    """What layers with one window length read for the decoding rows."""

    table_NB: torch.Tensor
    bias_N11L: torch.Tensor


@dataclass(slots=True)
class PagedRows:
    """Where the rows of one step write and read, prepared once and used by every layer."""

    cache: KVCache
    slots_T: torch.Tensor
    positions_T: torch.Tensor
    chunks: list[_Chunk]
    decodes: _Decodes | None
    _views: dict[int, _DecodeView] = field(default_factory=dict)

    @classmethod
    def build(cls, rows: Sequence[Rows], cache: KVCache, device: torch.device) -> PagedRows:
        size = cache.block_tokens
        slots: list[int] = []
        positions: list[int] = []
        chunks: list[_Chunk] = []
        single_rows: list[int] = []
        singles: list[Rows] = []
        for entry in rows:
            first_row = len(slots)
            span = range(entry.start, entry.start + entry.length)
            positions.extend(span)
            slots.extend(entry.blocks[p // size] * size + p % size for p in span)
            if entry.length == 1:
                single_rows.append(first_row)
                singles.append(entry)
            else:
                table = torch.tensor([entry.blocks], device=device)
                chunks.append(_Chunk(first_row, entry.length, entry.start, table))
        decodes = None
        if singles:
            decodes = _Decodes(
                torch.tensor(single_rows, device=device),
                [entry.start for entry in singles],
                [entry.blocks for entry in singles],
            )
        return cls(
            cache,
            torch.tensor(slots, device=device),
            torch.tensor(positions, device=device),
            chunks,
            decodes,
        )

    def decode_view(self, window: int | None, dtype: torch.dtype) -> _DecodeView:
        """Block tables cut to the window, and the mask of what each row may read."""
        key = window or 0
        if key not in self._views:
            assert self.decodes is not None
            self._views[key] = _decode_view(self.decodes, self.cache.block_tokens, window, dtype)
        return self._views[key]


def _decode_view(
    decodes: _Decodes, size: int, window: int | None, dtype: torch.dtype
) -> _DecodeView:
    device = decodes.rows_N.device
    firsts = [max(0, p + 1 - window) // size if window else 0 for p in decodes.positions]
    tables = [table[first:] for table, first in zip(decodes.tables, firsts, strict=True)]
    width = max(len(table) for table in tables)
    table_NB = torch.tensor([t + [0] * (width - len(t)) for t in tables], device=device)
    last = torch.tensor(
        [p - first * size for p, first in zip(decodes.positions, firsts, strict=True)],
        device=device,
    )[:, None]
    column = torch.arange(width * size, device=device)[None]
    mask = column <= last
    if window:
        mask &= column > last - window
    return _DecodeView(table_NB, _bias(mask, dtype)[:, None, None])


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: PagedRows,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attend packed rows to their own sequences' paged context.

    query (1, Hq, T, D), key and value (1, Hk, T, D); returns (1, T, Hq, D). `s_aux` are GPT-OSS's
    per-head attention sinks: a logit that takes part in the softmax and carries no value.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    paged.cache.write(layer, paged.slots_T, key, value)
    _, num_heads, num_rows, head_dim = query.shape
    out = query.new_empty(1, num_rows, num_heads, head_dim)
    for chunk in paged.chunks:
        span = slice(chunk.row, chunk.row + chunk.count)
        out[0, span] = _attend_chunk(
            query[:, :, span], paged.cache.read(layer, chunk.table_1B), chunk, scaling,
            sliding_window, s_aux,
        )  # fmt: skip
    if paged.decodes is not None:
        view = paged.decode_view(sliding_window, query.dtype)
        decoded = _attend_decodes(
            query, paged.cache.read(layer, view.table_NB), paged.decodes.rows_N,
            view.bias_N11L, scaling, s_aux,
        )  # fmt: skip
        if not paged.chunks:
            return decoded[None], None
        out[0, paged.decodes.rows_N] = decoded
    return out, None


def _attend_chunk(
    query: torch.Tensor,
    context: tuple[torch.Tensor, torch.Tensor],
    chunk: _Chunk,
    scaling: float | None,
    window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of one sequence's chunk; returns (count, Hq, D)."""
    end = chunk.start + chunk.count
    key, value = (tensor[:, :, :end] for tensor in context)
    positions = torch.arange(chunk.start, end, device=query.device)[:, None]
    column = torch.arange(end, device=query.device)[None]
    mask = column <= positions
    if window:
        mask &= column > positions - window
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bias = _bias(mask, query.dtype)[None, None]
    out = _softmax_attention(query, key, value, bias, scaling, sinks, query.shape[1])
    return out[0].transpose(0, 1)


def _attend_decodes(
    query: torch.Tensor,
    context: tuple[torch.Tensor, torch.Tensor],
    rows_N: torch.Tensor,
    bias_N11L: torch.Tensor,
    scaling: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One row a sequence: query heads of one KV head ride in the query dimension. (N, Hq, D)."""
    key, value = context
    num_sequences, num_kv_heads = key.shape[0], key.shape[1]
    _, num_heads, num_rows, head_dim = query.shape
    picked = query[0] if num_rows == num_sequences else query[0].index_select(1, rows_N)
    grouped = picked.view(num_kv_heads, num_heads // num_kv_heads, num_sequences, head_dim)
    out = _softmax_attention(
        grouped.permute(2, 0, 1, 3), key, value, bias_N11L, scaling, sinks, num_kv_heads
    )
    return out.reshape(num_sequences, num_heads, head_dim)


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores, made once a step (a boolean mask is converted in each layer)."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    scaling: float | None,
    sinks: torch.Tensor | None,
    num_groups: int,
) -> torch.Tensor:
    """Scaled dot-product attention; sinks are one more column with a zero value.

    `bias` broadcasts to (batch, num_groups, queries, context); `sinks` (Hq) is split into
    num_groups along the head dimension, the rest along the query dimension.
    """
    if sinks is not None:
        pad = key.new_zeros(key.shape[0], key.shape[1], 1, key.shape[3])
        key, value = torch.cat((key, pad), 2), torch.cat((value, pad), 2)
        rest = sinks.numel() // num_groups
        column = sinks.to(query.dtype).view(1, num_groups, rest, 1)
        shape = (bias.shape[0], num_groups, max(rest, bias.shape[2]))
        bias = torch.cat((bias.expand(*shape, -1), column.expand(*shape, 1)), -1)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)


AttentionInterface.register(ATTENTION_NAME, paged_attention)
