"""What was measured of one device: matmul rates by row count, and seconds of a checkpoint's layers.

Values only. How they bend the roofline is in `placement.costs`; who measures them is not known
here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

from placement.workload import LayerCost


@dataclass(frozen=True, kw_only=True, slots=True)
class MatmulRate:
    """FLOP/s of a matrix product with this many rows, in the number format planned for."""

    rows: int
    flops_per_s: float

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"a matmul rate is for {self.rows} rows; rows must be at least 1")
        _check_positive(f"the matmul rate at {self.rows} rows", "flops_per_s", self.flops_per_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSample:
    """One layer, timed once: `tokens` rows over sequences that hold `context_tokens` KV tokens."""

    tokens: int
    context_tokens: int
    forward_s: float
    pairs: int | None = None
    """(row, KV token) pairs of the attention; None: one row a sequence, so `context_tokens`."""
    recompute_s: float | None = None
    """A forward pass with gradients on, as a training step repeats it; None: not measured."""
    backward_s: float | None = None
    """The backward pass alone, without the recompute; None: not measured."""
    activation_bytes: int | None = None
    """What the layer keeps for its backward pass; None: not measured."""

    def __post_init__(self) -> None:
        owner = f"the layer sample of {self.tokens} tokens"
        if self.tokens < 1:
            raise ValueError(f"{owner}: tokens must be at least 1")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name in {"context_tokens", "pairs", "activation_bytes"}:
                if value is not None and value < 0:
                    raise ValueError(f"{owner}: {field.name} ({value}) must be 0 or more")
            elif value is not None:
                _check_positive(owner, field.name, value)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredLayer:
    """The samples of one kind of layer, by ascending token count."""

    layer: LayerCost
    samples: tuple[LayerSample, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("a measured layer has 0 samples; measure at least 1 token count")
        check_ascending("a measured layer's token counts", [s.tokens for s in self.samples])


def check_ascending(what: str, values: Sequence[float]) -> None:
    """Refuse a table whose points are not in strictly ascending order."""
    for low, high in pairwise(values):
        if not low < high:
            raise ValueError(f"{what} must ascend; {high} follows {low}")


def _check_positive(owner: str, field: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{owner}: {field} ({value}) must be above 0 and finite; measure again")
