"""Taking rows of some spans out of a layer's rows, and putting them back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from actors.engine.expert_calls import Span


def gather(rows_SH: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
    """Return the rows of spans, one after another; of one span without copying."""
    if len(spans) == 1:
        return rows_SH[spans[0].start : spans[0].end]
    return torch.cat([rows_SH[start:end] for start, end in spans])


def scatter(out_SH: torch.Tensor, spans: Iterable[Span], part_SH: torch.Tensor) -> None:
    """Put rows back where `gather` took them from."""
    at = 0
    for start, end in spans:
        out_SH[start:end] = part_SH[at : at + end - start]
        at += end - start
